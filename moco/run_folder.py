"""The checkpoints of a run in its output folder: which there are, which stay, and which one to go on from."""

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moco.checkpoint import copied, save_checkpoint, tensor_bytes
from moco.checkpoint_reader import read_checkpoint
from moco.errors import UserError
from moco.files import set_aside
from moco.memory import in_words

NAME = re.compile(r"checkpoint_(\d{4,})(?:_(\d{6,}))?\.pth\.tar")


class RunFolder:
    """Files checkpoint_0007.pth.tar for the end of epoch 7 and checkpoint_0008_000120.pth.tar for epoch 8
    after 120 steps.

    keep: how many of the newest epochs stay; save_freq: every such epoch stays besides (0: none). A file
    from within an epoch stays until a newer one is there.
    """

    def __init__(self, path, keep=1, save_freq=0):
        self.path, self.keep, self.save_freq = Path(path), keep, save_freq
        self._under_way = self._newest = None

    def save(self, checkpoint):
        """Write a dict whose `epoch` and `step` say where the run is. Returns the file's path.

        The file may appear there later, until self.wait(), while the run goes on and changes the tensors. The
        one before stays besides those that are kept, as what was trained since is known to be sound only
        when the next is saved. Raises UserError when this one, or the one before, cannot be written.
        """
        epoch, step = checkpoint["epoch"], checkpoint["step"]
        name = f"checkpoint_{epoch:04d}_{step:06d}" if step else f"checkpoint_{epoch - 1:04d}"
        path = self.path / f"{name}.pth.tar"
        try:
            self.tidy()
        except UserError:
            save_checkpoint(checkpoint, path)  # what hindered the one before may be over
            raise
        self._newest = path
        thread = ThreadPoolExecutor(1)  # which Python waits for before it ends
        self._under_way = thread.submit(save_checkpoint, copied(checkpoint), self._newest)
        thread.shutdown(wait=False)
        return self._newest

    def wait(self):
        """Return when no file is being written any more. Raises UserError as save does."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """When something else ends the run, say that the last file could not be written, if it could not."""
        if kind is not None:
            try:
                self.wait()
            except UserError as error:
                print(f"warning: {error.sentence}", file=sys.stderr, flush=True)

    def tidy(self):
        """Remove what need not stay beside the newest of this run, when that is written."""
        self.wait()
        if self._newest is None:
            return
        written = _position(self._newest)
        epochs = [old for old in self.newest_first() if _position(old)[1] == 0 and _position(old) <= written]
        for old in self.newest_first():
            if _position(old) >= written:
                continue
            chosen = self.save_freq and _position(old)[0] % self.save_freq == 0
            if _position(old)[1] or (old not in epochs[: self.keep] and not chosen):
                old.unlink(missing_ok=True)

    def start(self, epoch, step, say):
        """Make the folder that of a run which goes on from `step` of `epoch`.

        Checkpoints beyond are of another course, which --resume auto would take up: they are set
        aside. Half-written files that a killed run left are removed. say: called with a line about it.
        """
        for half in self.path.glob(".checkpoint_*.tmp"):
            half.unlink(missing_ok=True)
        set_aside([path for path in self.newest_first() if _position(path) > (epoch, step)], say)

    def lacks_room(self, checkpoint, epochs):
        """Why a run's checkpoints, each like this one, find no room on the disk, or None."""
        size = tensor_bytes(checkpoint)
        many = min(epochs, self.keep + 1)  # the last one is written before the first of them goes
        many += epochs // self.save_freq if self.save_freq else 0
        there = sum(path.stat().st_size for path in self.newest_first())  # most of it will be removed
        free = shutil.disk_usage(self.path).free + there
        if free >= many * size:
            return None
        return (
            f"the {many} checkpoints that will stand in --output-dir {self.path} at a time take "
            f"{in_words(many * size)}, and {in_words(free)} are free; make room or choose another folder"
        )

    def newest_first(self):
        """The paths of the checkpoints that are there."""
        return sorted(
            (p for p in self.path.glob("checkpoint_*") if _position(p)), key=_position, reverse=True
        )

    def newest_good(self, say):
        """(path, what read_checkpoint gives) of the newest that is whole, or (None, {}) without any.

        say: called with a line about each that is damaged. Raises UserError when all are.
        """
        return first_whole(self.newest_first(), say)


def first_whole(paths, say):
    """(path, what read_checkpoint gives) of the first of the paths that is whole, or (None, {}) of none.

    say: called with a line about each that is damaged. Raises UserError when all are.
    """
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            say(f"warning: {error.sentence}; going back to the one before")
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {paths[0].parent} can be read; remove them to start "
            "anew"
        )
    return None, {}


def _position(path):
    """(finished epochs, steps of the next one) of a checkpoint's name, or None."""
    found = NAME.fullmatch(path.name)
    if found is None:
        return None
    return (int(found[1]), int(found[2])) if found[2] else (int(found[1]) + 1, 0)
