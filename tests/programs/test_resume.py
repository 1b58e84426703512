"""A run that is stopped and continued equals to the bit one that never stopped."""

import os
import re
import shutil
import signal
import time

import pytest
from command_lines import TINY
from run_files import checkpoints, content, damage
from started_runs import Forked, TwoRanks, alive, all_end, at_step, run, send

import main_moco
from moco.run.signals import EXIT_CODE, SAME

AUTO = ["--resume", "auto"]
TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


@pytest.mark.parametrize(
    ("world", "workers", "step", "number", "to"),
    [
        (1, 0, 1, TERM, os.getpid),
        (1, 4, 4, INT, os.getpid),
        (1, 1, 3, USR1, os.getpid),  # the last step of the first epoch
        (2, 0, 4, INT, os.getpid),
        (1, 0, 4, HUP, os.getpid),  # the terminal is closed
        (2, 1, 1, USR1, os.getpid),
        (2, 4, 4, TERM, os.getpid),
        (2, 0, 4, TERM, os.getppid),
        (2, 0, 4, INT, os.getppid),
        pytest.param(2, 0, 4, HUP, os.getppid, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_by_a_signal_continues_exactly(
    folders, tmp_path, whole, world, workers, step, number, to
):
    words = [*TINY, "-j", workers * world, "--output-dir", tmp_path, folders]
    stop = lambda: at_step(step, send(number, to), rank=world - 1)  # noqa: E731
    output = run(*words, world=world, prepare=stop, code=EXIT_CODE)
    said = r"stopped in epoch (\d) after (\d) of 3 steps \((.*)\);\n   saved (\S+); continue with --resume"
    epoch, steps, name, path = re.search(said, output).groups()
    assert name in (number.name, "a signal to another rank") and (name == number.name or world == 2)
    finished = 3 * int(epoch) + int(steps)
    assert finished == step or (to is os.getppid and step <= finished < 6)
    assert path == f"{tmp_path}/{checkpoints(tmp_path)[-1]}" and "checkpoint_0001.pth.tar" not in path
    assert len(checkpoints(tmp_path)) == (2 if step == 4 else 1) and "Traceback" not in output

    output = run(*words, *AUTO, "-j", world, world=world)
    assert f"--resume auto: {path}" in output
    expected = content(whole(world))
    assert content(tmp_path) == expected
    assert content(tmp_path, "checkpoint_0000.pth.tar") != expected  # negative control


def test_under_nohup_a_closed_terminal_changes_nothing(folders, tmp_path, whole):
    def prepare():
        signal.signal(HUP, signal.SIG_IGN)  # as nohup does
        at_step(4, send(HUP))

    run(*TINY, "--output-dir", tmp_path, folders, prepare=prepare)
    assert content(tmp_path) == content(whole(1))


def test_a_signal_in_the_last_step_of_all_changes_nothing(folders, tmp_path, whole):
    run(*TINY, "--output-dir", tmp_path, folders, prepare=lambda: at_step(6, send(USR1)))
    assert content(tmp_path) == content(whole(1))


@pytest.fixture(scope="session")
def stopped(folders, tmp_path_factory):
    """The files of a run that was stopped after 4 steps, in its second epoch: {name: bytes}."""
    folder = tmp_path_factory.mktemp("stopped")
    run(*TINY, "--output-dir", folder, folders, prepare=lambda: at_step(4, send(INT)), code=EXIT_CODE)
    assert checkpoints(folder) == ["checkpoint_0000.pth.tar", "checkpoint_0001_000001.pth.tar"]
    return {name: (folder / name).read_bytes() for name in checkpoints(folder)}


@pytest.fixture
def copied(stopped, tmp_path):
    """A folder of its own with the files of `stopped`."""
    for name, data in stopped.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-b", "4"], "within an epoch: global_batch was 8 there and is 4 here"),
        (["--bn-splits", "2"], "within an epoch: batchnorm_groups was 1 there and is 2 here"),
        (["--seed", "9"], "within an epoch of --seed 3, which --seed 9 cannot continue"),
        (["--moco-k", "24"], "is of a run with --moco-k 20, not 24"),
        (["--moco-dim", "9"], "is of a run with --moco-dim 8, not 9"),
        (["-a", "resnet34"], "is of -a tiny, not of -a resnet34"),
        (["--epochs", "1", "--resume", "EPOCH"], "has finished 1 epochs; raise --epochs"),
    ],
)
def test_what_cannot_continue_says_why(copied, stopped, folders, cli, change, message):
    change = [str(copied / "checkpoint_0000.pth.tar") if word == "EPOCH" else word for word in change]
    words = [*TINY, *AUTO, *change, "--overwrite", "--output-dir", copied, folders]
    if "--epochs" not in change:
        words.remove("--overwrite")
    code, output, errors = cli(main_moco.main, *words)
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert "Epoch: " not in output


def test_what_differs_but_can_continue_is_noted(copied, folders, cli):
    words = [*TINY, *AUTO, "--moco-t", "0.3", "--device-aug", "exact", "--output-dir", copied, folders]
    code, output, errors = cli(main_moco.main, *words)
    assert (code, errors) == (0, "")
    noted = re.findall(r"^note: (\w+) was", output, re.MULTILINE)
    assert sorted(noted) == ["device_aug", "moco_t", "resize"]


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_newest_file_is_named_and_the_one_before_is_used(copied, folders, cli, whole, how):
    newest = copied / "checkpoint_0001_000001.pth.tar"
    damage(newest, how)
    words = [*TINY, "--output-dir", copied, folders, "--resume"]
    code, output, errors = cli(main_moco.main, *words, "auto")
    assert code == 0, errors
    assert f"warning: {newest} is " in output and "; trying the one before" in output
    assert f"--resume auto: {copied / 'checkpoint_0000.pth.tar'}" in output
    assert content(copied) == content(whole(1))


def test_without_a_readable_file_nothing_is_started_anew(copied, stopped, folders, cli):
    for name in stopped:
        damage(copied / name, "flipped")
    words = [*TINY, "--output-dir", copied, folders, "--resume"]
    code, output, errors = cli(main_moco.main, *words, "auto")
    assert code == 2 and "none of the 2 checkpoints" in errors and "Epoch: " not in output
    code, _, errors = cli(main_moco.main, *words, copied / "checkpoint_0000.pth.tar")
    assert code == 2 and "is damaged (checksum of" in errors and checkpoints(copied) == sorted(stopped)


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(
    copied, stopped, folders, cli, whole, tmp_path_factory
):
    words = [*TINY, "--output-dir", copied, folders]
    newest = copied / "checkpoint_0001_000001.pth.tar"
    elsewhere = shutil.copy(newest, tmp_path_factory.mktemp("other"))
    for more in ([], ["--resume", copied / "checkpoint_0000.pth.tar"], ["--resume", elsewhere]):
        code, output, errors = cli(main_moco.main, *words, *more)
        assert code == 2 and re.search(
            "has checkpoints (of another run|later than .*), such as checkpoint_000", errors
        )
        assert all(way in errors for way in ("--resume auto", "another folder", "--overwrite"))
        assert {name: (copied / name).read_bytes() for name in checkpoints(copied)} == stopped
        assert "Epoch: " not in output and not (copied / "log.jsonl").exists()
    assert cli(main_moco.main, *words, "--resume", newest, "--epochs", "2")[0] == 0  # goes beyond none
    assert content(copied) == content(whole(1))
    code, output, _ = cli(main_moco.main, *words, "--overwrite", "--epochs", "1")
    assert code == 0 and "Epoch: [0][0/3]" in output
    assert checkpoints(copied) == ["checkpoint_0000.pth.tar"]


@pytest.mark.parametrize("number", [TERM, USR1], ids=lambda number: number.name)
def test_a_run_that_has_nothing_to_save_yet_ends_as_one_that_can_continue(folders, tmp_path, number):
    def signalled(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    def prepare():
        main_moco.check_arch = signalled

    output = run(*TINY, folders, "--output-dir", tmp_path, prepare=prepare, code=EXIT_CODE)
    assert "Traceback" not in output and checkpoints(tmp_path) == []


def stand_still():
    print("standing", flush=True)
    time.sleep(60)


def test_a_second_signal_ends_a_run_at_once_in_the_middle_of_a_step(folders, tmp_path):
    words = [*TINY, "-j", "2", folders, "--output-dir", tmp_path]
    with TwoRanks(*words, prepare=lambda: at_step(2, stand_still)) as program:
        program.wait_for("standing")
        everyone = [program.pid, *program.below()]
        os.kill(program.pid, INT)
        time.sleep(SAME + 0.2)
        assert len(alive(everyone)) == len(everyone)  # the first one waits for the step
        os.kill(program.pid, TERM)
        assert program.end(10) == 2 and "Traceback" not in program.output
        assert f"died (exit code {128 + TERM})" in program.output and all_end(everyone, 5)
    assert checkpoints(tmp_path) == []


def test_ctrl_c_in_a_terminal_reaches_everybody_and_saves(folders, tmp_path):
    words = [*TINY, "--epochs", "100000", "-j", "1", folders, "--output-dir", tmp_path]
    with Forked(*words) as program:
        program.wait_for("epoch 0")
        everyone = program.below()
        os.killpg(program.pid, INT)  # the program and its data worker
        assert program.end(30) == EXIT_CODE and all_end(everyone, 5)
    saved = re.search(
        r"\nstopped in epoch .* \(SIGINT\);\n   saved (\S+); continue with --resume auto\n$", program.output
    )
    assert os.path.exists(saved[1]) and "Traceback" not in program.output
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
