"""Decoded pixels in shared memory: those of the files, one copy for a node, refused when too large."""

import os
import signal
import time

import numpy as np
import pytest
import torch.distributed as dist
from forked_program import Program
from PIL import Image

from moco.data import cache as caches
from moco.data.cache import decoded_cache, free_memory
from moco.data.decode import read_pixels
from moco.errors import UserError

COUNT = 2 * caches.PART + 7


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Images of different sizes, as JPEG and PNG."""
    folder, rng = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    names = [folder / f"{number}.{('jpg', 'png')[number % 2]}" for number in range(COUNT)]
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, (10 + number % 5, 12 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    return names


def same_as_files(cache, paths):
    return all(np.array_equal(cache.read(number), read_pixels(path)) for number, path in enumerate(paths))


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_those_of_the_files(paths, capfd, workers):
    cache = decoded_cache(paths, workers=workers)
    assert len(cache) == COUNT
    assert len(cache.memory) == sum(read_pixels(path).size for path in paths)
    assert same_as_files(cache, paths)
    assert not same_as_files(cache, [*paths[15:], *paths[:15]])  # negative control: of the same shapes
    with pytest.raises(ValueError, match="read-only"):
        cache.read(3)[0, 0, 0] = 1
    assert f"KB: {COUNT}/{COUNT} images in" in capfd.readouterr().err


def all_gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def build_in(rank, world, nodes, paths):
    """Whether the cache is right, and whether a process sees what rank 0 then writes to it."""
    local = world // nodes
    cache = decoded_cache(paths, rank, rank % local, local, all_gather, show_progress=False)
    right = same_as_files(cache, paths)
    dist.barrier()
    if rank == 0:
        cache.writable(5)[...] = 77
    dist.barrier()
    return right, bool((cache.read(5) == 77).all())


def test_processes_of_a_node_share_one_copy(run_ranks, paths):
    assert run_ranks(2, build_in, 1, paths) == [(True, True), (True, True)]
    assert run_ranks(2, build_in, 2, paths) == [(True, True), (True, False)]


def message_in(rank, world, paths, free=None):
    if free is not None:
        caches.free_memory = lambda: free
    with pytest.raises(UserError) as caught:
        decoded_cache(paths, rank, rank, world, all_gather, show_progress=False)
    return str(caught.value)


def test_what_one_process_cannot_do_ends_all(run_ranks, paths, tmp_path):
    path = tmp_path / "cut.png"
    whole = paths[1].read_bytes()
    for damage in (whole[:10], whole[:-200]):  # its header, and what is found when it is decoded
        path.write_bytes(damage)
        for at in (0, caches.PART):  # in the first process's share, in the second's
            said = run_ranks(2, message_in, [*paths[:at], path, *paths[at + 1 :]])
            assert said[0] == said[1]
            assert str(path) in said[0]
    said = run_ranks(2, message_in, paths, 60_000)
    assert said == ["--cache decoded needs 63.2 KB and 60 KB of memory are free; leave it out"] * 2


def test_a_file_that_changes_is_named(paths, tmp_path, monkeypatch):
    path = tmp_path / "grows.jpg"
    path.write_bytes(paths[0].read_bytes())
    monkeypatch.setattr(caches, "image_size", lambda path: (12, 11))  # as its header said before
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"grows\.jpg has another size than its header said"):
            decoded_cache([path] * COUNT, workers=workers, show_progress=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nobody_stays_when_making_it_is_interrupted(paths, number, monkeypatch):
    def main(report):
        def slow_pixels(path, gray_range):
            report.write("x\n")
            report.flush()
            time.sleep(0.02)
            return read_pixels(path, gray_range)

        monkeypatch.setattr(caches, "read_pixels", slow_pixels)
        decoded_cache(paths, workers=2)

    program = Program(main)
    while "x" not in program.errors.readline():  # what it says before is that the sizes are known
        pass
    children = f"/proc/{program.pid}/task/{program.pid}/children"
    with open(children) as file:
        program.workers = [int(pid) for pid in file.read().split()]
    assert len(program.workers) == 2
    os.kill(program.pid, number)
    assert program.end()[0] == (130 if number == signal.SIGINT else -number)
    program.clear()


def test_free_memory_is_what_the_control_groups_leave(tmp_path):
    machine = free_memory(tmp_path, "0::/\n")
    assert 2**20 < machine < 2**50
    outer = tmp_path / "job"
    inner = outer / "step"
    inner.mkdir(parents=True)
    for folder, limit in ((outer, "3000000"), (inner, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("1000000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert free_memory(tmp_path, "0::/job/step\n") == 2200000
    assert abs(free_memory(tmp_path, "0::/other\n") - machine) < 2**30
    (inner / "memory.max").write_text("500\n")
    assert free_memory(tmp_path, "4:cpu,memory:/job\n0::/job/step\n") == 0
    assert 0 < free_memory() <= machine + 2**30
