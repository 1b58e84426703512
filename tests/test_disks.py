"""Disks that are full or cannot be written to: found before the first step, or the older checkpoint stays."""

import contextlib
import errno
import io
import os
import shutil
import sys
import tempfile

import pytest
from forked_program import forked
from private_mounts import alone, make_read_only, mount
from started_runs import at_step
from test_resume import FRESH, WORDS, checkpoints, content

import main_moco
from moco.errors import run_program


def run(*words):
    """Run pre-training in a forked process, in which pytest's own way to see its output does not work."""
    sys.argv, code = ["program", *WORDS, *FRESH, *map(str, words)], 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            run_program(main_moco.main)
        except SystemExit as end:
            code = end.code
    output, errors = output.getvalue(), errors.getvalue()
    assert (code, errors.count("\n")) in ((0, 0), (2, 1)), errors
    return code, output, errors


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The folder of a run on a large disk, and the size of its last file in bytes."""
    place = tmp_path_factory.mktemp("whole")

    pid, output = forked(lambda: run("--output-dir", place, "-p", "1000", folders), (1, 2))
    said = output.read()
    assert os.waitpid(pid, 0)[1] == 0, said
    return place, (place / "checkpoint_0001.pth.tar").stat().st_size


def test_a_disk_without_room_is_found_before_the_first_step(folders, tmp_path, whole):
    def body():
        mount(tmp_path, int(1.5 * whole[1]))  # for one, where a second is written before the first goes
        words = ["--output-dir", tmp_path, folders]
        code, output, errors = run(*words, "--keep", "1")
        assert code == 2 and "the 2 checkpoints that will stand in --output-dir" in errors
        assert "Epoch" not in output and checkpoints(tmp_path) == []
        code, output, _ = run(*words, "--epochs", "1")  # negative control: one does fit
        assert code == 0 and checkpoints(tmp_path) == ["checkpoint_0000.pth.tar"]

    alone(body)


def fill(folder):
    with open(folder / "of somebody else", "wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fails_during_the_run_keeps_the_older_checkpoint(folders, tmp_path, whole, fault):
    def body():
        mount(tmp_path, 4 * whole[1])
        act = (lambda: fill(tmp_path)) if fault == "full" else (lambda: make_read_only(tmp_path))
        at_step(5, act)  # where the log has no line to write before the checkpoint
        code, output, errors = run("--output-dir", tmp_path, "-p", "1000", folders)
        reason = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]
        sentence = f"cannot write the checkpoint {tmp_path}/checkpoint_0001.pth.tar ("
        assert code == 2 and sentence in errors and reason in errors and "Epoch: [1][0/3]" in output
        assert set(checkpoints(tmp_path)) - {"of somebody else"} == {"checkpoint_0000.pth.tar"}
        assert content(tmp_path, "checkpoint_0000.pth.tar") == content(whole[0], "checkpoint_0000.pth.tar")

    alone(body)


def test_a_read_only_disk_is_found_before_the_first_step(folders, tmp_path):
    def body():
        make_read_only(tmp_path)
        code, output, errors = run("--output-dir", tmp_path, folders)
        assert code == 2 and f"cannot write to --output-dir {tmp_path} (Read-only file system)" in errors
        assert "Epoch" not in output

    alone(body)


def test_a_folder_that_may_not_be_written_to_is_found_before_the_first_step():
    """By a user who is not root, whom modes do not bind."""
    place = tempfile.mkdtemp()  # below folders that everybody may enter
    os.chmod(place, 0o555)

    def main():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        sys.argv = ["program", *WORDS, "--output-dir", place, "data"]
        run_program(main_moco.main)

    try:
        pid, output = forked(main, (1, 2))
        said = output.read()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        assert f"cannot write to --output-dir {place} (Permission denied)" in said and said.count("\n") == 1
        assert os.listdir(place) == []
    finally:
        shutil.rmtree(place)
