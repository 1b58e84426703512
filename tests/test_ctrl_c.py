"""Ctrl-C while workers are being started, and while an export is half-written."""

import contextlib
import os
import signal

import pytest
import torch
from conftest import make_folders
from export_models import write_checkpoint
from forked_program import Program
from test_ring import Numbers, ring
from torch.utils.data._utils import worker

import moco.ring
from moco import cache, check_files, export, files
from moco.decoders import decode_pillow
from moco.distributed import Process


def loads(_):
    list(ring(2, Numbers(10**6, 20)))


def caches(paths):
    cache.build(paths, "decoded", Process(0, 1, 0, 1, 1, torch.device("cpu")), decode_pillow)


def checks(paths):
    check_files.read_all(paths, "images", 2)


@pytest.mark.parametrize(
    ("module", "work"), [(moco.ring, loads), (cache, caches), (check_files, checks)], ids=lambda x: x.__name__
)
def test_workers_that_are_being_started(tmp_path, monkeypatch, module, work):
    """The terminal's signal comes to a worker before our first line there, and to the program then."""
    make_folders(tmp_path, classes=("ant",), train=2 * cache.PART)
    paths = sorted(map(str, tmp_path.rglob("train/*/*.jpg")))
    real, reached = worker._worker_loop, tmp_path / "reached"

    def struck(*arguments):
        with contextlib.suppress(FileExistsError):  # by one worker: a second signal may come at any time
            os.mkdir(tmp_path / f"struck by a worker of {os.getppid()}")
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                reached.touch()
            os.killpg(0, signal.SIGINT)
        real(*arguments)

    def main(report):
        worker._worker_loop = struck
        print("started", file=report)
        work(paths)

    monkeypatch.setattr(Process, "cores", 2)
    program = Program(main)
    code, said = program.end()
    assert code == 130 and said.endswith("\ninterrupted\n") and "Process" not in said
    assert not reached.exists()
    program.clear()

    monkeypatch.setattr(module, "ctrl_c_later", contextlib.nullcontext)  # negative control
    program = Program(main)
    program.end()
    assert reached.exists()
    program.clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth.tar"
    write_checkpoint(path, "resnet18")
    return path


@pytest.mark.parametrize(
    ("to", "moment"), [*((to, "written") for to in export.SUFFIXES), ("timm", "renamed")]
)
def test_an_export(checkpoint, tmp_path, monkeypatch, cli, to, moment):
    out, seen = tmp_path / f"out{export.SUFFIXES[to][0]}", []
    out.write_text("the one before")

    def struck(path, real=files.fsync_path):
        if path == tmp_path or moment == "written":
            seen.extend(os.listdir(tmp_path))
            signal.raise_signal(signal.SIGINT)
        real(path)

    monkeypatch.setattr(files, "fsync_path", struck)
    words = [checkpoint, out, "--to", to, "--force"]
    assert cli(export.main, *words)[::2] == (130, "\ninterrupted\n")
    assert len(seen) == (2 if moment == "written" else 1)  # a temporary file stood there
    assert os.listdir(tmp_path) == [out.name]
    assert (out.read_bytes() == b"the one before") == (moment == "written")
