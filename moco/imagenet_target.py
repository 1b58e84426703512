"""The folder OUT of ImageNet-100: filled as OUT.part by one process at a time, and put in place when full."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from moco.errors import UserError
from moco.files import fsync_path

AGAIN = "run the same command again, and it continues"


@contextlib.contextmanager
def alone(part):
    """Hold the lock of the folder `part`, the file `part`.lock beside it, which is removed at the end.

    Raises UserError when another process holds it.
    """
    lock = part.with_name(f"{part.name}.lock")
    if not part.parent.exists():
        part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(lock, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is making {part.name.removesuffix('.part')} in {part.parent} at this "
                    "moment: wait until it ends, or name another folder"
                ) from None
            # One that ended after our open() has removed the file: a lock on it would protect nothing.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def check_target(out, part, sources, classes, force):
    """Refuse, before anything is written, to replace what this program did not make or has to read."""
    if out.is_mount():
        raise UserError(f"{out} is a mount point, which cannot be replaced: name a new folder in it")
    for source in sources:
        if source == out or out in source.parents or source in out.parents:
            raise UserError(f"{out} and {source}, which is read, lie in each other: name a folder outside")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise UserError(f"{out} exists already: name another folder, or replace it with --force")
        if not holds_only(out, classes):
            raise UserError(f"{out} holds more than ImageNet-100's train/ and val/: remove it yourself")
    if os.path.lexists(part) and not holds_only(part, classes):
        raise UserError(f"{part} is in the way and is not the beginning of {out.name}: move it elsewhere")


def holds_only(folder, classes):
    """Whether `folder` holds nothing but train/ and val/ with folders of `classes` in them."""
    splits = list(folder.iterdir()) if folder.is_dir() else [folder]
    return all(path.name in ("train", "val") and path.is_dir() for path in splits) and all(
        name in classes for path in splits for name in os.listdir(path)
    )


def link_class_folders(source, folder, classes):
    """Make `folder`/wnid a link to `source`/wnid for every class."""
    folder.mkdir(parents=True, exist_ok=True)
    for wnid in classes:
        target = folder / wnid
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        target.symlink_to(source / wnid, target_is_directory=True)


def fill(folder, classes, images, copy, progress):
    """Put `images` into `folder`/wnid/ as links or, with `copy` and out of a tar file, as copies.

    What lies there already with the right size stays, what does not belong there goes.
    """
    for wnid in classes:
        if (folder / wnid).is_symlink():  # of a run without --copy: to write through it would change ImageNet
            (folder / wnid).unlink()
        (folder / wnid).mkdir(parents=True, exist_ok=True)
    wanted = defaultdict(set)
    for image in images:
        wanted[image.wnid].add(image.name)
        target = folder / image.wnid / image.name
        link_to = None if copy or image.path is None else str(image.path)
        if is_there(target, image.size, link_to):
            progress.skip(1)
            continue
        target.unlink(missing_ok=True)
        if link_to:
            target.symlink_to(link_to)
        else:
            with image.open() as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        progress.update()
    for wnid in classes:
        for name in set(os.listdir(folder / wnid)) - wanted[wnid]:
            (folder / wnid / name).unlink()


def is_there(target, size, link_to):
    """Whether `target` is the wanted link, or (`link_to` None) a file of `size` bytes."""
    if link_to or target.is_symlink():
        return target.is_symlink() and os.readlink(target) == link_to
    return target.is_file() and target.stat().st_size == size


def put_in_place(part, out):
    """Rename `part` to `out`. An earlier `out` is deleted only when the new one stands in its place."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent)) / out.name
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
        fsync_path(out.parent)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    finally:
        shutil.rmtree(old.parent)
