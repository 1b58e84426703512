"""Ctrl-C in the middle of each tool: nothing under the final name, nothing left over, and no traceback."""

import os
import shutil
import signal
import sys
import time

import pytest
from export_models import write_checkpoint
from fake_web import fake_web, whole
from forked_program import Program, gone_within
from miniature import build, write_folders

import moco.zoo.__main__
from moco import check, export, trifeature


def interrupt(tool, words, is_half_done):
    """Call `tool()` with the command line `words` in a program of its own, and send that and its children
    Ctrl-C when `is_half_done()`.
    """

    def main(report):
        print("started", file=report)
        sys.argv = ["tool", *map(str, words)]
        tool()

    running = Program(main)
    assert gone_within(30, is_half_done), "it never was half done"
    os.killpg(running.pid, signal.SIGINT)
    code, said = running.end()
    assert code == 130 and said.endswith("\ninterrupted\n") and "Traceback" not in said, said
    running.clear()


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "models"
    with fake_web(whole(bytes(3_000_000), pace=60)) as web:
        words = ["download", "ifm-eps0.1", "--to", folder, "--mirror", web.url]
        interrupt(moco.zoo.__main__.main, words, lambda: files_below(folder))
    assert os.listdir(folder) == []


def stuck_after_one(function, stuck):
    """`function`, which makes the file `stuck` and takes a minute from its second call on."""
    calls = []

    def slow(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            stuck.touch()
            time.sleep(60)
        function(*arguments)

    return slow


def test_imagenet100(tmp_path, monkeypatch):
    source, out, stuck = write_folders(tmp_path / "imagenet"), tmp_path / "out", tmp_path / "stuck"
    monkeypatch.setattr(shutil, "copyfile", stuck_after_one(shutil.copyfile, stuck))
    interrupt(lambda: build(source, out, copy=True), [], stuck.exists)
    assert sorted(os.listdir(tmp_path)) == ["imagenet", "stuck"]


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_an_export(tmp_path, monkeypatch, to):
    write_checkpoint(tmp_path / "checkpoint", "resnet18")
    out, folder = tmp_path / "new" / f"out{export.SUFFIXES[to][0]}", tmp_path / "new"
    folder.mkdir()
    out.write_text("the one before")
    monkeypatch.setattr("moco.files.fsync_path", lambda path: time.sleep(60))  # written, not yet renamed
    words = [tmp_path / "checkpoint", out, "--to", to, "--force"]
    interrupt(export.main, words, lambda: len(files_below(folder)) == 2)
    assert os.listdir(folder) == [out.name] and out.read_text() == "the one before"
    monkeypatch.undo()  # negative control
    export.export(tmp_path / "checkpoint", out, to, force=True)
    assert os.listdir(folder) == [out.name] and out.stat().st_size > 1_000_000


def test_the_drawing_of_trifeature(tmp_path):
    out = tmp_path / "trifeature"
    interrupt(lambda: trifeature.generate(out, workers=2), [], lambda: files_below(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "parent"])
def test_a_check(folders, monkeypatch, to_all):
    before = sorted(folders.rglob("*"))

    def main(report):  # its workers say that they have begun, and never end
        monkeypatch.setattr(
            check, "read_pixels", lambda path: print("begun", file=report, flush=True) or time.sleep(60)
        )
        sys.argv = ["check", str(folders), "-j", "2"]
        check.main()

    running = Program(main)
    assert len(running.workers) == 2
    (os.killpg if to_all else os.kill)(running.pid, signal.SIGINT)
    code, said = running.end()
    assert code == 130 and "\ninterrupted\n" in said and "Traceback" not in said
    running.clear()
    assert sorted(folders.rglob("*")) == before
