"""Where a benchmark's rows come from: a folder of JSON Lines, or a dataset of the Hugging Face hub."""

from pathlib import Path

from simnpo.errors import UserError
from simnpo.evaluation.questions import Row
from simnpo.rows import read_rows

SUFFIXES = (".jsonl", ".json")


def named_rows(data: str, name: str) -> list[Row] | None:
    """The rows called `name`: of a file in the folder `data`, or of a configuration of the hub's dataset `data`.

    Returns:
        None where the folder or the dataset has none of that name.

    Raises:
        UserError: `data` is neither, the `datasets` library that reads the hub is missing, or a row is malformed.
    """
    folder = Path(data)
    if not folder.is_dir():
        return _hub_rows(data, name)
    files = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").exists()]
    if not files:
        return None
    rows = list(read_rows(files[0]))
    if not rows:
        raise UserError(f"{files[0]} is empty")
    return rows


def _hub_rows(data: str, name: str) -> list[Row] | None:
    if Path(data).exists() or data.count("/") != 1 or data.startswith((".", "/")):
        raise UserError(f"data: no such folder: {data}")
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            f"data: {data!r} is no folder here, and reading it from the Hugging Face hub needs the datasets library: "
            "pip install simnpo[hub]"
        ) from None
    try:
        if name not in datasets.get_dataset_config_names(data):
            return None
        rows = datasets.load_dataset(data, name, split="train")
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"data: cannot load {name} of {data!r} from the hub: {reason}") from error
    return [(f"{data}/{name}:{i}", dict(row)) for i, row in enumerate(rows, start=1)]
