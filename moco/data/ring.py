"""Batches that worker processes write into memory which they share with the training process.

torch's DataLoader starts and watches the workers, hands out tasks, keeps the order and carries errors. What
it would do badly is to carry pixels: it makes a new shared file for each batch and copies the batch once
more. Here it carries only slot numbers; the pixels stay in a ring of slots in anonymous shared memory, which
forked workers inherit: no file in /dev/shm, no copy and no page fault per batch.
"""

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco.data.augment import VIEW
from moco.errors import UserError, worker_death
from moco.progress import in_words

PREFETCH = 2  # tasks that a worker has at a time
SMALLEST_TASK = 8  # samples: about 15 ms of work, against a message that costs 0.1 ms
WITHHELD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # from workers: the training process decides
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class Batch(NamedTuple):
    """N samples. pixels: uint8 (views, N, 3, S, S) and targets: int64 (N,), tensors on the loader's device;
    records: array (views, N) of moco.data.augment.VIEW, what was drawn for each view; indices: int64 array
    (N,), the numbers of the images.
    """

    pixels: Any
    targets: Any
    records: Any
    indices: Any


class RingLoader:
    """Makes Batches whose samples `fill` writes, in `workers` forked processes (0: in this one).

    fill(slot, position, key): writes the sample `key` to slot.pixels[:, position], slot.targets[position],
        slot.records[:, position] and slot.indices[position]; slot is a Batch of numpy arrays.
    views, batch_size, size: a batch has at most batch_size samples of `views` views of size x size pixels.
    device: where pixels and targets of a batch are wanted.

    A batch is made by all workers together, in parts, so that the first batch of an epoch takes the time of a
    batch divided by the workers, and few slots are enough. On the CPU its pixels are a view of the ring: they
    are valid until the third batch after it is asked for; clone what you keep. On CUDA the ring is pinned, a
    batch is copied without waiting, and a slot is written to again when its copy has ended.

    Raises UserError for one that a worker raised, when a worker died, and for too large a ring. `transport`
    is a clause about it for the start of a run.
    """

    def __init__(self, fill, views, batch_size, size, workers=0, device="cpu"):
        task = math.ceil(batch_size / max(1, min(workers, batch_size // SMALLEST_TASK)))
        ahead = math.ceil(workers * PREFETCH / math.ceil(batch_size / task))
        slots = ahead + 3  # being made, and: about to be taken, the caller's, the two before that
        try:
            layout = np.dtype(
                [
                    ("targets", "<i8", batch_size),
                    ("indices", "<i8", batch_size),
                    ("pixels", "u1", (views, batch_size, size, size, 3)),  # as decoders and resizes make them
                    ("records", VIEW, (views, batch_size)),
                ],
                align=True,
            )
            self._memory = np.frombuffer(mmap.mmap(-1, slots * layout.itemsize), layout)
        except (OSError, OverflowError, ValueError) as error:  # ValueError: a batch above 2 GB
            raise UserError(
                f"the loader's batches need {in_words(slots * views * batch_size * size**2 * 3)} of memory "
                f"({error}); lower --batch-size, --image-size or -j"
            ) from error
        self.batch_size, self.device, self.slots = batch_size, torch.device(device), slots
        through = f"{in_words(self._memory.nbytes)} of shared memory"
        many = "1 data worker" if workers == 1 else f"{workers} data workers"
        self.transport = f"{many}, batches through {through}" if workers else "no data workers"
        self._arrays = [
            Batch(np.moveaxis(slot["pixels"], -1, 2), slot["targets"], slot["records"], slot["indices"])
            for slot in self._memory
        ]
        self._tasks = _Tasks(batch_size, task, slots)
        self._workers = Workers(_Writer(fill, self._arrays), self._tasks, workers)
        self._epoch = self._taken = 0  # which epoch is the current one; batches given to the caller in all
        self._stream, self._unpin = None, lambda: None

    def epoch(self, batches):
        """An iterator over the Batches of an epoch, whose first tasks are handed out at once.

        batches: an iterable of lists of keys, batch_size in all but the last. It ends an epoch under way.
        """
        self._epoch += 1
        self._tasks.batches, self._tasks.number = batches, self._taken
        answers = iter(self._workers)
        if self.device.type == "cuda" and self._stream is None:
            self._pin()  # when the workers have started, which then know nothing of it
        return self._batches(answers, self._epoch)

    def close(self):
        """End the workers. The loader cannot be used afterwards; batches that were taken stay valid."""
        self._epoch += 1
        self._workers.close()
        self._unpin()

    def _batches(self, answers, epoch):
        while True:
            if epoch != self._epoch:
                raise RuntimeError("this epoch was ended by a later one of the same loader, or by close()")
            whole = next((answer for answer in answers if answer[-1]), None)  # after the last part come all
            if whole is None:
                return
            self._taken += 1
            yield self._batch(*whole[:2])

    def _batch(self, number, count):
        slot = self._arrays[number]
        pixels = torch.from_numpy(self._memory[number]["pixels"])[:, :count]
        targets = torch.from_numpy(slot.targets[:count])
        if self.device.type == "cuda":
            (pixels, targets), self._tasks.copied[number] = _copies((pixels, targets), self._stream)
        else:
            targets = targets.clone()
        records, indices = slot.records[:, :count].copy(), slot.indices[:count].copy()
        return Batch(pixels.permute(0, 1, 4, 2, 3), targets, records, indices)

    def _pin(self):
        self._stream = torch.cuda.Stream(self.device)
        cuda, memory, copied = torch.cuda.cudart(), self._memory, self._tasks.copied
        code = cuda.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        if int(code) != 0:
            print(
                f"note: CUDA cannot pin the loader's {in_words(memory.nbytes)} (error {int(code)}); copies "
                "to the device take longer",
                file=sys.stderr,
                flush=True,
            )
            return
        self._unpin = multiprocessing.util.Finalize(self, _unpin, (cuda, memory, copied))


class Workers:
    """A DataLoader without batching: iterates over dataset[task] for the `tasks`, computed by forked workers.

    The workers live until close(), or until this object or this process ends, however that ends; signals they
    leave to this process. Iterating raises UserError for one that a worker raised and when a worker died.
    """

    def __init__(self, dataset, tasks, workers):
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # torch's own stays where the caller left it
            num_workers=workers,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
        )
        # A process joins its children before it calls what atexit knows, in one that was spawned, and the
        # workers do not hear the SIGTERM that is to end them; a finalizer of this priority comes before.
        self.close = multiprocessing.util.Finalize(self, _end_workers, (self._loader,), exitpriority=100)

    def __iter__(self):
        """Start; the first tasks are handed out before this returns."""
        if not self.close.still_active():
            raise RuntimeError("this loader is closed")
        with worker_errors(), _signals_withheld():
            try:
                answers = iter(self._loader)
            except OSError as error:
                raise UserError(
                    f"the data workers cannot be started ({error}); /dev/shm must be writable and not full "
                    "(docker run --shm-size=1g); -j 0 needs no workers"
                ) from error
        return self._answers(answers)

    @staticmethod
    def _answers(answers):
        while True:
            with worker_errors():
                try:
                    answer = next(answers)
                except StopIteration:
                    return
            yield answer


@contextlib.contextmanager
def worker_errors():
    """Turn what a DataLoader raises for a worker into a UserError: one that it raised, or its death."""
    try:
        yield
    except UserError as error:
        raise type(error)(error.sentence) from None  # without the worker's traceback
    except RuntimeError as error:
        if death := worker_death(error):
            raise death from error
        raise


class _Tasks:
    """The tasks of an epoch: (slot, first position, keys, last), each made when the DataLoader has room.

    number: of the next batch in all, whose slot is number % slots; copied: an event per slot, or None.
    """

    def __init__(self, batch_size, task, slots):
        self.batch_size, self.task, self.slots = batch_size, task, slots
        self.batches, self.number, self.copied = (), 0, [None] * slots

    def __iter__(self):
        count = self.batch_size
        for keys in self.batches:
            if count < self.batch_size or len(keys) > self.batch_size:
                raise ValueError(f"a batch that is not the last has not {self.batch_size} samples")
            count, slot = len(keys), self.number % self.slots
            self.number += 1
            if self.copied[slot] is not None:
                self.copied[slot].synchronize()
            for first in range(0, count, self.task):
                part = keys[first : first + self.task]
                yield slot, first, part, first + len(part) == count


class _Writer(Dataset):
    """Does a task: (slot, samples up to here, whether the batch is complete)."""

    def __init__(self, fill, slots):
        self.fill, self.slots = fill, slots

    def __getitem__(self, task):
        slot, first, keys, last = task
        for position, key in enumerate(keys, first):
            self.fill(self.slots[slot], position, key)
        return slot, first + len(keys), last


@contextlib.contextmanager
def _signals_withheld():
    """Keep signals until the end of the block, and for good from processes that it starts.

    So Ctrl-C finds either no worker or one that can be ended, and ends none with a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WITHHELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the training process
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
        os._exit(0)


def _end_workers(loader):
    answers = loader._iterator
    if answers is None:  # none was started
        return
    # Nobody reads any more what they write, so they may end in the middle of a sample. torch is neither to
    # take that for a failure, nor to wait for locks that they may have held.
    answers._shutdown = True
    if answers._worker_pids_set:
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(answers))
        answers._worker_pids_set = False
    for worker in answers._workers:
        worker.kill()
    for worker in answers._workers:
        worker.join()
    for queue in answers._index_queues:
        queue.cancel_join_thread()


def _copies(tensors, stream):
    """The tensors on the device of `stream`, and an event behind the copies there; nothing waits on the host.

    A stream of their own lets the copies run beside a step that is still being computed.
    """
    with torch.cuda.stream(stream):
        copies = [tensor.to(stream.device, non_blocking=True) for tensor in tensors]
        copied = stream.record_event()
    now = torch.cuda.current_stream(stream.device)
    now.wait_event(copied)
    for copy in copies:
        copy.record_stream(now)  # so that its memory is not taken for the next before the step is over
    return copies, copied


def _unpin(cuda, memory, copied):
    for event in copied:
        if event is not None:
            event.synchronize()
    cuda.cudaHostUnregister(memory.ctypes.data)


def _unchanged(item):
    return item
