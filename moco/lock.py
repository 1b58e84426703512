"""Locks: a file or folder that one process at a time may use, also of several machines."""

import contextlib
import json
import multiprocessing.util
import os
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moco.errors import UserError, printable

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

LOCK = ".lock"  # in a folder that one program at a time may write to
BEAT = 5  # seconds between two signs of life of the process that holds a Lock
SILENCE = 30  # seconds without one after which a process of another machine counts as dead


def lock_beside(path):
    """The path of the Lock that atomic_folder(path) holds."""
    return Path(path).with_name(f".{Path(path).name}{LOCK}")


@contextlib.contextmanager
def locked(path, reason=None):
    """Hold an exclusive lock (flock) on `path`, a folder or a file that is made if missing, during the block.

    While another process holds it, raises UserError with the sentence `reason`, or without one waits. The
    lock goes with the process, however it ends. File systems without locks do not refuse, and some network
    file systems do not show a lock on a folder to other machines.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _flock(descriptor, wait=reason is None) is False:
            raise UserError(reason)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor, wait=False):
    """Whether the lock was obtained; None where there are no locks, as on Lustre without `-o flock`."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@dataclass(frozen=True)
class Holder:
    """A process that holds a Lock, as it says in the file itself.

    machine: of its start of the machine; start: of the process, by the kernel; program: what it runs and
    since when.
    """

    machine: str = ""
    host: str = ""
    pid: int = 0
    start: str | None = None
    program: str = field(default="it does not say since when", compare=False)

    @classmethod
    def this(cls):
        path = Path(sys.argv[0])
        name = path.parent.name if path.stem == "__main__" else path.name  # of python -m
        program = f"{name} since {time.strftime('%Y-%m-%d %H:%M')}"
        return cls(_machine(), platform.node(), os.getpid(), _start_of(os.getpid()), program)

    @property
    def process(self):
        """In words."""
        if not self.pid:
            return "another process"
        on = "" if self.machine == _machine() else f" on {self.host}"
        return printable(f"process {self.pid}{on}")


class Lock:
    """A file at `path` that says who holds it, in a folder that several machines may write to. It is held
    until `release()`, or until this object or the process ends, however that ends.

    refusal(holder): the sentence of the UserError while a process holds it, a Holder; None: wait. Within a
    process it can be held several times, until the first is released.

    flock decides, where the file system has it, for all machines that it decides for. On the same machine a
    process can be looked for. For one of another machine, whose locks a server may keep when it has died, or
    not know, the time of the file counts: its holder renews it.
    """

    def __init__(self, path, refusal=None):
        path, this = Path(path), Holder.this()
        held, stop = [], threading.Event()  # held: the descriptor of the file, once it is
        beat = threading.Thread(target=_renew, args=(path, held, stop), daemon=True)
        # Before the file is made, so that a signal that ends the process in between leaves none.
        self.release = multiprocessing.util.Finalize(self, _release, (path, held, beat, stop), exitpriority=0)
        while not held:
            holder = _try(path, this, held)
            if holder and refusal:
                raise UserError(refusal(holder))
            if not held:
                time.sleep(0.1)
        beat.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def _try(path, this, held):
    """Append the descriptor of the file at `path` to `held`, or else return the living Holder if that is
    why.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # left by another user
        descriptor = os.open(path, os.O_RDONLY)
    try:
        obtained, holder = _flock(descriptor), _read_holder(descriptor)
        if not _is_at(descriptor, path):  # its holder has just removed it
            return None
        if holder != this:
            if _lives(path, obtained, holder):
                return holder or Holder()
            if obtained is False:  # a server keeps the lock of a dead machine
                if _is_at(descriptor, path):
                    path.unlink()
                return None
        held.append(descriptor)
        with contextlib.suppress(OSError):  # it is held also if the disk is full
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(asdict(this)).encode())
        return None
    finally:
        if not held:
            os.close(descriptor)


def _lives(path, obtained, holder):
    """Whether the Holder that the file names (None: nobody) still runs; obtained: what flock said."""
    if holder is None or obtained is not None and holder.machine == _machine():
        return obtained is False
    if holder.machine == _machine() and holder.start is not None:
        return _start_of(holder.pid) == holder.start
    print(
        f"waiting up to {SILENCE} seconds for a sign of life of {holder.process}, which {printable(path)} "
        "names",
        file=sys.stderr,
        flush=True,
    )
    first, end = _time_of(path), time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(1, BEAT / 5))
        if (now := _time_of(path)) != first:
            return now is not None  # None: it has ended
    return False


def _renew(path, held, stop):
    file = held[0] if os.utime in os.supports_fd else path
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


def _release(path, held, beat, stop):
    stop.set()
    if beat.ident is not None:  # it was started
        beat.join(BEAT)
    if not held:
        return
    descriptor = held[0]
    is_ours = _is_at(descriptor, path)
    if fcntl is None:  # Windows removes no open file
        os.close(descriptor)
    with contextlib.suppress(OSError):  # such as a folder that may no longer be written to
        if is_ours:
            path.unlink()
    if fcntl is not None:
        os.close(descriptor)


def _read_holder(descriptor):
    try:
        return Holder(**json.loads(os.read(descriptor, 4096)))
    except (OSError, ValueError, TypeError):  # empty until its holder has written to it
        return None


def _is_at(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _time_of(path):
    try:
        with open(path, "rb") as file:  # NFS asks the server again when a file is opened
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _machine():
    """Another text for each machine, each time that it was started, and each container, which has processes
    of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _start_of(pid):
    """When a living process of this machine was started, in the kernel's units; None if there is none."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else numbers[18]
    except (OSError, IndexError):
        return None
