import errno
import logging
import os
import subprocess
import sys

import pytest

from simnpo.errors import LogLine, RunError, UserError, check_arguments, exit_status
from simnpo.text import one_line, shorten, visible


def test_what_acts_on_a_terminal_is_written_as_an_escape():
    assert visible("a\x1b[2J\u202eb\u2066\u061c\u200f\x9b\ud800\r") == (
        r"a\u001b[2J\u202eb\u2066\u061c\u200f\u009b\ud800\u000d"
    )
    assert visible("naïve 東京\n\tעברית 👩\u200d👧") == "naïve 東京\n\tעברית 👩\u200d👧"
    assert one_line("a\nb\x1b") == r"a b\u001b"
    assert shorten("a" * 81) == "a" * 79 + "…"


def raising(error: Exception):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("bad\nerror: \x1b[31mforged"), 2, r"error: bad error: \u001b[31mforged"),
        (RunError("step 3"), 1, "error: step 3"),
        (FileNotFoundError("no such file: x"), 2, "error: no such file: x"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "error: Permission denied: /a/b"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "error: File name too long: x"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), 1, "error: No space left on device: /a"),
    ],
)
def test_one_line_and_a_status(error, status, text, capsys):
    assert exit_status(raising(error)) == status
    assert capsys.readouterr().err == text + "\n"


def test_arguments_that_are_no_text():
    check_arguments(["--a=é"])
    for wrong in ("a\0b", "\udcff"):
        with pytest.raises(UserError, match="an argument must be"):
            check_arguments([wrong])


def test_a_reader_that_has_gone_is_no_error():
    read, write = os.pipe()
    os.close(read)
    code = "from simnpo.errors import exit_status; exit(exit_status(lambda: print('a') or 0))"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_warning_is_one_visible_line():
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "row %s", ("a\nb\u202e",), None)
    assert LogLine("%(levelname)s %(message)s").format(record) == r"WARNING row a b\u202e"
