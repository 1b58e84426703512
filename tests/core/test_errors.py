"""Errors of a user become one sentence and an exit code; other exceptions stay what they are."""

import io
import os
import pickle
import signal
import sys

import pytest
from forked_program import forked

from moco.errors import DivergedError, Parser, UserError, first_line, printable, run_program, say, shell_word
from moco.progress import Progress


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("wrong; do this"), 2, "program: error: wrong; do this\n"),
        (UserError("two\nlines\udce9; \x1b[2J"), 2, "program: error: two\\nlines\\udce9; \\x1b[2J\n"),
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


def test_output_without_room_is_an_error_without_a_traceback():
    def main():
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115
        print("what is lost")

    pid, output = forked(main)
    assert output.read() == "program: error: no space left for standard output or a file; make room\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--out=~/a b", "/home/me/a b"),
        ("--out=~", "/home/me"),
        ("-o~/a", "/home/me/a"),
        ("~/a\nb", "/home/me/a\nb"),
        ("--out=a~/b", "a~/b"),
        ("--out=~no-such-user/a", "~no-such-user/a"),
        ("./~/a", "./~/a"),
    ],
)
def test_a_tilde_is_the_home_folder_where_shells_leave_it(word, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("-o", "--out")
    assert value in vars(parser.parse_args([word])).values()


def test_a_message_stays_one_line_on_its_way():
    error = pickle.loads(pickle.dumps(UserError("a\nb")))  # as from another process
    assert str(error) == f"{UserError(str(error))}" == r"a\nb"
    assert str(ValueError("a\nb")) == "a\nb"  # negative control


def test_what_is_escaped_and_what_is_not():
    assert printable("übung 日本 3.jpg") == "übung 日本 3.jpg"
    assert printable("\t\r\n\x1b\x7f\u2028\u200f\udce9") == r"\t\r\n\x1b\x7f\u2028\u200f\udce9"
    assert printable(printable("a\n")) == printable("a\n")
    assert shell_word("a b") == "'a b'" and shell_word("a\n'é") == r"$'a\x0a\x27\xc3\xa9'"


def test_a_line_of_a_run(capsys):
    say("a\tb\nc\udce9")
    assert capsys.readouterr().out == "a\tb\\nc\\udce9\n"


def test_a_run_goes_on_where_nothing_can_be_printed(capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    say("lost", Full())
    said = capsys.readouterr().err
    assert said == "note: nothing can be printed any more (No space left on device); the run goes on\n"
    with pytest.raises(OSError, match="No space"):  # negative control
        print("lost", file=Full(), flush=True)


def test_both_streams_may_be_closed():
    def main():
        os.close(1)
        os.close(2)
        for _ in range(3):
            say("lost")
            say("lost", sys.stderr)
        raise UserError("wrong")

    pid, output = forked(main, (1, 2))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    output.close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_program_that_is_started_without_streams(monkeypatch, closed):
    def main():
        sys.stdout.write("nowhere")
        with Progress("reading", 1):
            pass

    monkeypatch.setattr(sys, "stdout", None)  # as Python has them after >&- 2>&-
    monkeypatch.setattr(sys, "stderr", None)
    if closed:
        run_program(main)
    else:  # negative control
        with pytest.raises(AttributeError):
            main()


def test_first_line_of_an_exception():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 500))) == 160
