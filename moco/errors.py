"""Errors that a user can correct, and how the programs print them and all that may hold a name.

A file's name is bytes: it may be no UTF-8, hold line breaks, or codes that a terminal obeys.
"""

import argparse
import contextlib
import errno
import os
import re
import shlex
import signal
import sys


class UserError(Exception):
    """An error that the user can correct. Its message says what is wrong, then what to do.

    str() of it is one line, whatever names are in it (`printable`).
    """

    exit_code = 2

    def __str__(self):
        return printable(super().__str__())


class DivergedError(UserError):
    """The loss is not finite. Nothing was saved since the last checkpoint with a finite loss."""

    exit_code = 3


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line below the usage, whatever was given.

    `~` is the home folder also where shells leave it: in `--output-dir=~/x` and in quotes. Negative numbers
    are values of flags also with an exponent, as in `--gray-range -1.2e-05 1`.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        # argparse's own expression of some versions knows no exponent, and it has no public setting
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        parts = (re.fullmatch(r"(--[\w-]+=|-\w)?(.*)", str(arg), re.DOTALL).groups("") for arg in args)
        return super().parse_known_args(
            [flag + os.path.expanduser(value) for flag, value in parts], namespace
        )

    def error(self, message):
        super().error(printable(message))


def first_line(error):
    """The first line of an exception's message, at most 160 characters, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def printable(text):
    """A text or path with escapes for what cannot be printed in one line; applied twice, the same."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def shell_word(path):
    """A path as a word of a command line for bash or zsh that can be printed, copied and run."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    plain = set(range(32, 127)) - set(b"'\\")
    escaped = (chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(text))
    return f"$'{''.join(escaped)}'"


def say(line, file=None):
    """Print a line about a run on `file` (default: standard output): `printable` but for tabs.

    The run goes on when it cannot be printed, as when its reader has ended, the terminal is closed or the
    disk is full: nothing more is printed there then.
    """
    file = sys.stdout if file is None else file
    try:
        print("\t".join(map(printable, str(line).split("\t"))), file=file, flush=True)
    except OSError as error:
        _silence(file)
        if file is not sys.stderr:
            say(f"note: nothing can be printed any more ({error.strerror}); the run goes on", sys.stderr)


def interrupt_on_signals():
    """Have SIGTERM and, unless nohup has it ignored, SIGHUP do what Ctrl-C does, so that nothing half-made
    is left behind.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def escape_output():
    """Have standard output and error escape what their encoding lacks, instead of raising."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the program, as by 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the program runs
        elif hasattr(stream, "reconfigure"):  # not where a notebook has replaced it
            stream.reconfigure(errors="backslashreplace")


def run_program(main, name=None):
    """Call `main()`; print a UserError as `name: error: message` and exit with its code.

    name: of the program (default: the file name in sys.argv[0]). Ctrl-C exits with 130, without a traceback.
    """
    escape_output()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        say(f"{name or os.path.basename(sys.argv[0])}: error: {error}", sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("", sys.stderr)
        say("interrupted", sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has ended, as in `... | head`
        _silence(sys.stdout)
        _silence(sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:  # of a file, it is named
            raise
        _silence(sys.stdout)
        program = name or os.path.basename(sys.argv[0])
        say(f"{program}: error: no space left for standard output or a file; make room", sys.stderr)
        sys.exit(2)


def _silence(stream):
    """Let what is printed on a stream go nowhere, and what waits to be printed, which Python would report."""
    with contextlib.suppress(OSError, ValueError):  # it has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
