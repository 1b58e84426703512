"""Images in shared memory: what is read from it, who shares it, and what is said when it cannot be made."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked_program import Program
from PIL import Image

from moco import cache as caches
from moco.cache import build, build_on_device
from moco.decoders import decode_pillow, read_pixels
from moco.distributed import Process
from moco.errors import UserError

COUNT = 2 * caches.PART + 7


def process(rank=0, world=1, nodes=1):
    """A rank of `world`, which are spread over `nodes`; several have one core each, and so no workers."""
    local = world // nodes
    return Process(rank, world, rank % local, local, 1 if world == 1 else 10**6, torch.device("cpu"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Images of different sizes, as JPEG and PNG."""
    folder, rng = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    names = [folder / f"{number}.{('jpg', 'png')[number % 2]}" for number in range(COUNT)]
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, (10 + number % 5, 12 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    return names


def same_as_files(cache, paths, shift=0):
    return all(
        np.array_equal(cache.read(number), read_pixels(paths[(number + shift) % COUNT], decode_pillow))
        for number in range(len(paths))
    )


def test_decoded_pixels_and_files(paths, capfd):
    decoded = build(paths, "decoded", process(), decode_pillow)
    assert len(decoded) == COUNT
    assert decoded.bytes == decoded.memory.size == sum(read_pixels(p, decode_pillow).size for p in paths)
    assert same_as_files(decoded, paths)
    assert not same_as_files(decoded, paths, shift=15)
    with pytest.raises(ValueError, match="read-only"):
        decoded.read(3)[0, 0, 0] = 1

    files = build(paths, "files", process(), decode_pillow)
    assert files.bytes == sum(path.stat().st_size for path in paths)
    assert [files.read(number) for number in range(COUNT)] == [path.read_bytes() for path in paths]
    assert f"KB: {COUNT}/{COUNT} images in" in capfd.readouterr().err


def build_in(rank, world, nodes, paths):
    """Whether the cache is right, and whether a process sees what rank 0 then writes to it."""
    cache = build(paths, "decoded", process(rank, world, nodes), decode_pillow)
    right = same_as_files(cache, paths)
    dist.barrier()
    if rank == 0:
        cache.place(5)[...] = 77
    dist.barrier()
    return right, bool((cache.read(5) == 77).all())


def test_processes_of_a_node_share_one_copy(run_ranks, paths):
    assert run_ranks(2, build_in, 1, paths) == [(True, True), (True, True)]
    assert run_ranks(2, build_in, 2, paths) == [(True, True), (True, False)]


def message_in(rank, world, paths):
    with pytest.raises(UserError) as caught:
        build(paths, "decoded", process(rank, world), decode_pillow)
    return caught.value.sentence


def test_an_image_that_one_process_cannot_read_ends_all(run_ranks, paths, tmp_path):
    path = tmp_path / "cut.png"
    whole = paths[1].read_bytes()
    for damage in (whole[:10], whole[:-200]):  # its header, and what is found when it is decoded
        path.write_bytes(damage)
        for at in (0, caches.PART):  # in the first process's share, in the second's
            said = run_ranks(2, message_in, [*paths[:at], path, *paths[at + 1 :]])
            assert said[0] == said[1]
            assert str(path) in said[0]


def test_a_file_that_changes_is_named(paths, tmp_path):
    path = tmp_path / "grows.jpg"
    path.write_bytes(paths[0].read_bytes())

    def decode(data):  # gives more lines than the header says
        return np.concatenate([decode_pillow(data)] * 2)

    with pytest.raises(UserError, match=r"grows\.jpg is not as large as it says"):
        build([path], "decoded", process(), decode)


def test_too_little_memory_is_told_before_it_is_taken(paths, monkeypatch):
    monkeypatch.setattr(caches, "SharedMemory", None)  # nobody is to ask for it
    monkeypatch.setattr(caches, "free_memory", lambda: 60_000)
    numbers = r"needs 63\.2 KB and 60 KB of memory are free"
    with pytest.raises(UserError, match=f"--cache decoded {numbers}; leave it out"):
        build(paths, "decoded", process(), decode_pillow)
    monkeypatch.setattr(caches, "_file_size", lambda path: 100)
    with pytest.raises(UserError, match=rf"decoded {numbers}; use --cache files \(13\.5 KB\), or leave"):
        build(paths, "decoded", process(), decode_pillow)
    monkeypatch.setattr(caches, "free_memory", lambda: 14_000)
    with pytest.raises(UserError, match=r"files needs 13\.5 KB and 14 KB of memory are free; leave it"):
        build(paths, "files", process(), decode_pillow)
    monkeypatch.setattr(caches, "free_memory", lambda: 3_000)
    with pytest.raises(UserError, match=r"--cache device needs .* are free on cpu"):
        build_on_device(paths[::15], process(), decode_pillow)


def test_pixels_on_the_device(paths):
    equal = paths[::15]  # sizes repeat after 15
    pixels = build_on_device(equal, process(), decode_pillow)
    assert pixels.shape == (len(equal), 3, 10, 12)
    assert pixels.dtype == torch.uint8
    for image, path in zip(pixels, equal, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), read_pixels(path, decode_pillow))
    with pytest.raises(UserError, match=r"one size, but .*0\.jpg is 12 x 10 and .*1\.png is 13 x 11"):
        build_on_device(paths, process(), decode_pillow)


def slow_decode(data):
    time.sleep(0.02)
    return decode_pillow(data)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nobody_stays_when_making_it_is_interrupted(paths, number, monkeypatch):
    def main(report):
        def decode(data):
            report.write("x\n")
            report.flush()
            return slow_decode(data)

        build(paths, "decoded", process(), decode)

    monkeypatch.setattr(Process, "cores", 2)
    program = Program(main)
    # What it says first is that the sizes are known, then its workers decode.
    while "x" not in program.errors.readline():
        pass
    children = f"/proc/{program.pid}/task/{program.pid}/children"
    with open(children) as file:
        program.workers = [int(pid) for pid in file.read().split()]
    assert len(program.workers) == 2
    os.kill(program.pid, number)
    assert program.end()[0] == (130 if number == signal.SIGINT else -number)
    program.clear()
