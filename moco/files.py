"""Files and folders that appear under their final name only when they are complete; locks and hashes."""

import contextlib
import errno
import hashlib
import json
import multiprocessing.util
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moco.errors import UserError, printable

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # by which fsync says that what was written is lost
LOCK = ".lock"  # in a folder that one program at a time may write to
BEAT = 5  # seconds between two signs of life of the process that holds a Lock
SILENCE = 30  # seconds without one after which a process of another machine counts as dead


def fsync_path(path):
    """Flush a file or a folder (its list of names) to the disk, if the file system can.

    Raises OSError when the disk fails or is full. That a network, shared or FUSE mount cannot open or flush
    a folder is no error.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in LOST:
            raise


def make_output_folder(path):
    """Make the folder of --output-dir and check that files can be written there. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to --output-dir {path} ({error.strerror}); choose another folder"
        ) from error


def check_free(path, force):
    """Raise UserError unless a file can be made at `path`; with `force` it may replace one."""
    path = Path(path)
    if not os.path.isdir(path.parent):  # unlike Path.is_dir, it answers also for too long a name
        raise UserError(f"the folder {path.parent} does not exist: make it or name another")
    if os.path.isdir(path) or (os.path.lexists(path) and not force):
        raise UserError(f"{path} exists already: name another file, or replace it with --force")


@contextlib.contextmanager
def atomic_file(path, before=None):
    """Give a temporary path beside `path` to write to; on success it is flushed and renamed to `path`.

    before: the name that an old file at `path` gets then; None: it is replaced. On any exception, Ctrl-C
    included, the temporary file is removed and an old file stays as it was.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _set_mode(temporary, 0o666)  # mkstemp makes files that only their owner can read
        fsync_path(temporary)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path, replace=False):
    """Give a temporary folder beside `path` to fill; on success it is renamed to `path`, otherwise removed.

    Raises FileExistsError when `path` is anything but an empty folder, and UserError when another process is
    making it. With `replace` it may be a folder with content, which is removed once the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(
        lock_beside(path),
        lambda holder: (
            f"{holder.process} is making {path} ({holder.program}): wait for it, or name another folder"
        ),
    ):
        if path.exists() and (not path.is_dir() or (not replace and any(path.iterdir()))):
            raise FileExistsError(f"{path} exists already")
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        old = temporary.with_suffix(".old")
        try:
            yield temporary
            _set_mode(temporary, 0o777)
            if replace and path.exists():
                os.replace(path, old)  # a folder that is not empty cannot be renamed over
            try:
                os.replace(temporary, path)
            except OSError as error:
                if path.exists():  # made meanwhile, where there are no locks
                    raise FileExistsError(f"{path} exists already") from error
                raise
            fsync_path(path.parent)
        finally:
            if old.exists() and not path.exists():  # interrupted between the two renames
                os.replace(old, path)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)


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
        descriptor = None
        while descriptor is None:
            descriptor, holder = _try(path, this)
            if descriptor is None and holder and refusal:
                raise UserError(refusal(holder))
            if descriptor is None:
                time.sleep(0.1)
        stop = threading.Event()
        beat = threading.Thread(target=_renew, args=(descriptor, stop), daemon=True)
        self.release = multiprocessing.util.Finalize(
            self, _release, (path, descriptor, beat, stop), exitpriority=0
        )
        beat.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def _try(path, this):
    """(descriptor of the file at `path`, held from now on, or None, the living Holder if that is why)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # left by another user
        descriptor = os.open(path, os.O_RDONLY)
    try:
        obtained, holder = _flock(descriptor), _read_holder(descriptor)
        if not _is_at(descriptor, path):  # its holder has just removed it
            return None, None
        if holder != this:
            if _lives(path, obtained, holder):
                return None, holder or Holder()
            if obtained is False:  # a server keeps the lock of a dead machine
                if _is_at(descriptor, path):
                    path.unlink()
                return None, None
        with contextlib.suppress(OSError):  # it is held also if the disk is full
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(asdict(this)).encode())
        kept, descriptor = descriptor, None
        return kept, None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lives(path, obtained, holder):
    """Whether the Holder that the file names (None: nobody) still runs; obtained: what flock said."""
    if holder is None or holder.machine == _machine():
        return (obtained is False) or (
            obtained is None and holder is not None and _start_of(holder.pid) == holder.start is not None
        )
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


def _renew(descriptor, stop):
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError, TypeError):  # TypeError: a system that cannot by descriptor
            os.utime(descriptor)


def _release(path, descriptor, beat, stop):
    stop.set()
    if beat.ident is not None:  # it was started
        beat.join(BEAT)
    with contextlib.suppress(OSError):  # such as a folder that may no longer be written to
        if _is_at(descriptor, path):
            path.unlink()
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
    """Another text for each machine, and for each time that it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _start_of(pid):
    """When a living process of this machine was started, in the kernel's units; None if there is none."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else numbers[18]
    except (OSError, IndexError):
        return None


def sha256(path):
    """SHA-256 of a file as hexadecimal digits, read in chunks of 1 MiB."""
    return file_hash(path, "sha256")


def file_hash(path, algorithm):
    """Hash of a file by an algorithm that hashlib names, as hexadecimal digits, read in chunks of 1 MiB."""
    digest = hashlib.new(algorithm, usedforsecurity=False)  # md5 is allowed as a checksum everywhere
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _set_mode(path, mode):
    """Give a new file the mode that open() would have given it, where the file system has modes."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # vfat, CIFS, buckets
        os.chmod(path, mode & ~mask)
