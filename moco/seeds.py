"""Randomness as a function of position: every draw derives from the run's seed and from where it is used.

So a run gives the same samples whatever the number of workers, and continues after a stop as if it had
not stopped.
"""

import contextlib

import numpy as np
import torch

# What a seed is for; folded in first, so that no two uses share a stream.
ORDER, SAMPLE, STEP, SHUFFLE, REPLACE, BITS, RECOLOR = range(7)


def fold(seed, *position):
    """A 63-bit seed for `position` (non-negative ints) of the run `seed`, mixed by numpy's SeedSequence."""
    return int(np.random.SeedSequence((seed, *position)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffle_order(seed, epoch, step, count):
    """The order in which shuffled BatchNorm puts the `count` images of a step: (count,) int64.

    Every process makes it for itself, so that none has to wait for another.
    """
    generator = torch.Generator().manual_seed(fold(seed, SHUFFLE, epoch, step))
    return torch.randperm(count, generator=generator)


@contextlib.contextmanager
def seeded(seed):
    """Within the block torch's CPU generator starts from `seed`; afterwards it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run_seed(given, checkpoint):
    """The seed of a run: the one `given`, that of the run which the dict `checkpoint` continues, or a new
    one.

    A new one has 31 bits, short enough to be typed.
    """
    if given is not None:
        return given
    return checkpoint.get(
        "seed", int(np.random.SeedSequence().generate_state(1, np.uint32)[0] >> np.uint32(1))
    )
