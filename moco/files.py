"""Files and folders that appear under their final name only when they are complete; hashes."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from moco.errors import UserError
from moco.lock import Lock, lock_beside

LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # by which fsync says that what was written is lost


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
