"""The slots of a ring in shared memory (moco.ring): what one holds, and which of them are free."""

import gc
import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

PAGE = 4096


class Batch(NamedTuple):
    """N samples: pixels (views, N, *sample), records (views, N), targets (N,) int64."""

    pixels: Any
    records: Any
    targets: Any


@dataclass(frozen=True)
class Layout:
    """What a batch of at most `size` samples looks like.

    sample: the shape of one view, such as (3, 224, 224), whose first axis varies fastest in memory: images
    have interleaved channels, as decoders and resizes make them. record: numpy's dtype of what belongs to a
    view beside its pixels; dtype: that of the pixels.
    """

    views: int
    size: int
    sample: tuple
    record: np.dtype
    dtype: np.dtype = np.dtype(np.uint8)

    @property
    def slot_bytes(self):
        """Bytes of a slot, in whole pages for each array."""
        arrays = self._arrays(self.size)
        return sum(_whole_pages(math.prod(shape) * dtype.itemsize) for shape, dtype in arrays)

    def slot(self, memory, number):
        """The Batch of arrays that slot `number` of the uint8 array `memory` holds."""
        start, arrays = number * self.slot_bytes, []
        for shape, dtype in self._arrays(self.size):
            arrays.append(np.ndarray(shape, dtype, memory, start))
            start += _whole_pages(arrays[-1].nbytes)
        return _batch(*arrays)

    def empty(self, count):
        """A Batch of new arrays for `count` samples."""
        return _batch(*(np.empty(shape, dtype) for shape, dtype in self._arrays(count)))

    def _arrays(self, count):
        pixels = (self.views, count, *self.sample[1:], self.sample[0]), np.dtype(self.dtype)
        records = (self.views, count), np.dtype(self.record)
        return pixels, records, ((count,), np.dtype(np.int64))


class Slots:
    """Which slots are free, being written (or full), and being read; for the main process alone."""

    def __init__(self, count):
        self.count = count
        self.free, self.written, self.read = list(range(count)), set(), deque()

    def take(self):
        """The number of a slot to write to. Raises RuntimeError when the caller still has all of them."""
        for _ in range(len(self.read)):
            number, ended, wait = self.read.popleft()
            if ended():
                self.free.append(number)
            else:
                self.read.append((number, ended, wait))
        if not self.free:
            number, _, wait = self.read[0]
            wait()
            self.read.popleft()
            self.free.append(number)
        number = self.free.pop()  # the last, which the processor's cache may still have
        self.written.add(number)
        return number

    def lend(self, number, ended, wait):
        """A slot is full, and is read until `ended()` is true; `wait()` returns when it is, or raises."""
        self.written.remove(number)
        self.read.append((number, ended, wait))

    def lend_memory(self, number, array):
        """A slot is full, and is read as long as a tensor or an array refers to `array`."""
        owner = weakref.ref(array)

        def wait():
            gc.collect()  # only a cycle may hold it
            if owner() is not None:
                raise RuntimeError("a batch is still in use three batches later; clone what you keep")

        self.lend(number, lambda: owner() is None, wait)

    def abandon(self):
        """Nobody writes any more, and nobody will read what was written."""
        self.free.extend(sorted(self.written))
        self.written.clear()


def _batch(pixels, records, targets):
    return Batch(np.moveaxis(pixels, -1, 2), records, targets)


def _whole_pages(size):
    return -(-size // PAGE) * PAGE
