"""Ctrl-C, SIGTERM or a closed terminal within each tool: nothing under the final name, nothing left over."""

import os
import shutil
import signal
import sys
import time

import pytest
from export_models import write_checkpoint
from fake_web import fake_web, whole
from forked_program import Program, gone_within
from miniature import write_folders

import main_moco
import moco.trifeature.__main__
import moco.zoo.__main__
from moco import export, imagenet100
from moco.run.signals import EXIT_CODE


def interrupt(tool, words, is_half_done, number=signal.SIGINT, expected=130):
    """Call `tool()` with the command line `words` in a process group of its own, and send that Ctrl-C, or
    another signal, when `is_half_done()`. expected: the exit code.
    """

    def main(report):
        print("started", file=report)
        sys.argv = ["tool", *map(str, words)]
        tool()

    running = Program(main)
    assert gone_within(30, is_half_done), "it never was half done"
    os.killpg(running.pid, number)
    code, said = running.end()
    assert code == expected and "Traceback" not in said, said
    assert code != 130 or said.endswith("\ninterrupted\n")
    running.clear()


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "models"
    with fake_web(whole(bytes(3_000_000), pace=60)) as web:
        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        words = ["download", "ifm-eps0.1", "--to", folder]
        interrupt(moco.zoo.__main__.main, words, lambda: files_below(folder))
    assert os.listdir(folder) == []


def test_imagenet100(tmp_path, monkeypatch, miniature):
    source, out, stuck = write_folders(tmp_path / "imagenet"), tmp_path / "out", tmp_path / "stuck"
    copyfile = shutil.copyfile

    def slow(*arguments):  # from the second file on
        if stuck.exists():
            stuck.write_text("now")
            time.sleep(60)
        stuck.touch()
        copyfile(*arguments)

    monkeypatch.setattr(shutil, "copyfile", slow)
    words = [source, out, "--copy"]
    interrupt(imagenet100.main, words, lambda: stuck.exists() and stuck.stat().st_size)
    assert sorted(os.listdir(tmp_path)) == ["imagenet", "stuck"]


def test_an_export(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint", "resnet18")
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "out.pth").write_text("the one before")
    monkeypatch.setattr("moco.files.fsync_path", lambda path: time.sleep(60))  # written, not yet renamed
    words = [tmp_path / "checkpoint", folder / "out.pth", "--to", "timm", "--force"]
    interrupt(export.main, words, lambda: len(files_below(folder)) == 2)
    assert os.listdir(folder) == ["out.pth"] and (folder / "out.pth").read_text() == "the one before"
    monkeypatch.undo()  # negative control
    export.export(tmp_path / "checkpoint", folder / "out.pth", "timm", force=True)
    assert os.listdir(folder) == ["out.pth"] and (folder / "out.pth").stat().st_size > 1_000_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_drawing_of_trifeature(tmp_path, number):
    out = tmp_path / "trifeature"
    interrupt(moco.trifeature.__main__.main, [out], lambda: files_below(tmp_path), number)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_draws_its_data(tmp_path, number):
    out = tmp_path / "trifeature"
    words = ["--dataset_root", tmp_path, "--dataset", "trifeature", "--output-dir", tmp_path / "run"]
    interrupt(main_moco.main, words, lambda: files_below(tmp_path), number, EXIT_CODE)
    assert os.listdir(tmp_path) == ["run"] and not out.exists()
