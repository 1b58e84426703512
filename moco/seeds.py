"""Seeds from the run's seed and the place of use: (what for, epoch, step or image, ...).

So samples do not depend on the number of workers, and a resumed run is equal to one that never stopped.
"""

import contextlib

import numpy as np
import torch

# What random numbers are for: the first of the numbers that are folded in, so that no two uses share a seed.
ORDER, SAMPLE, STEP, SHUFFLE, REPLACE, BITS = range(6)


def fold(seed, *position):
    """A 63-bit seed for `position` (non-negative ints) of the run `seed`, mixed by numpy's SeedSequence."""
    return int(np.random.SeedSequence((seed, *position)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffle_order(seed, epoch, step, count):
    """The permutation of a step's images for shuffling BatchNorm: (count,) int64, equal on all ranks."""
    generator = torch.Generator().manual_seed(fold(seed, SHUFFLE, epoch, step))
    return torch.randperm(count, generator=generator)


@contextlib.contextmanager
def seeded(seed):
    """Within the block torch's CPU generator starts from `seed`; afterwards it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run_seed(given, checkpoint):
    """The seed `given`, else that of the dict `checkpoint`, else a new one of 31 bits."""
    if given is not None:
        return given
    return checkpoint.get("seed", fold(np.random.SeedSequence().entropy) >> 32)
