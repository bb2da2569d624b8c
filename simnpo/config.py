"""The configuration of a run: one frozen dataclass whose fields are the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from simnpo.errors import UserError
from simnpo.text import shorten

if TYPE_CHECKING:
    from simnpo.objectives import Objective

# targets of a sequence from which the errors of bf16 arithmetic add up to more than a nat (benchmarks/results/long.md)
LONG_TARGETS = 1024
# a resumed run may differ in these; every other field changes the weights or the report that come out
FREE_ON_RESUME = {"output", "resume", "save_steps", "keep_checkpoints", "logging_steps", "reference_cache"}

# what float32 holds in full precision, for a setting ends up in a tensor
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
LARGEST_INT = 2**31 - 1
MOST = {"seed": 2**63 - 1, **dict.fromkeys(("batch_size", "retain_batch_size", "lora_rank"), 65536)}


def is_float32(value: float) -> bool:
    """Whether a number is one in float32 too: not NaN, not infinite, not 0 unless it is 0."""
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def _option(text: str, **kwargs: Any) -> Any:
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class UnlearnConfig:
    """Everything that decides a run. Raises `UserError` naming the field when a value makes no sense."""

    model: str = _option("Hugging Face id, folder or .gguf file of a causal language model.")
    forget: str = _option("JSON Lines to forget: prompt/response, question/answer, messages or text per row.")
    output: str = _option("Folder of the run: metrics, checkpoints, report, and the unlearned model in model/.")
    retain: str | None = _option(
        "JSON Lines to keep knowing, same formats. Without it there is no retain term.", default=None
    )
    heldout: str | None = _option("JSON Lines in neither: only scored, to see what else has changed.", default=None)

    method: str = _option(
        "simnpo: length-normalised, no reference. npo: against the model's own start. ga: gradient ascent. "
        "--list-methods shows these and all the others.",
        default="simnpo",
    )
    beta: float | None = _option("Inverse temperature (default: the method's own; simnpo 2.5, npo 0.1).", default=None)
    gamma: float = _option(
        "Margin of simnpo and simpo, the papers': outside beta. It equals beta * delta where code puts it inside.",
        default=0.0,
    )
    method_args: str = _option("The method's other options, as in 'beta1=5 beta2=1'; see --list-methods.", default="")
    alternate: str = _option(
        "Answer that dpo, kto, simpo and jensun raise where a forget row has no field `alternate`.",
        default="I don't know.",
    )
    forget_coef: float = _option("Multiplies the forget term (the `lambda` of published TOFU settings).", default=1.0)
    retain_coef: float = _option("Multiplies the retain term, the mean NLL per retain token.", default=1.0)

    lora: bool = _option(
        "Train LoRA adapters on every linear layer but the head instead of all weights.", default=False
    )
    lora_rank: int = _option("Rank of the adapters.", default=16)
    lora_alpha: float = _option("Adapters are scaled by lora_alpha / lora_rank.", default=32.0)

    epochs: float = _option("Passes over the forget set.", default=5.0)
    max_steps: int | None = _option("Optimizer steps; overrides epochs.", default=None)
    batch_size: int = _option("Forget sequences per optimizer step, over all ranks and micro-batches.", default=8)
    retain_batch_size: int | None = _option("Retain sequences per optimizer step (default: batch_size).", default=None)
    gradient_accumulation_steps: int = _option(
        "Micro-batches a step is cut into. Changes the memory, not the mathematics.", default=1
    )
    learning_rate: float = _option("Peak learning rate of AdamW.", default=1e-5)
    warmup_ratio: float = _option(
        "Share of the steps in which the learning rate rises; it then falls to 0.", default=0.1
    )
    weight_decay: float = _option("Decoupled; not applied to norms and biases.", default=0.01)
    max_grad_norm: float = _option(
        "Gradients of a step are scaled to at most this global L2 norm; 0: never.", default=1.0
    )
    max_length: int = _option("Tokens per sequence, prompt included; the rest of a response is cut off.", default=512)
    reference_cache: str | None = _option(
        "Folder of reference log-probabilities, found again by model and data (default: the user's cache folder).",
        default=None,
    )
    seed: int = _option("Fixes order, retain draws, adapters and dropout.", default=0)

    precision: Literal["bf16", "fp32"] = _option(
        "Of the arithmetic. Trained weights and their updates are fp32 either way; a body frozen by --lora is in bf16.",
        default="bf16",
    )
    exact_ratio: Literal["auto", "on", "off"] = _option(
        "Read forget sequences once more before each step, in float32, for methods of their log-ratio to the reference "
        "(npo, dpo, kto): bf16 errors of tokens add up. auto: if one has more than 1024 targets.",
        default="auto",
    )
    packing: Literal["auto", "on", "off"] = _option(
        "Put sequences one after another instead of padding them. auto: if the model keeps them apart (measured).",
        default="auto",
    )
    share_prefix: Literal["auto", "off"] = _option(
        "Compute once what all packed sequences of a forward begin with (a system prompt). auto: if the model can "
        "(measured) and a twentieth of the tokens or more is saved.",
        default="auto",
    )
    stride: int | None = _option(
        "Split what is longer than max_length into pieces that start every `stride` tokens, each token a target once, "
        "instead of cutting it off.",
        default=None,
    )
    reward_per: Literal["document", "piece"] = _option(
        "Whether the pieces of a document share one length and reward, or have one each.", default="document"
    )

    auto: bool = _option("Let the planner choose the memory options below for the memory there is.", default=False)
    chunk_tokens: int | None = _option("Rows of logits alive at once in the loss (default: chosen).", default=None)
    gradient_checkpointing: bool = _option("Recompute activations in backward: less memory, more time.", default=False)
    offload_activations: bool = _option(
        "Keep the checkpoints of layers in the host's memory, copied there and back beside the arithmetic.",
        default=False,
    )
    tile_tokens: int | None = _option("Tokens that MLPs and norms see at once (default: all).", default=None)
    separate_terms: bool = _option(
        "Forget and retain sequences one after the other, each with a backward of its own.", default=False
    )
    load_in_4bit: bool = _option("Hold the body frozen by --lora in 4 bits (NF4, bitsandbytes).", default=False)
    weights: Literal["fp32", "bf16"] = _option(
        "Of trained weights. bf16 keeps beside each what rounding it left out, so that no update is lost.",
        default="fp32",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = _option(
        "adamw8bit: states in 8 bits (bitsandbytes). adafactor: second moments factored, no first.", default="adamw"
    )
    gradient_release: bool = _option(
        "Update each weight inside backward and free its gradient at once; needs --max_grad_norm 0.", default=False
    )
    attention: str | None = _option(
        "Attention implementation, as transformers names it (default: its own).", default=None
    )
    cpu: bool = _option("Stay on the CPU even if there is an accelerator.", default=False)

    save_steps: int = _option("Steps between checkpoints; 0: only the last step.", default=100)
    keep_checkpoints: int = _option(
        "Checkpoints kept; older ones are removed. A second one is there for the case that the last is damaged.",
        default=2,
    )
    logging_steps: int = _option("Steps between rows of metrics.jsonl.", default=1)
    eval_examples: int = _option("Examples of each set answered before and after, for the report; 0: none.", default=16)
    weight_examples: int = _option(
        "Forget examples whose gradient weight is written down before, half-way and after; 0: none.", default=64
    )
    resume: bool = _option("Continue the run in --output from its newest checkpoint, to the same bits.", default=False)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, kind in hints.items():
            self._check_kind(name, kind, getattr(self, name))
        for name in ("lora_rank", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "logging_steps"):
            self._require(name, "at least 1", getattr(self, name) >= 1)
        for name in ("beta", "max_steps", "retain_batch_size", "chunk_tokens", "stride", "tile_tokens"):
            value = getattr(self, name)
            self._require(name, "greater than 0", value is None or value > 0)
        for name in ("lora_alpha", "epochs", "learning_rate"):
            self._require(name, "greater than 0", getattr(self, name) > 0)
        for name in (
            *("gamma", "forget_coef", "retain_coef", "weight_decay", "max_grad_norm"),
            *("save_steps", "eval_examples", "weight_examples", "seed"),
        ):
            self._require(name, "0 or more", getattr(self, name) >= 0)
        for name, kind in hints.items():
            self._check_range(name, kind, getattr(self, name))
        too_many = self.max_steps is None and self.epochs / self.batch_size > LARGEST_INT
        self._require("epochs", f"less than {LARGEST_INT} steps", not too_many)
        self._require("max_length", "at least 2: one token to read and one to predict", self.max_length >= 2)
        self._require("warmup_ratio", "between 0 and 1", 0 <= self.warmup_ratio <= 1)
        self._require("stride", "less than max_length", self.stride is None or self.stride < self.max_length)
        self._check_levers()
        self._require("alternate", "an answer", bool(self.alternate.strip()))
        self.objective()
        self._check_pieces()
        if self.exact_ratio == "on" and not self.objective().sums_ratio:
            raise UserError(
                f"exact_ratio: method {self.method!r} takes no log-ratio of sequences to a reference: leave it out"
            )

    def _require(self, name: str, what: str, holds: bool) -> None:
        if not holds:
            value = getattr(self, name)
            try:
                got = shorten(repr(value))
            except ValueError:  # Python does not write an integer of thousands of digits
                got = f"an integer of {value.bit_length()} bits"
            raise UserError(f"{name} must be {what}, got {got}")

    def _check_kind(self, name: str, kind: Any, value: Any) -> None:
        """Whether a field holds what its annotation says; an integer passes for a float."""
        if get_origin(kind) is Literal:
            *others, last = get_args(kind)
            self._require(name, f"{', '.join(others)} or {last}", isinstance(value, str) and value in get_args(kind))
            return
        kinds = get_args(kind) or (kind,)
        allowed = (*kinds, int) if float in kinds else kinds
        what = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
        is_one = isinstance(value, allowed) and (bool in kinds or not isinstance(value, bool))
        self._require(name, f"of type {what}", is_one)
        self._require(name, "without null characters", not isinstance(value, str) or "\0" not in value)

    def _check_range(self, name: str, kind: Any, value: Any) -> None:
        """Whether a number is one in the arithmetic it ends up in."""
        if isinstance(value, float):
            self._require(name, "finite", math.isfinite(value))
        if float in (get_args(kind) or (kind,)) and value is not None:
            self._require(name, f"0 or between {SMALLEST:.2g} and {LARGEST:.2g} as a float32 is", is_float32(value))
        elif isinstance(value, int):
            most = MOST.get(name, LARGEST_INT)
            self._require(name, f"at most {most}", value <= most)

    def _check_pieces(self) -> None:
        if self.stride is not None and self.reward_per == "piece" and self.alternates() != "none":
            raise UserError(
                f"reward_per piece does not go with method {self.method!r}: it sets an alternate answer against the "
                "whole forget answer, and a piece has none; use --reward_per document"
            )

    def _check_levers(self) -> None:
        """Which memory options go together."""
        needs = (
            ("offload_activations", self.offload_activations, "gradient_checkpointing", self.gradient_checkpointing),
            ("load_in_4bit", self.load_in_4bit, "lora", self.lora),
            ("gradient_release", self.gradient_release, "max_grad_norm 0, for a norm of all gradients needs them all",
             self.max_grad_norm == 0),
            ("gradient_release", self.gradient_release, "one backward a step: gradient_accumulation_steps 1 and no "
             "separate_terms", self.gradient_accumulation_steps == 1 and not self.separate_terms),
        )  # fmt: skip
        for name, asked, other, given in needs:
            if asked and not given:
                raise UserError(f"{name} needs {other}")
        if self.weights == "bf16" and (self.lora or self.precision != "bf16"):
            raise UserError(
                "weights bf16 are for training the whole model in bf16 arithmetic: adapters stay fp32, and the body "
                "they freeze is in the dtype of the arithmetic anyway"
            )

    def objective(self) -> Objective:
        """The forget objective with its options.

        Raises:
            UserError: there is no such method, it has no such option, or the option's value makes no sense.
        """
        from simnpo.objectives.methods import METHODS  # brings torch: keep `--help` fast

        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}: see --list-methods")
        method = METHODS[self.method]
        settings = {"beta": self.beta} if self.beta is not None else {}
        settings |= {"gamma": self.gamma} if self.gamma else {}
        for word in self.method_args.replace(",", " ").split():
            name, _, value = word.partition("=")
            if name in settings:
                raise UserError(f"method_args: {name} is given twice, {name}={settings[name]} and {word}")
            try:
                settings[name] = float(value)
            except ValueError:
                raise UserError(f"method_args must be name=number pairs, got {shorten(repr(word))}") from None
            if not is_float32(settings[name]):
                raise UserError(f"method_args: {name} must be finite and in the range of float32, got {shorten(value)}")
        for name, value in settings.items():
            if name not in method.options():
                has = ", ".join(method.options()) or "no options"
                raise UserError(f"method {self.method!r} has no {name}, it has {has}: got {name}={value}")
        try:
            return method.objective(**method.settings, **settings)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"method {self.method!r}: {error}") from None

    def alternates(self) -> Literal["none", "beside", "instead"]:
        """Whether the objective sees alternate answers beside the forget answers, or instead of them."""
        objective = self.objective()
        if objective.targets_alternate:
            return "instead"
        return "beside" if objective.needs_alternates else "none"

    def reads_exact_ratio(self, num_targets: int) -> bool:
        """Whether a run whose longest forget sequence has `num_targets` reads its log-ratio in float32, if it can."""
        asked = self.exact_ratio == "on" or (self.exact_ratio == "auto" and num_targets > LONG_TARGETS)
        return asked and self.precision == "bf16" and self.objective().sums_ratio

    def retain_sequences(self) -> int:
        """Retain sequences of one optimizer step."""
        if self.retain is None:
            return 0
        return self.batch_size if self.retain_batch_size is None else self.retain_batch_size

    def num_steps(self, num_forget: int) -> int:
        """Optimizer steps of the run, given the size of the forget set.

        Raises:
            UserError: they are more than a step can count.
        """
        steps = self.max_steps or max(1, math.ceil(self.epochs * num_forget / self.batch_size))
        self._require("epochs", f"at most {LARGEST_INT} steps of this forget set", steps <= LARGEST_INT)
        return steps

    def output_dir(self) -> Path:
        return Path(self.output)

    def fixed(self) -> dict[str, Any]:
        """The fields that decide the weights and the report that come out."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}

    def refuse_changes(self, saved: dict[str, Any]) -> None:
        """Raises `UserError` naming the fields in which resuming from `saved` (config.json) would change the result."""
        now = self.fixed()
        changed = [name for name in now if now[name] != saved.get(name)]
        if changed:
            listed = ", ".join(f"{name} (was {saved.get(name)!r}, now {now[name]!r})" for name in changed)
            raise UserError(
                f"--resume continues a run to the same bits, and the configuration differs in {listed}: "
                "use the same arguments, or another --output for a new run"
            )
