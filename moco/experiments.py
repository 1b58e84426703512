"""What experiments on shortcuts change in the views of a training step: random bits, and colors at random."""

from moco.random_bits import TRAIN, bits_of, with_channels, with_input_channels
from moco.recolor import check_white, colors_of, recolored


class Experiments:
    """Gives each view a color of its own (`recolor`), and both views of an image its random bits (`bits`).

    Without either, views stay as they are. folder: of the images; batches: the EpochBatches that say which of
    them a step has, set before the first. Raises UserError unless those to `recolor` are Trifeature's in
    white.
    """

    def __init__(self, bits=0, recolor=False, seed=0, folder=None, batches=None):
        self.bits, self.recolor, self.seed, self.batches = bits, recolor, seed, batches
        self._epoch = self._indices = None
        if recolor:
            check_white(folder)

    def widened(self, construct):
        """The callable `construct`, (num_classes) -> network, of networks that take the views as they are."""
        return with_input_channels(construct, self.bits)

    def __call__(self, views, step):
        """views: two float32 (N, 3, H, W) of the sampler's epoch and this `step`; two (N, 3 + bits, H, W)."""
        if not self.bits and not self.recolor:
            return views
        epoch = self.batches.epoch
        if self._epoch != epoch:  # the order of a large data set takes a while
            self._epoch, self._indices = epoch, self.batches.indices()
        indices = self._indices[step].tolist()
        if self.recolor:
            views = [recolored(v, colors_of(self.seed, epoch, n, indices)) for n, v in enumerate(views)]
        if self.bits:
            values = bits_of(self.seed, TRAIN, indices, self.bits).to(views[0].device)
            views = [with_channels(view, values) for view in views]
        return views
