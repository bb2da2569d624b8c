"""What only the first of several ranks does, for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from simnpo.errors import RunError, UserError

T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs `work` on the first rank and returns its result, or raises its error, on every rank.

    Collective: every rank must call it. All wait until the work is done.
    """
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except (UserError, RunError, OSError) as error:
            if accelerator.num_processes == 1:
                raise
            outcome = [error]
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
