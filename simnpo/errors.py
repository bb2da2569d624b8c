"""What can go wrong in a run, by whose doing, and what a command makes of it."""

import errno
import logging
import os
import sys
from collections.abc import Callable

from simnpo.text import one_line

# a place that stops taking data is not the fault of the command line
OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class UserError(ValueError):
    """An argument, a file or a model that this package cannot work with; the message says what to change."""


class RunError(RuntimeError):
    """A run that had to stop; the message names the step and what is left on disk."""


class LogLine(logging.Formatter):
    """Formats a record as one line in which all characters can be seen, whatever text it quotes."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; where it raises, says why and returns 2 for wrong input, 1 for a run that had to stop.

    Of a reader of the output that has gone (`| head`) it says nothing.
    """
    try:
        try:
            return work()
        finally:
            _flush_output()
    except BrokenPipeError:
        return 1
    except UserError as error:
        return _say(str(error), 2)
    except RunError as error:
        return _say(str(error), 1)
    except OSError as error:
        return _say(reason(error), 1 if error.errno in OUT_OF_ROOM else 2)


def reason(error: OSError) -> str:
    """What the system refused, and of which path."""
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.strerror}: {os.fsdecode(error.filename)}"


def check_arguments(arguments: list[str]) -> None:
    """Refuses what can neither be a path nor be written down.

    Raises:
        UserError: an argument holds a null character, or bytes that are no UTF-8; names it.
    """
    for argument in arguments:
        if "\0" in argument:
            raise UserError(f"an argument must be without null characters, got {argument!r}")
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"an argument must be UTF-8, got {argument!a}") from None


def _say(message: str, status: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return status


def _flush_output() -> None:
    if sys.stdout is None:  # closed by the shell
        return
    try:
        sys.stdout.flush()
    except OSError:
        # the interpreter flushes once more at its end, and would report this again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
