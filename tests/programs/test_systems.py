"""Systems without what only Unix has (fcntl, resource, fork, signals) or only Linux (memfd_create)."""

import signal
import sys
from pathlib import Path

import bare_system
import pytest
import torch
from command_lines import MOCO, TINY, program
from run_files import content
from started_runs import SPAWN, run

import main_moco

HELPER = Path(bare_system.__file__)
PROGRAMS = ["main_moco.py", "main_lincls.py"]
TOOLS = ["check", "export", "imagenet100", "plot", "show", "zoo", "bench", "trifeature", "shortcuts"]


def on(system, *words):
    return program(sys.executable, str(HELPER), system, *map(str, words))


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_training_with_spawned_workers_gives_the_same_bits(system, folders, tmp_path):
    words = [*MOCO, "-a", "shufflenet_v2_x0_5", "--epochs", "1", folders]
    there = on(system, "main_moco.py", *words, "-j", "1", "--output-dir", tmp_path / "there")
    assert there.returncode == 0 and "1 data worker(s)" in there.stdout, there.stderr
    run(*words, "--output-dir", tmp_path / "here")
    one, other = (content(tmp_path / name, "checkpoint_0000.pth.tar") for name in ("here", "there"))
    assert one["state_dict"] == other["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PROGRAMS, *(f"moco.{tool}" for tool in TOOLS)])
def test_every_program_starts(name):
    ended = on("windows", name, "--help")
    assert ended.returncode == 0 and ended.stdout.startswith("usage: "), ended.stderr


def test_what_cannot_be_done_there_is_a_sentence(folders, tmp_path, cli, monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, _, errors = cli(main_moco.main, *TINY, *SPAWN, "--output-dir", tmp_path, folders)
    assert code == 2 and errors.count("\n") == 1 and "leave it out for one process, or use Linux" in errors


@pytest.mark.slow
def test_a_bare_system_lacks_what_it_should(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("import os, signal, sys; print(hasattr(os, 'fork'), hasattr(signal, 'SIGUSR1'))\n")
    assert [on(system, probe).stdout for system in ("windows", "macos")] == ["False False\n", "True True\n"]
    probe.write_text("import fcntl")
    ended = on("windows", probe)
    assert ended.returncode == 1 and "ModuleNotFoundError" in ended.stderr
