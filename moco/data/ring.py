"""Batches that worker processes write into memory which they share with the training process.

torch's DataLoader would make a new shared file for each batch and copy the batch once more. Here the pixels
stay in a ring of slots in anonymous shared memory, which forked workers inherit: no file in /dev/shm, no copy
and no page fault per batch. Only the samples' keys and the numbers of slots go through pipes. Where there is
no fork, or it is not safe, workers are spawned, and the memory has a name, by which they open it.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import traceback
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np
import torch

from moco.data.augment import VIEW
from moco.errors import UserError, say
from moco.progress import in_words

PREFETCH = 2  # tasks that a worker has at a time
SMALLEST_TASK = 8  # samples: about 15 ms of work, against a message that costs 0.1 ms
WITHHELD = [  # from workers: the training process decides. Not every system has all of them
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class Batch(NamedTuple):
    """N samples. pixels: uint8 (views, N, 3, S, S) and targets: int64 (N,), tensors on the loader's device;
    records: array (views, N) of moco.data.augment.VIEW, what was drawn for each view; indices: int64 array
    (N,), the numbers of the images. Pixels and records of a RingLoader that pads may have more than N.
    """

    pixels: Any
    targets: Any
    records: Any
    indices: Any


class RingLoader:
    """Makes Batches whose samples `fill` writes, in `workers` other processes (0: in this one).

    fill(slot, position, key): writes the sample `key` to slot.pixels[:, position], slot.targets[position],
        slot.records[:, position] and slot.indices[position]; slot is a Batch of numpy arrays. Spawned workers
        get it pickled.
    views, batch_size, size: a batch has at most batch_size samples of `views` views of size x size pixels.
    device: where pixels and targets of a batch are wanted.
    pad: on CUDA pixels and records of every batch have batch_size samples, the batch's own being the first.
        What is compiled for this shape is then not compiled again for a smaller batch.

    All workers make a batch together, in parts, so that the first batch of an epoch takes the time of a batch
    divided by the workers, and few slots are enough. On the CPU a batch's pixels are a view of the ring: they
    are valid until the third batch after it is asked for; clone what you keep. On CUDA the ring is pinned, a
    batch is copied without waiting, and a slot is written to again when its copy has ended.

    Raises UserError for one that a worker raised, when a worker died, and for too large a ring. `transport`
    is a clause about it for the start of a run.
    """

    def __init__(self, fill, views, batch_size, size, workers=0, device="cpu", pad=False):
        self._task = math.ceil(batch_size / max(1, min(workers, batch_size // SMALLEST_TASK)))  # samples
        ahead = math.ceil(workers * PREFETCH / math.ceil(batch_size / self._task))
        self.slots = ahead + 3  # those being made, the one that the caller has, and the two before it
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
            slots = _Slots(layout, self.slots, named=workers and start_method() == "spawn")
        except (OSError, OverflowError, ValueError) as error:  # ValueError: a batch above 2 GB
            raise UserError(
                f"the loader's batches need {in_words(self.slots * views * batch_size * size**2 * 3)} of "
                f"memory ({error}); lower --batch-size, --image-size or -j"
            ) from error
        self._memory, self._arrays = slots.memory, slots.batches
        self.device = torch.device(device)
        self._pad = pad and self.device.type == "cuda"
        self.transport = f"{workers} data worker(s), {in_words(self._memory.nbytes)} of shared memory"
        self._workers = Workers(functools.partial(_write, fill, slots), workers)
        self._epoch = self._taken = 0  # which epoch is the current one; batches given to the caller in all
        self._stream, self._copied = None, [None] * self.slots  # of copies to CUDA; an event per slot
        self._unpin = lambda: None

    def epoch(self, batches):
        """An iterator over the Batches of an epoch, whose first parts are handed out at once.

        batches: an iterable of lists of keys, batch_size in all but the last, which may be empty. It ends an
        epoch under way.
        """
        self._epoch += 1
        answers = self._workers.map(self._tasks(batches))
        if self.device.type == "cuda" and self._stream is None:
            self._pin()  # when the workers have started, which then know nothing of it
        return self._batches(answers, self._epoch)

    def close(self):
        """End the workers. The loader cannot be used afterwards; batches that were taken stay valid."""
        self._epoch += 1
        self._workers.close()
        self._unpin()

    def _tasks(self, batches):
        """The arguments of `_write` for the batches, each made when a worker has room for it."""
        for number, keys in enumerate(batches, self._taken):
            slot = number % self.slots
            if self._copied[slot] is not None:
                self._copied[slot].synchronize()
            for first in range(0, max(len(keys), 1), self._task):  # an empty batch is handed out too
                part = keys[first : first + self._task]
                yield slot, first, part, first + len(part) == len(keys)

    def _batches(self, answers, epoch):
        while True:
            if epoch != self._epoch:
                raise RuntimeError("this epoch was ended by a later one of the same loader, or by close()")
            complete = next(filter(None, answers), None)
            if complete is None:
                return
            self._taken += 1
            yield self._batch(*complete)

    def _batch(self, slot, count):
        arrays = self._arrays[slot]
        samples = len(arrays.targets) if self._pad else count
        pixels = torch.from_numpy(self._memory[slot]["pixels"])[:, :samples]
        targets = torch.from_numpy(arrays.targets[:count])
        if self.device.type == "cuda":
            (pixels, targets), self._copied[slot] = _copies((pixels, targets), self._stream)
        else:
            targets = targets.clone()
        records, indices = arrays.records[:, :samples].copy(), arrays.indices[:count].copy()
        return Batch(pixels.permute(0, 1, 4, 2, 3), targets, records, indices)

    def _pin(self):
        self._stream = torch.cuda.Stream(self.device)
        cuda, memory = torch.cuda.cudart(), self._memory
        code = int(cuda.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        if code == 0:
            self._unpin = multiprocessing.util.Finalize(self, _unpin, (cuda, memory, self._copied))
        else:
            say(
                f"note: CUDA cannot pin the loader's {in_words(memory.nbytes)} (error {code}); copies to the "
                "device take longer",
                sys.stderr,
            )


class _Named(SharedMemory):
    """Shared memory with a name, which is mapped as long as an array on it lives."""

    def __del__(self):
        pass  # SharedMemory's unmaps it, which fails while there are arrays


class _Slots:
    """The ring's slots. memory: array (slots,) of the type `layout`; batches: for each slot the Batch of
    views of its arrays, pixels as (views, N, 3, S, S).

    named: the memory gets a name, or has this one. Only then the object can be pickled: the copy has the
    same memory.
    """

    def __init__(self, layout, count, named=False):
        if named:
            existing = named if isinstance(named, str) else None
            shared = _Named(existing, create=existing is None, size=count * layout.itemsize)
            self.memory, self._name = np.frombuffer(shared.buf, layout, count), shared.name
            if existing is None:
                multiprocessing.util.Finalize(self, shared.unlink, exitpriority=0)
        else:
            self.memory = np.frombuffer(mmap.mmap(-1, count * layout.itemsize), layout)
        self.batches = [
            Batch(np.moveaxis(slot["pixels"], -1, 2), slot["targets"], slot["records"], slot["indices"])
            for slot in self.memory
        ]

    def __reduce__(self):
        return _Slots, (self.memory.dtype, len(self.memory), self._name)


def start_method():
    """How data workers start: by "fork", or "spawn" where there is no fork or, on macOS, it is not safe."""
    return "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"


class Workers:
    """`count` processes that compute `function` (0: this process does), which spawned ones get pickled.

    They live until close(), or until this object or this process ends, however that ends. Signals they leave
    to this process.
    """

    def __init__(self, function, count):
        self.function, self.count = function, count
        self._started = []  # (process, our end of its pipe)
        self._awaited = collections.deque()  # those of _started that owe an answer, in the tasks' order
        # A spawned process joins its children before it calls what atexit knows, and the workers do not hear
        # the SIGTERM that is to end them. A finalizer with this priority is called earlier.
        self.close = multiprocessing.util.Finalize(self, _end, (self._started,), exitpriority=100)

    def map(self, tasks):
        """An iterator over function(task) for each task, in order; the first tasks are handed out at once.

        It ends an iteration under way. Raises UserError for one that a worker raised, and when a worker
        cannot be started or died.
        """
        if not self.close.still_active():
            raise RuntimeError("this loader is closed")
        if self.count == 0:
            return map(self.function, tasks)
        if not self._started:
            self._start()
        while self._awaited:  # by the iteration that ends
            self._receive()
        pairs = zip(itertools.cycle(self._started), tasks)  # noqa: B905, a cycle has no end
        self._hand_out(pairs, PREFETCH * self.count)
        return self._answers(pairs)

    def _answers(self, pairs):
        while self._awaited:
            answer, error = self._receive()
            if error is not None:
                raise error
            self._hand_out(pairs, 1)
            yield answer

    def _hand_out(self, pairs, count):
        for worker, task in itertools.islice(pairs, count):
            process, pipe = worker
            try:
                pipe.send(task)
            except OSError:
                raise _death(process) from None
            self._awaited.append(worker)

    def _receive(self):
        process, pipe = self._awaited.popleft()
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise _death(process) from None

    def _start(self):
        context = multiprocessing.get_context(start_method())
        try:
            with _signals_withheld():
                for _ in range(self.count):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(self.function, theirs), daemon=True)
                    process.start()
                    theirs.close()  # so that the pipe ends when the worker does
                    self._started.append((process, ours))
        except OSError as error:
            _end(self._started)
            raise UserError(
                f"the data workers cannot be started ({error}); lower -j, or use -j 0, which needs none"
            ) from error


def _write(fill, slots, task):
    """Write a part of a batch. Returns (slot, samples of the batch) for its last part, else None."""
    slot, first, keys, last = task
    for position, key in enumerate(keys, first):
        fill(slots.batches[slot], position, key)
    return (slot, first + len(keys)) if last else None


def _work(function, pipe):
    """What a worker runs: it answers each task by (function(task), None) or (None, an exception)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the training process
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
        os._exit(0)
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the training process has ended
            os._exit(0)
        try:
            answer = function(task), None
        except UserError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"in a data worker:\n{traceback.format_exc()}")
        pipe.send(answer)


def _end(workers):
    for process, _ in workers:
        process.kill()  # also in the middle of a sample: nobody reads any more what it writes
    for process, pipe in workers:
        process.join()
        pipe.close()
    workers.clear()


def _death(process):
    process.join()
    code = process.exitcode
    how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
    return UserError(
        f"data worker {process.pid} exited unexpectedly ({how}); if memory ran out, lower -j or --batch-size"
    )


@contextlib.contextmanager
def _signals_withheld():
    """Keep signals until the end of the block, and for good from processes that it starts.

    So Ctrl-C finds either no worker or one that can be ended, and ends none with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # not a Unix
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WITHHELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
