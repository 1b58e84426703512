"""A data set's decoded pixels in memory, one copy for all processes of a node and their workers.

For data that fit: an epoch then costs no reading and no decoding, which is most of a worker's time. The
memory has no name (Linux's memfd_create): nothing is left behind in /dev/shm however the processes end, and
its size is no limit. The first process of a node makes it, the others open it, and all fill it together. How
much it takes is known beforehand, from the headers of the images.
"""

import contextlib
import functools
import mmap
import os
from pathlib import Path

import numpy as np

from moco.data.decode import image_size, read_pixels
from moco.data.ring import Workers
from moco.errors import UserError
from moco.progress import Progress, in_words

PART = 64  # images that a worker decodes at a time
MOST = 0.9  # of the free memory: the rest is for the program itself


class Cache:
    """The pixels of a data set's images, by number."""

    def __init__(self, memory, shapes):
        """memory: uint8 (bytes,); shapes: int64 (N, 3), the height, width and 3 of each image."""
        self.memory, self.shapes = memory, shapes
        self._ends = np.cumsum(shapes.prod(axis=1))

    def __len__(self):
        return len(self.shapes)

    def read(self, index):
        """The pixels of an image: uint8 (H, W, 3), read-only."""
        pixels = self.writable(index)
        pixels.flags.writeable = False
        return pixels

    def writable(self, index):
        """The memory of an image, to be written to: uint8 (H, W, 3)."""
        shape, end = self.shapes[index], self._ends[index]
        return self.memory[end - shape.prod() : end].reshape(shape)


def decoded_cache(
    paths,
    rank=0,
    local_rank=0,
    local_world_size=1,
    all_gather=lambda value: [value],
    workers=0,
    show_progress=True,
    gray_range=None,
):
    """The Cache of the image files `paths`. All processes of a run call it together, with the same paths.

    rank: of this process in the run; local_rank: among the local_world_size processes of its node, whose
    ranks follow each other. all_gather(value): the values of all processes of the run, by rank. workers:
    processes that decode for this one, 0 for none. gray_range: moco.data.decode. Raises UserError, in all
    processes, when one cannot read an image or too little memory is free.
    """

    def of_node(value):
        return all_gather(value)[rank - local_rank :][:local_world_size]

    def share(function, label):
        """function(part) for the parts of `paths` that are this process's share, by its workers."""
        parts = [range(first, min(first + PART, len(paths))) for first in range(0, len(paths), PART)]
        mine, answers = parts[local_rank::local_world_size], []
        progress = Progress(label, sum(map(len, mine)), "images") if show_progress else None
        with contextlib.closing(Workers(function, workers)) as crew, progress or contextlib.nullcontext():
            for part, answer in zip(mine, crew.map(mine), strict=True):
                answers.append((part, answer))
                if progress:
                    progress.update(len(part))
        return answers

    with _all_or_none(all_gather):
        mine = share(functools.partial(_shapes, paths), "sizes of images")
    shapes = np.empty((len(paths), 3), np.int64)
    for answers in of_node(mine):
        for part, values in answers:
            shapes[part.start : part.stop] = values

    size, file = max(1, int(shapes.prod(axis=1).sum())), None
    with _all_or_none(all_gather):
        if local_rank == 0:
            file = _new_memory(size)
    owner, number = of_node((os.getpid(), file))[0]
    with _all_or_none(all_gather):
        try:
            if file is None:
                file = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR)
            cache = Cache(np.frombuffer(mmap.mmap(file, size), np.uint8), shapes)
        except OSError as error:
            raise UserError(
                f"the processes of this node cannot share a cache ({error}); leave out --cache"
            ) from error
        share(functools.partial(_fill, paths, cache, gray_range), f"cache of {in_words(size)}")
    os.close(file)  # the memory stays as long as a process has it mapped
    return cache


def free_memory(cgroup="/sys/fs/cgroup", own=None):
    """Bytes that this process can still take: what the machine has and what its control groups (v2) leave.

    own: the text of /proc/self/cgroup, which names its group. Files that the kernel keeps in memory and would
    give up count as free.
    """
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    own = Path("/proc/self/cgroup").read_text() if own is None else own
    for name in (line[4:] for line in own.splitlines() if line.startswith("0::/")):
        for group in (Path(cgroup, name), *Path(cgroup, name).parents):  # the limit of each holds
            with contextlib.suppress(OSError, ValueError):  # no such file, or the limit is "max"
                limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return max(free, 0)


def _shapes(paths, part):
    sizes = [image_size(paths[index]) for index in part]
    return np.array([(height, width, 3) for width, height in sizes], np.int64)


def _fill(paths, cache, gray_range, part):
    for index in part:
        memory, pixels = cache.writable(index), read_pixels(paths[index], gray_range)
        if pixels.shape != memory.shape:
            raise UserError(
                f"{paths[index]} has another size than its header said, or has just changed; "
                "repair or remove it"
            )
        memory[...] = pixels


def _new_memory(size):
    try:
        free = free_memory()
        if size > MOST * free:
            raise UserError(
                f"--cache decoded needs {in_words(size)} and {in_words(free)} of memory are free; "
                "leave it out"
            )
        file = os.memfd_create("moco")
        os.ftruncate(file, size)
    except (AttributeError, OSError) as error:  # not Linux, or not permitted
        raise UserError(f"no shared memory for --cache ({error}); leave it out") from error
    return file


@contextlib.contextmanager
def _all_or_none(all_gather):
    """A UserError that one process raises inside is raised by all, so that none waits for it."""
    sentence = None
    try:
        yield
    except UserError as error:
        sentence = str(error)
    for raised in all_gather(sentence):
        if raised is not None:
            raise UserError(raised)
