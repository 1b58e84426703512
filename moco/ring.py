"""Batches that workers write into shared memory, so that only numbers travel between processes.

torch's DataLoader starts and watches the workers, hands out tasks, keeps the order, and carries errors. What
it would do badly is to carry pixels: it makes a new shared file for each batch and copies the batch once
more. Here the main process owns a ring of slots, each large enough for a batch, in memory that all its
workers share (moco.memory: it has no name, so nothing is left behind however the processes end, and the
size of /dev/shm does not limit it). A task is (slot, first position, keys); a worker writes the samples into
the slot and answers with its number.

A batch is made by all workers together, in pieces, so that the first batch of an epoch takes the time of a
batch divided by the workers, and a few slots are enough. One place knows which are free, the main process,
which chooses the slot when it hands out the first piece of a batch. A slot is free again
- on the CPU, when no tensor refers to its memory any more;
- on CUDA, when the copy to the device has ended, which an event behind the copy tells.
With k pieces in a batch and P pieces handed out at a time, the slots in use when one is wanted are at most
those of the ceil(P / k) batches that are being made, of the one that the caller is about to get, of the one
that it has, and of the one before, to which Python's own enumerate and zip can refer a little longer. With
that many slots none is missing unless the caller keeps older batches; then an error is raised and nothing is
written over.

Where the system has no such memory, the samples go through the workers' pipe: slower, but without shared
memory at all, so that it works in a container whose /dev/shm is too small for torch's own transport.
"""

import math
import multiprocessing

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco.errors import UserError
from moco.memory import SharedMemory, free_memory, in_words
from moco.slots import Batch, Slots
from moco.workers import Crew, ctrl_c_later, worker_errors

SMALL_PIECE = 8  # samples: 15 ms of work or more, against a message that costs 0.1 ms


class RingLoader:
    """An iterable of Batches whose samples `fill` writes; each iteration is an epoch.

    fill(batch, position, key): writes the sample `key` to batch.pixels[:, position], .records[:, position]
        and .targets[position] of a Batch of numpy arrays; picklable unless the workers are forked.
    batch_sampler: gives lists of keys, layout.size in all but the last; iterated once per epoch, in this
        process, some batches ahead.
    layout: a Layout. workers: 0 makes the batches in this process. prefetch: pieces that a worker has at a
        time. device: where pixels and targets are wanted; for CUDA the ring is pinned and read by copies
        that do not wait. context: "fork", "spawn", "forkserver", or None for the system's way.

    In what it gives, pixels is a tensor, records a numpy array and targets a tensor. On the CPU the pixels
    lie in the ring: let go of a batch, or clone it, before you take the third after it.
    `transport` says how batches travel. Raises UserError for what a worker raised as such, when a worker
    died, and when there is too little memory.
    """

    def __init__(self, fill, batch_sampler, layout, workers, device, *, prefetch=2, context=None):
        self.batch_sampler, self.layout, self.device = batch_sampler, layout, device
        self.num_workers = workers
        piece = math.ceil(layout.size / max(1, min(workers, layout.size // SMALL_PIECE)))
        if workers:
            _check_semaphores(context)
        ahead = math.ceil(workers * prefetch / math.ceil(layout.size / piece))
        slots = ahead + 3
        self._memory, self.transport = _ring_memory(slots * layout.slot_bytes, workers)
        self._slots = Slots(slots) if self._memory else None
        self._crew = Crew()
        self._loader = DataLoader(
            _Writer(fill, layout, self._memory),
            batch_size=None,
            sampler=_Tasks(batch_sampler, layout.size, piece, self._slots),
            collate_fn=_unchanged,
            generator=torch.Generator(),  # torch's own stays where the caller left it
            num_workers=workers,
            worker_init_fn=self._crew.start,
            multiprocessing_context=context if workers else None,
            persistent_workers=workers > 0,
            prefetch_factor=prefetch if workers else None,
        )
        self._epoch = 0  # which iteration is the current one
        self._pinned = False

    def __len__(self):
        return len(self.batch_sampler)

    @property
    def memory_bytes(self):
        """Bytes of the ring: slots x layout.slot_bytes; 0 without a ring."""
        return self._memory.size if self._memory else 0

    def __iter__(self):
        """Start an epoch; its first tasks are handed out before this returns. It ends one under way."""
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        self._epoch += 1
        with worker_errors(), ctrl_c_later():
            answers = iter(self._loader)
        if self._memory and self.device.type == "cuda" and not self._pinned:
            self._pin()  # after the workers have started, which then know nothing of it
        return self._batches(answers, self._epoch)

    def close(self):
        """End the workers. The loader cannot be used afterwards; batches that were taken stay valid."""
        self._crew.end()
        self._loader = None
        if self._pinned:
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self._memory.array.ctypes.data)
            self._pinned = False

    def __del__(self):
        if hasattr(self, "_pinned"):  # __init__ came to its end
            self.close()

    def _batches(self, answers, epoch):
        pieces = []
        while True:
            if epoch != self._epoch or self._loader is None:
                raise RuntimeError("this epoch was ended by a later one of the same loader, or by close()")
            with worker_errors():
                piece, last = next(answers, (None, False))
            if piece is None:
                return
            pieces.append(piece)
            if last:
                pieces, whole = [], pieces
                # Nothing here may keep the batch: its slot is free when the caller lets go of it.
                yield self._from_slot(*whole[-1]) if self._slots else self._from_pieces(whole)

    def _from_slot(self, number, count):
        slot = self.layout.slot(self._memory.array, number)
        records = slot.records[:, :count].copy()
        if self.device.type == "cuda":
            pixels, targets = self._moved(slot.pixels[:, :count]), self._moved(slot.targets[:count])
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
            self._slots.lend(number, copied.query, copied.synchronize)
        else:
            pixels = torch.from_numpy(slot.pixels)[:, :count]
            targets = torch.from_numpy(slot.targets[:count].copy())
            self._slots.lend_memory(number, slot.pixels)
        return Batch(pixels, records, targets)

    def _from_pieces(self, pieces):
        pixels, records, targets = zip(*pieces, strict=True)
        pixels, targets = np.concatenate(pixels, 1), np.concatenate(targets)
        return Batch(self._moved(pixels), np.concatenate(records, 1), self._moved(targets))

    def _moved(self, array):
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _pin(self):
        code = torch.cuda.cudart().cudaHostRegister(self._memory.array.ctypes.data, self._memory.size, 0)
        if int(code) != 0:
            raise UserError(
                f"CUDA cannot pin the {in_words(self._memory.size)} of the loader's ring ({code}); "
                "lower --batch-size or -j"
            )
        self._pinned = True


class _Writer(Dataset):
    """What workers hold. A task (slot, first position, keys, last) becomes (piece, last).

    A piece is (slot, samples up to here) with a ring, a Batch of the samples without.
    """

    def __init__(self, fill, layout, memory):
        self.fill, self.layout, self.memory = fill, layout, memory

    def __getitem__(self, task):
        slot, first, keys, last = task
        if self.memory is None:
            batch, first = self.layout.empty(len(keys)), 0
        else:
            batch = self.layout.slot(self.memory.array, slot)
        for position, key in enumerate(keys, first):
            self.fill(batch, position, key)
        return (batch if self.memory is None else (slot, first + len(keys))), last


class _Tasks:
    """The tasks of an epoch, each made when the DataLoader has room for it."""

    def __init__(self, batches, size, piece, slots):
        self.batches, self.size, self.piece, self.slots = batches, size, piece, slots

    def __iter__(self):
        # The DataLoader asks for the first task when every worker has confirmed that it is done with the
        # epoch before: nobody writes now.
        if self.slots:
            self.slots.abandon()
        length = self.size
        for keys in self.batches:
            if length < self.size or len(keys) > self.size:
                raise ValueError(f"a batch that is not the last has not {self.size} samples")
            length = len(keys)
            slot = self.slots.take() if self.slots else None
            for first in range(0, length, self.piece):
                part = keys[first : first + self.piece]
                yield slot, first, part, first + len(part) == length


def _check_semaphores(context):
    """Raise UserError when workers cannot have the semaphores of their queues, before anything is started."""
    try:
        multiprocessing.get_context(context).Lock()
    except OSError as error:
        raise UserError(
            f"the data workers cannot be started ({error}); /dev/shm must be writable and not full "
            "(docker run --shm-size=1g); -j 0 needs no workers"
        ) from error


def _ring_memory(size, workers):
    """Memory of the ring or None, and a text that says how batches travel. Raises UserError."""
    free = free_memory()
    if size > free:
        raise UserError(
            f"the loader's batches need {in_words(size)} and {in_words(free)} of memory are free; "
            "lower --batch-size, --image-size or -j"
        )
    if workers == 0:
        return None, "batches are made in the training process"
    try:
        return SharedMemory(size), f"batches travel through {in_words(size)} of shared memory"
    except OSError as error:
        return None, f"batches travel through pipes, which is slower: no shared memory here ({error})"


def _unchanged(item):
    return item
