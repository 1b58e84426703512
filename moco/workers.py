"""How data workers start and end, and what the main process says when one of them fails."""

import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time

import torch

from moco.errors import UserError
from moco.memory import SharedMemory


class Crew:
    """The workers of one DataLoader: `start` is its worker_init_fn, `end` lets them go at once.

    Workers leave signals to the main process, and so do not hear the SIGTERM by which a DataLoader and
    Python's exit end the last of them: Python then waits for ever where a loader lives until the program's
    end, as when a global name or an exception refers to it. Therefore a worker leaves by itself, in the
    middle of a sample if need be, when it is told to by a byte of shared memory and when its parent is gone.
    """

    def __init__(self):
        try:
            self._over = SharedMemory(1)
        except OSError:  # then they obey SIGTERM
            self._over = None
        self._owner = os.getpid()
        atexit.register(self.end)  # later than multiprocessing's own, and so called earlier

    def start(self, _):
        """What a worker does first."""
        # Ctrl-C and a scheduler's signals reach the whole process group, but the training process is to
        # stop in its own time: with a checkpoint, and with workers until then.
        for number in (signal.SIGINT, signal.SIGUSR1, *([signal.SIGTERM] if self._over else [])):
            signal.signal(number, signal.SIG_IGN)
        torch.set_num_threads(1)
        threading.Thread(target=self._leave_in_time, daemon=True).start()

    def end(self):
        """Tell the workers to leave; they do within a fifth of a second. Nothing they gave is to be used."""
        atexit.unregister(self.end)
        if self._over and os.getpid() == self._owner:  # a forked copy of the loader may be deleted or exit
            self._over.array[0] = 1

    def _leave_in_time(self):
        # The DataLoader's own watch over its parent looks between tasks only, every five seconds, and never
        # while an answer is stuck in a full pipe. Two ways to look at the parent, for either can miss its
        # end: the first (a pipe's) when a later child has inherited the pipe and lives on, the second when
        # the parent was gone before this thread began.
        parent, adopter = multiprocessing.parent_process(), os.getppid()
        while parent.is_alive() and os.getppid() == adopter and not (self._over and self._over.array[0]):
            time.sleep(0.2)
        os._exit(0)


@contextlib.contextmanager
def ctrl_c_later():
    """Keep Ctrl-C until the end of the block, and for good from processes that it starts: a worker that is
    only being started, and does not ignore it yet, would end with a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def worker_errors():
    """Turn what a DataLoader raises for its workers into a UserError of one sentence, where it is one.

    That is a UserError which a worker raised, and the death of a worker. The latter is raised in the main
    thread wherever that is at the moment, also outside the loader: a program puts all of its loop in here.
    """
    try:
        yield
    except UserError as error:
        raise UserError(error.sentence) from None  # without the worker's traceback
    except RuntimeError as error:
        found = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
        if found is None:
            raise
        how = found[2].split(". ")[0].strip(" .")
        raise UserError(
            f"data worker {found[1]} {how}; if it was for want of memory, lower -j or --batch-size"
        ) from error
