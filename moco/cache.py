"""A data set in memory: decoded pixels or the bytes of its files, once for all processes of a node.

For data that fit: then an epoch after the first costs no reading, and with decoded pixels no decoding
either, which is most of what is left of a worker's time. The processes of a node and their workers share one
copy in memory without a name (moco.memory); the first process makes it, the others open it, and all fill it
together. How much it takes is known beforehand from the headers of the images or the sizes of the files.
"""

import contextlib
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco.decoders import image_size, read_bytes, read_pixels
from moco.distributed import everybodys
from moco.errors import UserError
from moco.memory import SharedMemory, free_memory, in_words
from moco.progress import Progress
from moco.workers import Crew, ctrl_c_later, worker_errors

KINDS = ("decoded", "files")
PART = 64  # images that a worker does at a time
MOST = 0.9  # of what is free: the rest is for the program itself


class Cache:
    """The images of a data set by number. It is pickled only to a process that is being started."""

    def __init__(self, memory, shapes):
        """shapes: int64 (N, 3) of height, width, 3 or (N, 1) of bytes."""
        self.memory, self.shapes = memory, shapes
        self.ends = np.cumsum(shapes.prod(axis=1))

    def __len__(self):
        return len(self.shapes)

    @property
    def bytes(self):
        """Shared memory that it takes, in all processes of the node together."""
        return int(self.ends[-1])

    def read(self, index):
        """An image: uint8 (H, W, 3) that cannot be written to, or the bytes of its file."""
        place = self.place(index)
        if place.ndim == 1:
            return place.tobytes()
        place.flags.writeable = False
        return place

    def place(self, index):
        """The memory of an image, uint8 of its shape, to be written to."""
        shape = self.shapes[index]
        end = self.ends[index]
        return self.memory.array[end - shape.prod() : end].reshape(shape)


def build(paths, kind, process, decode):
    """A Cache of the image files `paths`; all processes of the run call it together.

    kind: "decoded" or "files"; decode: a decoder (moco.decoders). Raises UserError, in all processes, when
    an image cannot be read or the memory that is free is not enough.
    """
    return _filled(paths, kind, _shapes(paths, kind, process), process, decode)


def build_on_device(paths, process, decode):
    """The pixels of images of one size on process.device: uint8 (N, 3, H, W); all processes call it together.

    They pass through a Cache in shared memory, which is gone afterwards. Raises UserError when the images
    are not all of one size, or there is too little memory on the device or beside it.
    """
    shapes = _shapes(paths, "decoded", process)
    different = (shapes != shapes[0]).any(axis=1)
    if different.any():
        other = int(different.argmax())
        (height, width, _), (other_height, other_width, _) = shapes[0], shapes[other]
        raise UserError(
            f"--cache device needs images of one size, but {paths[0]} is {width} x {height} and "
            f"{paths[other]} is {other_width} x {other_height}; use --cache decoded"
        )
    device, needed = process.device, int(shapes.prod(axis=1).sum())
    with _all_or_none():
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:  # a copy for each process, and the shared one that they are made from
            free, needed = free_memory(), needed * (1 + process.host_processes)
        if needed > MOST * free:
            raise UserError(
                f"--cache device needs {in_words(needed)} and {in_words(free)} are free on {device}; "
                "use --cache decoded, or leave it out"
            )
    cache = _filled(paths, "decoded", shapes, process, decode)
    height, width, _ = shapes[0]
    images = cache.memory.array.reshape(-1, height, width, 3)
    pixels = torch.empty((len(paths), 3, height, width), dtype=torch.uint8, device=device)
    for first in range(0, len(paths), PART):
        part = torch.from_numpy(images[first : first + PART])
        pixels[first : first + PART] = part.to(device).permute(0, 3, 1, 2)
    return pixels


class _Shapes(Dataset):
    def __init__(self, paths, kind):
        self.paths, self.kind = paths, kind

    def __getitem__(self, part):
        return part, np.array([self._shape(self.paths[index]) for index in part], np.int64)

    def _shape(self, path):
        if self.kind == "decoded":
            width, height = image_size(path)
            return height, width, 3
        return (_file_size(path),)


class _Fill(Dataset):
    def __init__(self, paths, cache, decode):
        self.paths, self.cache, self.decode = paths, cache, decode

    def __getitem__(self, part):
        for index in part:
            path, place = self.paths[index], self.cache.place(index)
            if place.ndim == 1:
                found = np.frombuffer(read_bytes(path), np.uint8)
            else:
                found = read_pixels(path, self.decode)
            if found.shape != place.shape:
                raise UserError(f"{path} is not as large as it says, or has just changed; mend or remove it")
            place[...] = found
        return part, None


def _shapes(paths, kind, process):
    """What the images take: int64 (N, 3) or (N, 1), see Cache."""
    with _all_or_none():
        mine = _spread(_Shapes(paths, kind), len(paths), process, "sizes of images")
    shapes = np.empty((len(paths), 3 if kind == "decoded" else 1), np.int64)
    for answers in _gathered(mine, process):
        for part, values in answers:
            shapes[part.start : part.stop] = values
    return shapes


def _filled(paths, kind, shapes, process, decode):
    needed = max(1, int(shapes.prod(axis=1).sum()))
    memory = None
    with _all_or_none():
        if process.local_rank == 0:
            memory = _new_memory(needed, kind, paths)
    address = _gathered(memory and memory.address, process)[0]
    with _all_or_none():
        if memory is None:
            try:
                memory = SharedMemory.attach(address, needed)
            except OSError as error:
                raise UserError(
                    f"the processes of this node cannot share a cache ({error}); leave out --cache"
                ) from error
        cache = Cache(memory, shapes)
        _spread(_Fill(paths, cache, decode), len(paths), process, f"cache of {in_words(needed)}")
    return cache


def _new_memory(needed, kind, paths):
    free = free_memory()
    if needed > MOST * free:
        files = sum(map(_file_size, paths))
        instead = f"use --cache files ({in_words(files)}), or " if files <= MOST * free else ""
        raise UserError(
            f"--cache {kind} needs {in_words(needed)} and {in_words(free)} of memory are free; "
            f"{instead}leave it out"
        )
    try:
        return SharedMemory(needed)
    except OSError as error:
        raise UserError(f"no shared memory for --cache ({error}); leave it out") from error


def _spread(work, count, process, label):
    """What `work`, a Dataset of ranges, makes of this process's share of range(count), by its workers."""
    parts = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
    parts = parts[process.local_rank :: process.local_world_size]
    crew = Crew()
    loader = DataLoader(
        work,
        batch_size=None,
        sampler=parts,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        num_workers=process.cores if min(process.cores, len(parts)) > 1 else 0,
        worker_init_fn=crew.start,
    )
    answers = []
    progress = Progress(label, sum(map(len, parts)), "images") if process.is_first else None
    try:
        with worker_errors(), progress or contextlib.nullcontext():
            with ctrl_c_later():
                coming = iter(loader)
            for answer in coming:
                answers.append(answer)
                if progress:
                    progress.update(len(answer[0]))
    finally:
        crew.end()
    return answers


@contextlib.contextmanager
def _all_or_none():
    """A UserError that one process raises inside is raised by all: none waits for one that has given up."""
    sentence = None
    try:
        yield
    except UserError as error:
        sentence = error.sentence
    for raised in everybodys(sentence):
        if raised is not None:
            raise UserError(raised)


def _gathered(value, process):
    """The `value` of each process of this node."""
    first = process.rank - process.local_rank
    return everybodys(value)[first : first + process.local_world_size]


def _file_size(path):
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend or remove it") from error


def _unchanged(item):
    return item
