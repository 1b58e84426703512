"""The lines of steps and what is written to log.jsonl."""

import math
import os
import re
import shutil
import subprocess

import pytest
import torch
from written_logs import lines_of, scalars

from moco.errors import DivergedError, UserError
from moco.progress import duration
from moco.run.launch import Rank
from moco.run.log import Meters, RunLog, git_state, machine

ALONE = Rank.alone()


def metered(losses, first_step=0, sums=None, steps=4):
    """Meters after steps of two images each, whose accuracies are ten times the loss."""
    meters = Meters("Epoch: [3]", steps, ALONE, first_step, sums)
    for (_, loss), n in zip(meters.timed(losses), (2, 2, 1, 1), strict=False):
        meters.update(torch.tensor(loss), [torch.tensor(10 * loss)] * 2, n)
    return meters


def test_the_line_of_a_step_is_upstreams():
    meters = metered([1.0, 3.0])
    time = r"[ \d]\d\.\d{3} \([ \d]\d\.\d{3}\)"
    assert re.fullmatch(
        rf"Epoch: \[3\]\[1/4\]\tTime {time}\tData {time}\tLoss 3\.0000e\+00 \(2\.0000e\+00\)\t"
        r"Acc@1  30\.00 \( 20\.00\)\tAcc@5  30\.00 \( 20\.00\)",
        meters.line(1),
    )


def test_means_weigh_by_images_and_continue_after_a_stop():
    whole = metered([1.0, 3.0, 8.0])
    assert whole.mean("Loss") == pytest.approx((2 * 1 + 2 * 3 + 8) / 5)
    assert whole.means()["acc1"] == pytest.approx(10 * whole.mean("Loss"))
    first = metered([1.0, 3.0])
    second = Meters("Epoch: [3]", 4, ALONE, 2, first.state_dict())
    for step, _ in second.timed([None]):
        assert step == 2
        second.update(torch.tensor(8.0), [torch.tensor(80.0)] * 2, 1)
    assert second.mean("Loss") == whole.mean("Loss")


def test_losses_of_several_classifiers_of_which_one_is_shown():
    meters = Meters("Epoch: [0]", 1, ALONE, shown=1)
    for _ in meters.timed([None]):
        meters.update(torch.tensor([1.0, 2.0]), [torch.tensor([5.0, 7.0])] * 2, 4)
    assert meters.mean("Loss") == [1.0, 2.0] and "Loss 2.0000e+00" in meters.line(0)
    assert "Acc@1   7.00" in meters.line(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_found_later_too(value):
    metered([1.0, 2.0]).check_finite(3, 1, 0.5)
    with pytest.raises(
        DivergedError, match="loss of epoch 3 became nan or infinite in step 2 or before, at lr 0.5"
    ):
        metered([1.0, value, 2.0]).check_finite(3, 2, 0.5)


def one_diverges(rank, world):
    meters = Meters("Epoch: [0]", 1, Rank(rank, world, rank, world, world, torch.device("cpu")))
    meters.update(torch.tensor(math.nan if rank == 1 else 1.0), [torch.tensor(0.0)] * 2, 1)
    with pytest.raises(DivergedError) as error:
        meters.check_finite(0, 0, 1.0)
    return str(error.value)


def test_all_ranks_find_the_loss_of_one(run_ranks):
    first, second = run_ranks(2, one_diverges)
    assert first == second


def test_numbers_that_json_lacks_and_what_a_killed_run_left(tmp_path):
    meters = metered([math.nan])
    place = {"epoch": 0, "step": 0, "steps": 4}
    with RunLog(tmp_path, "log.jsonl", ALONE, **place, settings={"lr": math.inf}) as log:
        log.step(meters, 0, 0, lr=math.inf, features={"uniformity": torch.tensor(-1.5)})
        log.epoch(0, loss=2.0)
    start, step, epoch = lines_of(tmp_path)
    assert start["settings"] == {"lr": None} and start["kind"] == "start" and start["processes"] == 1
    assert (step["kind"], step["loss"], step["lr"], step["uniformity"]) == ("step", None, None, -1.5)
    assert (epoch["kind"], epoch["epoch"], epoch["loss"]) == ("epoch", 0, 2.0)

    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind":"st')
    with RunLog(tmp_path, "log.jsonl", ALONE, **place):
        pass
    assert [line["kind"] for line in lines_of(tmp_path)] == ["start", "step", "epoch", "start"]


def test_a_log_that_cannot_be_written_is_said(tmp_path):
    place = {"epoch": 0, "step": 0, "steps": 4}
    with pytest.raises(UserError, match="cannot write .*; free space or choose another --output-dir"):
        RunLog(tmp_path / "missing", "log.jsonl", ALONE, **place)
    if os.path.exists("/dev/full"):
        os.symlink("/dev/full", tmp_path / "full")
        with pytest.raises(UserError, match="No space left on device"):
            RunLog(tmp_path, "full", ALONE, **place)


@pytest.mark.parametrize(
    ("first", "epoch", "others", "left"),
    [
        ((0, 0), 0, 0, 9 * 40),  # of 10 epochs of 4 steps, 10 s each; the first step takes 1,000 s
        ((0, 0), 2, 0, 7 * 40),
        ((0, 0), 2, 20, 7 * 4 * (11 * 10 + 3 * 20) / 11),  # kNN and saving take 20 s after an epoch
        ((3, 2), 3, 0, 6 * 40),  # from step 2 of epoch 3 on
        ((3, 3), 3, 0, 6 * 4 * 1000),  # nothing else is known
        ((3, 3), 4, 0, 5 * 40),
    ],
)
def test_the_time_that_is_left_is_by_steps_after_compilation(
    tmp_path, monkeypatch, first, epoch, others, left
):
    now = [0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    (start, step), steps, meters = first, 4, metered([1.0])
    with RunLog(tmp_path, "log.jsonl", ALONE, epoch=start, step=step, steps=steps) as log:
        for place in range(start * steps + step, (epoch + 1) * steps):
            now[0] += 10 if now[0] else 1000
            if place == start * steps + step or place % 5 == 0:
                log.step(meters, place // steps, place % steps, lr=1.0)
            if place % steps == steps - 1:
                now[0] += others
        assert log.time_left(epoch, 10) == duration(left)


def test_other_ranks_write_nothing(tmp_path):
    rank = Rank(1, 2, 1, 2, 2, torch.device("cpu"))
    with RunLog(tmp_path, "log.jsonl", rank, epoch=0, step=0, steps=4) as log:
        log.epoch(0, loss=1.0)
    assert os.listdir(tmp_path) == []


def test_curves_hide_what_an_earlier_start_wrote_beyond(tmp_path):
    for step, loss in ((0, 1.0), (1, 5.0)):
        with RunLog(tmp_path, "log.jsonl", ALONE, epoch=1, step=step, steps=4, tensorboard=True) as log:
            for at in range(step, 3):
                log._write({"kind": "step", "epoch": 1, "step": at, "loss": loss})
    assert scalars(tmp_path / "tensorboard") == {
        ("step/loss", place): v for place, v in ((5, 1), (6, 5), (7, 5))
    }


def test_machine_names_versions_and_device():
    entry = machine(torch.device("cpu"))
    assert set(entry["versions"]) == {"python", "torch", "torchvision", "numpy", "pillow"}
    assert entry["versions"]["torch"] == str(torch.__version__) and entry["device"] == "cpu"


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_git_state(tmp_path, monkeypatch):
    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "untracked").mkdir()
    state = git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["changed"] is False
    assert git_state(tmp_path / "untracked") is None  # not the top
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == state | {"changed": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
