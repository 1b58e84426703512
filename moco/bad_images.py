"""What training does about an image that cannot be read: stop, or take another one in its place and say so.

Which one that is derives from the run's seed, the epoch and the image: so a run with damaged files is
repeated and continued like any other, whatever the number of workers and processes.
"""

import numpy as np

from moco.distributed import everybodys
from moco.errors import UserError
from moco.memory import SharedMemory
from moco.seeds import REPLACE, fold

TRIES = 100  # images that may be bad one after the other: with half of all, never; without the disk, soon


class BadImages:
    """`--on-bad-image`: how a process of a run and its workers read training images.

    how: "error" or "skip". count: how many images there are; seed: the run's. Workers tell which images were
    bad in a byte of shared memory for each. Raises UserError where there is none.
    """

    def __init__(self, how="error", count=0, seed=0):
        self.count, self.seed, self._bad = count, seed, None
        if how == "skip":
            try:
                self._bad = SharedMemory(count)
            except OSError as error:
                raise UserError(f"--on-bad-image skip needs shared memory ({error}); leave it out") from error

    def read(self, photographs, epoch, index):
        """(number of the image that is taken for `index`, its pixels) from a moco.samples.Photographs.

        Raises UserError that names the file of a bad image, with "skip" only when TRIES others are bad too.
        """
        taken = index
        for attempt in range(TRIES + 1):
            try:
                return taken, photographs.pixels(taken)
            except UserError as error:
                if self._bad is None:
                    raise
                self._bad.array[taken] = 1
                sentence = error.sentence
            taken = fold(self.seed, REPLACE, epoch, index, attempt) % self.count
        raise UserError(
            f"{photographs.paths[index]} cannot be read, nor can {TRIES} images drawn in its place, at last: "
            f"{sentence} (python -m moco.check names all)"
        )

    def lines(self, epoch, paths):
        """Lines that name what was bad since the last call; all processes call it together after an epoch.

        paths: of the images, by number. All processes get the same lines, none when every image was read.
        """
        if self._bad is None:
            return []
        mine = np.flatnonzero(self._bad.array).tolist()
        self._bad.array[:] = 0  # no worker writes between two epochs
        bad = sorted(set().union(*everybodys(mine)))
        if not bad:
            return []
        many = "1 image could not be read; another was" if len(bad) == 1 else (
            f"{len(bad)} images could not be read; others were"
        )  # fmt: skip
        return [f"epoch {epoch}: {many} taken instead:", *(f"  {paths[index]}" for index in bad)]
