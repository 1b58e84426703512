"""Files and folders that appear under their final name only when they are whole."""

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path

from moco.errors import UserError


def fsync_path(path):
    """Flush a file or a folder (its list of names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


AHEAD = ".before"  # what names of files go on with that were set aside


def set_aside(paths, say):
    """Give files names that go on with AHEAD, and a number from the second of a name on; say is called with a
    line on it.
    """
    for path in paths:
        names = (f"{path}{AHEAD}{number or ''}" for number in itertools.chain([0], itertools.count(2)))
        os.replace(path, next(name for name in names if not os.path.lexists(name)))
    if paths:
        many = f"{len(paths)} file(s) of another run in {Path(paths[0]).parent}"
        say(f"note: {many} are set aside; their names go on with {AHEAD} now")


def check_free(path, force):
    """Raise UserError unless a file can appear at `path`, with `force` also in place of one that is there."""
    path = Path(path)
    if not os.path.isdir(path.parent):  # unlike Path.is_dir, it answers also for too long a name
        raise UserError(f"the folder {path.parent} does not exist: make it or name another")
    if os.path.isdir(path) or (os.path.lexists(path) and not force):
        raise UserError(f"{path} exists already: name another file, or replace it with --force")


@contextlib.contextmanager
def atomic_file(path, before=None):
    """Give a temporary path in the folder of `path` to write to; on success it is flushed and renamed to
    `path`. before: the name that a file which stood there gets then, or None: it goes.

    On any exception, Ctrl-C included, the temporary file is removed and a file that stood at `path` stays
    as it was.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
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

    Raises FileExistsError when something that is not an empty folder stands at `path`, unless `replace` is
    set: a folder at `path` then stays as it is until the new one is full, and is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (not path.is_dir() or (not replace and any(path.iterdir()))):
        raise FileExistsError(f"{path} exists already")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if replace and path.exists():
            os.replace(path, old)  # a folder that is not empty cannot be renamed over
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        if old.exists() and not path.exists():  # interrupted between the two renames
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path):
    """SHA-256 of a file as hexadecimal digits, read in pieces of 1 MiB."""
    return file_hash(path, "sha256")


def file_hash(path, algorithm):
    """Hash of a file by an algorithm that hashlib names, as hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.new(algorithm, usedforsecurity=False)  # md5 is allowed as a checksum everywhere
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
