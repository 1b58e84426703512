"""Errors that a user can correct, and how the programs report them."""

import os
import sys


class UserError(Exception):
    """An error that the user can correct. Its message, one line, says what is wrong, then what to do."""

    exit_code = 2


class DivergedError(UserError):
    """The loss is not finite. Nothing was saved since the last checkpoint with a finite loss."""

    exit_code = 3


def first_line(error):
    """The first line of an exception's message, at most 160 characters, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def printable(path):
    """A path, which may contain any bytes, as text with escapes for what cannot be printed in one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


def run_program(main, name=None):
    """Call `main()`; print a UserError as `name: error: message` and exit with its code.

    name: of the program (default: the file name in sys.argv[0]). Ctrl-C exits with 130, without a traceback.
    """
    try:
        main()
    except UserError as error:
        name = name or os.path.basename(sys.argv[0])
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has ended, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
