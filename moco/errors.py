"""How the programs speak to the person who started them when something is wrong."""

import os
import sys


class UserError(Exception):
    """Something that the user can put right; its message is a sentence that says how."""

    @property
    def sentence(self):
        """The message alone: a DataLoader puts the traceback of its worker before it."""
        last_line = str(self).strip().splitlines()[-1]
        return last_line.removeprefix("moco.errors.UserError: ")


def first_line(error):
    """The first line of what an exception says, at most 160 letters, or its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def run_program(main):
    """Call `main()`. A UserError becomes one sentence (exit code 2), Ctrl-C ends quietly (exit code 130)."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error.sentence}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
