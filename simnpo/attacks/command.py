"""`simnpo attack relearn|quantize|prefix`: how much of what was forgotten an attacker gets back."""

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from simnpo.cli import COMMANDS
from simnpo.config import is_float32
from simnpo.errors import UserError
from simnpo.evaluation.command import (
    MOST_TOKENS,
    add_model_options,
    check_model_numbers,
    check_numbers,
    load,
    settings_of,
    show,
)
from simnpo.text import visible

ATTACKS = {
    "relearn": "fine-tune on a fifth of the forget set, the shortest answers or random ones",
    "quantize": "round the weights to 8 and 4 bits",
    "prefix": "give the first tokens of the answer",
}
MAX_LENGTH, MAX_NEW_TOKENS = 512, 200


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("simnpo attack", description=COMMANDS["attack"])
    attacks = parser.add_subparsers(dest="attack", required=True)
    each = {name: attacks.add_parser(name, help=text, description=text) for name, text in ATTACKS.items()}
    for one in each.values():
        one.add_argument("--model", required=True, help="Hugging Face id, folder or .gguf file")
        one.add_argument("--forget", required=True, help="JSON Lines that were forgotten, as for `simnpo unlearn`")
        one.add_argument("--retain-model", help="model that never saw them, attacked in the same way")
        one.add_argument("--output", required=True, help="folder for results.json, results.md and curves.png")
        one.add_argument("--max-examples", type=int, help="of the files, the first (default: all)")
        add_model_options(one)
    relearn, quantize, prefix = each.values()
    relearn.add_argument("--share", type=float, default=0.2, help="of the forget set (default: 0.2)")
    relearn.add_argument("--epochs", type=int, default=3, help="(default: 3)")
    relearn.add_argument("--repeats", type=int, default=5, help="random subsets (default: 5)")
    relearn.add_argument("--learning-rate", type=float, default=1e-5, help="(default: 1e-5)")
    relearn.add_argument("--train-batch-size", type=int, default=4, help="sequences of a step (default: 4)")
    quantize.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="of a weight, 2 to 8 (default: 8 4)")
    quantize.add_argument("--group-size", type=int, default=64, help="weights that share a scale (default: 64)")
    quantize.add_argument("--retain", help="JSON Lines that should be kept: what the rounding does to them")
    prefix.add_argument(
        "--prefix-tokens", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="tokens given (default: 0 1 2 4 8)"
    )
    return parser


def main(options: list[str]) -> int:
    """Runs the command; returns the exit status."""
    arguments = parser().parse_args(options)
    check_model_numbers(arguments)
    attack = {"relearn": relearn, "quantize": quantize, "prefix": prefix}[arguments.attack]
    check = {"relearn": check_relearn, "quantize": check_quantize, "prefix": check_prefix}[arguments.attack]
    check(arguments)

    # brings torch and transformers: after whatever can be refused without them
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    attack(arguments)
    return 0


def check_relearn(arguments: argparse.Namespace) -> None:
    check_numbers(arguments, "epochs", "repeats", "train_batch_size", most=MOST_TOKENS)
    if not 0 < arguments.share <= 1:
        raise UserError(f"share must be greater than 0 and at most 1, got {arguments.share}")
    if not (arguments.learning_rate > 0 and is_float32(arguments.learning_rate)):
        rate = arguments.learning_rate
        raise UserError(f"learning_rate must be greater than 0, finite and in the range of float32, got {rate}")


def check_quantize(arguments: argparse.Namespace) -> None:
    check_numbers(arguments, "group_size")
    check_numbers(arguments, "bits", least=2, most=8)


def check_prefix(arguments: argparse.Namespace) -> None:
    check_numbers(arguments, "prefix_tokens", least=0)


def read(arguments: argparse.Namespace, path: str, name: str) -> Any:
    """The questions of a file, as the model `name` reads them."""
    from simnpo.evaluation.questions import encode_questions
    from simnpo.loading import load_tokenizer
    from simnpo.rows import read_rows

    rows = list(islice(read_rows(Path(path)), arguments.max_examples))
    if not rows:
        raise UserError(f"{path} is empty")
    return encode_questions(rows, load_tokenizer(name), arguments.max_length or MAX_LENGTH)


def attack_both(
    arguments: argparse.Namespace, attack: Callable[[str, str, Any], tuple[list[dict[str, Any]], Any]]
) -> list[dict[str, Any]]:
    """Rows of the unlearned model, and of the retrained one where there is one.

    Args:
        attack: rows of a model and its truth ratios before the attack, or None; from its path, its name in the rows,
            and the truth ratios of the retrained model.
    """
    from simnpo.attacks.curves import RETRAINED, UNLEARNED

    # the first model is gone when the second is loaded: there never are two
    before, truth_ratio = [], None
    if arguments.retain_model is not None:
        before, truth_ratio = attack(arguments.retain_model, RETRAINED, None)
    return [*attack(arguments.model, UNLEARNED, truth_ratio)[0], *before]


def finish(arguments: argparse.Namespace, curves: Any, folder: Path, **settings: Any) -> None:
    """Writes results.json, results.md and curves.png, and shows the page."""
    from simnpo.evaluation.results import versions, write_results
    from simnpo.training.disk import write_bytes

    results = {
        "attack": arguments.attack,
        "model": arguments.model,
        "retain_model": arguments.retain_model,
        "forget": arguments.forget,
        "settings": settings_of(arguments, max_length=arguments.max_length or MAX_LENGTH, **settings),
        "versions": versions(),
        "rows": curves.rows,
    }
    page = curves.page(results)
    write_bytes(folder / "curves.png", curves.picture())
    write_results(folder, results, page)
    show(page)
    print(visible(f"results: {folder / 'results.json'}"))


def relearn(arguments: argparse.Namespace) -> None:
    import torch

    from simnpo.attacks.relearn import Relearning, relearn_curves, relearn_rows
    from simnpo.evaluation.results import open_folder

    settings = arguments.share, arguments.epochs, arguments.learning_rate, arguments.train_batch_size
    relearning = Relearning(*settings)
    room = arguments.max_new_tokens or MAX_NEW_TOKENS
    questions = {model: read(arguments, arguments.forget, model) for model in models(arguments)}
    folder = open_folder(arguments.output)

    def attack(model: str, name: str, truth_ratio: Any) -> Any:
        # trained weights are float32, whatever the arithmetic
        subject = load(arguments, model, precision="fp32")
        device = next(subject.model.parameters()).device.type
        autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=arguments.precision == "bf16")
        return relearn_rows(
            subject,
            questions[model],
            relearning,
            name=name,
            repeats=arguments.repeats,
            max_new_tokens=room,
            autocast=autocast,
            retrained_truth_ratio=truth_ratio,
        )

    curves = relearn_curves(attack_both(arguments, attack), relearning)
    finish(arguments, curves, folder, max_new_tokens=room, repeats=arguments.repeats, **relearning._asdict())


def quantize(arguments: argparse.Namespace) -> None:
    from simnpo.attacks.quantize import quantize_curves, quantize_rows
    from simnpo.evaluation.results import open_folder

    files = {"forget": arguments.forget, **({"retain": arguments.retain} if arguments.retain else {})}
    sets = {model: {name: read(arguments, path, model) for name, path in files.items()} for model in models(arguments)}
    room, group_size = arguments.max_new_tokens or MAX_NEW_TOKENS, arguments.group_size
    folder = open_folder(arguments.output)

    def attack(model: str, name: str, truth_ratio: Any) -> Any:
        return quantize_rows(
            load(arguments, model),
            sets[model],
            name=name,
            bits=arguments.bits,
            group_size=group_size,
            max_new_tokens=room,
            retrained_truth_ratio=truth_ratio,
        )

    curves = quantize_curves(attack_both(arguments, attack), group_size)
    finish(arguments, curves, folder, max_new_tokens=room, group_size=group_size, retain=arguments.retain)


def prefix(arguments: argparse.Namespace) -> None:
    from simnpo.attacks.prefix import check_has_prompts, prefix_curves, prefix_rows
    from simnpo.evaluation.results import open_folder

    questions = {model: read(arguments, arguments.forget, model) for model in models(arguments)}
    for some in questions.values():
        check_has_prompts(some.answers)
    folder, given = open_folder(arguments.output), sorted(set(arguments.prefix_tokens))

    def attack(model: str, name: str, _: Any) -> Any:
        answers, room = questions[model].answers, arguments.max_new_tokens
        return prefix_rows(load(arguments, model), answers, name=name, given=given, max_new_tokens=room), None

    finish(arguments, prefix_curves(attack_both(arguments, attack)), folder, max_new_tokens=arguments.max_new_tokens)


def models(arguments: argparse.Namespace) -> list[str]:
    return [name for name in (arguments.model, arguments.retain_model) if name is not None]
