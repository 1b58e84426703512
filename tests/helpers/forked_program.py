"""A program that a test starts, kills and questions, in a process group of its own, with its data workers."""

import atexit
import contextlib
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from moco.errors import run_program

# joblib, once it is imported, has multiprocessing give its semaphores the second of these names.
MADE_BY = re.compile(r"(?:torch_|sem\.loky-)(\d+)[_-]")


def forked(main, outputs=(2,)):
    """Start run_program(main) in a forked process with a process group of its own: (its number, a file to
    read what it writes). outputs: which of 1 and 2 the file is for.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        atexit._clear()  # pytest's would remove the folders of earlier sessions
        atexit.register(multiprocessing.util._exit_function)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a program that ran here before may have set it
        for number, name in ((1, "stdout"), (2, "stderr")):
            if number in outputs:
                os.dup2(write, number)
                setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
        os.close(read)
        os.close(write)
        sys.argv = ["program"]
        code = 1
        try:
            run_program(main)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # else a second one could make this fork go on
                atexit._run_exitfuncs()
            finally:
                os._exit(code)
    os.close(write)
    return pid, os.fdopen(read)


class Program:
    """run_program(main) in a forked process, where torch is imported already; main(report) says on the file
    `report` one line when its workers have started, which are its children then.
    """

    def __init__(self, main):
        self.pid, self.errors = forked(lambda: main(sys.stderr))
        self.errors.readline()
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        self.workers = [int(pid) for pid in children]

    def end(self):
        """The exit code and what it said, when it and every process that shares its errors have ended."""
        watch = threading.Timer(20, os.killpg, (self.pid, signal.SIGKILL))
        watch.start()
        said = self.errors.read()
        in_time = watch.is_alive()
        watch.cancel()
        assert in_time, "the program or one of its workers did not end within 20 s"
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said

    def clear(self):
        """Assert that the workers have ended or do so soon; then nobody of the process group lives."""
        try:
            assert gone_within(5, lambda: not any(map(lives, self.workers)))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def abandoned(before, makers=()):
    """Names in /dev/shm that are not in the set `before` and that no process uses: what was left behind.

    What says that it is of a process which is none of `makers` is left out: a test beside this one may kill
    a program that has spawned, whose semaphores the resource tracker then removes when all tests have ended.
    """
    names = set(os.listdir("/dev/shm")) - before
    made = {name: MADE_BY.match(name) for name in names}
    names = {name for name, by in made.items() if not by or int(by[1]) in makers}
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        with contextlib.suppress(OSError):
            used = maps.read_text()
            names = {name for name in names if f"/dev/shm/{name}" not in used}
    return names & set(os.listdir("/dev/shm"))  # others, of tests beside this one, come and go meanwhile


def gone_within(seconds, is_true):
    """Whether `is_true()` becomes true in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if is_true():
            return True
        time.sleep(0.05)
    return False


def lives(pid):
    """Whether the process exists and is not just waiting for its parent to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
