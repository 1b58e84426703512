"""How the programs report what is wrong to the person who started them."""

import os
import re
import sys


class UserError(Exception):
    """Something that the user can put right. The message says what is wrong, then what to do."""

    exit_code = 2

    @property
    def sentence(self):
        """The message without the traceback that a DataLoader puts before a worker's exception."""
        last_line = str(self).strip().splitlines()[-1]
        return re.sub(r"^moco(\.\w+)*\.(User|Diverged)Error: ", "", last_line)


class DivergedError(UserError):
    """The loss is not finite. Nothing was saved since the last checkpoint with a finite loss."""

    exit_code = 3


def first_line(error):
    """The first line of an exception's message, at most 160 characters, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def worker_death(error):
    """The UserError for a RuntimeError by which a DataLoader reports that a worker died, or None for another.

    It is raised in the main thread wherever that is, also outside the loader.
    """
    found = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]*)", str(error))
    if found is None:
        return None
    what = f"data worker {found[1]} {found[2].strip()}"
    return UserError(f"{what}; if it was for want of memory, lower -j or --batch-size")


def printable(path):
    """A path, whose name may hold any bytes, with escapes for what cannot be printed in one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


def run_program(main, name=None):
    """Call `main()`; print a UserError as `name: error: sentence` and exit with its code.

    name: of the program (default: the file name in sys.argv[0]). Ctrl-C exits with 130, without a traceback.
    """
    try:
        main()
    except UserError as error:
        name = name or os.path.basename(sys.argv[0])
        print(f"{name}: error: {error.sentence}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
