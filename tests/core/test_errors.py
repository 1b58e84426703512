"""Errors of a user become one sentence and an exit code; other exceptions stay what they are."""

import os
import signal

import pytest
from forked_program import forked

from moco.errors import DivergedError, UserError, first_line


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("wrong; do this"), 2, "program: error: wrong; do this\n"),
        (DivergedError("the loss is nan"), 3, "program: error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(cli, error, code, printed):
    assert cli(raising(error)) == (code, "", printed)


def test_errors_of_the_program_keep_their_traceback(cli):
    with pytest.raises(ZeroDivisionError):
        cli(lambda: 1 / 0)


def test_a_reader_that_leaves_is_no_error():
    def main():
        print("first", flush=True)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for _ in range(100_000):
            print("more", flush=True)

    pid, output = forked(main, (1,))
    assert output.readline() == "first\n"
    output.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_first_line_of_an_exception():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 500))) == 160
