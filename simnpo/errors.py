"""What can go wrong in a run, by whose doing, and what a command makes of it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """An argument, a file or a model that this package cannot work with; the message says what to change."""


class RunError(RuntimeError):
    """A run that had to stop; the message names the step and what is left on disk."""


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; where it raises, says why and returns 2 for wrong input, 1 for a run that had to stop."""
    try:
        return work()
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
