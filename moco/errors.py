"""How the programs speak to the person who started them when something is wrong."""

import os
import sys


class UserError(Exception):
    """Something that the person who started the program can put right. Its message is a sentence that
    says how.
    """


def run_program(main):
    """Call `main()` and exit. A UserError becomes one sentence (exit code 2), Ctrl-C ends quietly (exit
    code 130).
    """
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
