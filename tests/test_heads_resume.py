"""Several linear classifiers that are stopped, go on exactly, and are asked for in all ways."""

import os
import re
import sys

import pytest
import torch
from command_lines import SMALL
from linear_runs import CPU, WORDS, load, run, tiny_encoder  # noqa: F401
from test_resume import content_hash

import main_lincls
from moco.checkpoint import save_checkpoint
from moco.log_reader import read_log
from moco.watch import PREEMPTED


def entries(out):
    """What checkpoint.pth.tar and linear.json hold."""
    return content_hash(load(out)), (out / "linear.json").read_text()


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """`whole(run_ranks, world)`: the folder of a run with two values that never stopped."""
    made = {}

    def get(run_ranks, world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"whole{world}")
            assert run(run_ranks, world, folders, made[world], "--lr", "1", "3")[0] == [0] * world
        return made[world]

    return get


def measured(out):
    """What linear.jsonl says of the epochs, but for what it took, and of the first printed steps."""
    log = read_log(out / "linear.jsonl")
    times = {"seconds", "data_seconds", "images_per_s", "memory_mb", "head", "lr"}
    return [{name: value for name, value in entry.items() if name not in times} for entry in log.epochs]


def printed(output):
    return [(int(e), int(s)) for e, s in re.findall(r"^Epoch: \[(\d)\]\[(\d)/3\]", output, re.M)]


# Two heads, so two calls a step: 3 training and 2 validation steps an epoch. In two processes it is heard a
# step later, and they have but one validation step in common: a signal in it is heard when that is over.
@pytest.mark.parametrize(
    ("world", "call", "epoch", "step"),
    [(1, 1, 0, 1), (1, 9, 0, 3), (1, 13, 1, 2), (1, 29, 2, 3), (2, 1, 0, 2), (2, 13, 1, 3), (2, 15, 2, 0)],
)
def test_a_signal_stops_it_and_it_goes_on_exactly(
    run_ranks, folders, tmp_path, whole, world, call, epoch, step
):
    words, path = ["--lr", "1", "3"], tmp_path / "checkpoint.pth.tar"
    codes, output = run(run_ranks, world, folders, tmp_path, *words, stop=(world - 1, call))
    assert codes == [PREEMPTED] * world
    name = "SIGTERM" if world == 1 else "a signal to another process"
    where = f"in epoch {epoch} after {step} of 3 steps" if step else f"after epoch {epoch - 1}"
    said = f"stopped {where}, as {name} said: {path} has it all; --resume auto goes on"
    assert output.splitlines()[-1] == said and not (tmp_path / "linear.json").exists()
    assert printed(output) == [(e, s) for e in range(3) for s in range(3) if (e, s) < (epoch, step)]
    stopped = load(tmp_path)
    assert (stopped["epoch"], stopped["step"], len(stopped["logs"])) == (epoch, step, world * (step > 0))
    expected = entries(whole(run_ranks, world))
    assert content_hash(stopped) != expected[0]  # negative control

    codes, output = run(run_ranks, world, folders, tmp_path, *words, "--resume", "auto")
    assert codes == [0] * world
    assert printed(output) == [(e, s) for e in range(3) for s in range(3) if (e, s) >= (epoch, step)]
    assert entries(tmp_path) == expected
    rates = [entry["images_per_s"] for entry in read_log(tmp_path / "linear.jsonl").epochs]
    assert [rate is None for rate in rates] == [
        e == epoch and step == 3 for e in range(3)
    ]  # had no step left
    assert measured(tmp_path) == measured(whole(run_ranks, world)) and len(measured(tmp_path)) == 3
    assert not (tmp_path / "checkpoint_previous.pth.tar").exists()


@pytest.mark.parametrize("left_out", ["step", "logs"])
def test_without_the_steps_or_the_sums_it_would_not_be_exact(run_ranks, folders, tmp_path, whole, left_out):
    words = ["--lr", "1", "3"]
    run(run_ranks, 1, folders, tmp_path, *words, stop=(0, 13))
    stopped = load(tmp_path)
    save_checkpoint({**stopped, "logs": [], **({"step": 0} if left_out == "step" else {})}, tmp_path / "x")
    more = ["--resume", tmp_path / "x"]
    assert run(run_ranks, 1, folders, tmp_path, *words, *more)[0] == [0]
    (ours, report), (theirs, other) = entries(tmp_path), entries(whole(run_ranks, 1))
    assert report != other and ours != theirs


def test_another_value_leaves_other_files(run_ranks, folders, tmp_path, whole):
    assert run(run_ranks, 1, folders, tmp_path, "--lr", "1", "4")[0] == [0]  # negative control of the above
    for ours, theirs in zip(entries(tmp_path), entries(whole(run_ranks, 1)), strict=True):
        assert ours != theirs


def test_a_signal_stops_a_validation_of_its_own(run_ranks, folders, tmp_path, whole):
    words = ["-e", "--resume", whole(run_ranks, 1) / "model_best.pth.tar"]
    codes, output = run(run_ranks, 1, folders, tmp_path, *words, stop=(0, 1))
    assert codes == [PREEMPTED] and output.endswith(
        "stopped in the validation, as SIGTERM said: it is not finished\n"
    )
    assert " * Acc@1" not in output
    codes, output = run(run_ranks, 1, folders, tmp_path, *words)
    assert codes == [0] and " * Acc@1" in output and os.listdir(tmp_path) == []


def test_resuming_refuses_other_values_and_takes_upstreams_file(folders, tmp_path, cli):
    words = [*WORDS, folders, "--output-dir", tmp_path]
    assert cli(main_lincls.main, *words, "--lr", "1", "3", "--epochs", "1", "--schedule")[0] == 0
    for lrs in (["1"], ["3", "1"], ["1", "3", "10"], ["1", "4"]):
        code, _, errors = cli(main_lincls.main, *words, "--resume", "auto", "--lr", *lrs)
        assert code == 2 and f"is of --lr 1 3, not {' '.join(lrs)}: go on with the same values" in errors
        assert errors.count("\n") == 1
    assert cli(main_lincls.main, *words, "--resume", "auto", "--lr", "1", "3")[0] == 0

    best = tmp_path / "model_best.pth.tar"
    kept = torch.load(best, weights_only=True)
    for path, accuracy in ((best, kept["best_acc1"]), (tmp_path / "checkpoint.pth.tar", None)):
        code, output, errors = cli(main_lincls.main, *words, "-e", "--resume", path)
        assert code == 0 and " * Acc@1 " in output, errors
        assert accuracy is None or f" * Acc@1 {accuracy:.3f} " in output
    upstreams = {name: kept[name] for name in ("epoch", "arch", "state_dict", "best_acc1", "optimizer")}
    torch.save(upstreams, tmp_path / "upstreams")
    words += ["--epochs", "4", "--resume", tmp_path / "upstreams", "--lr"]
    code, output, errors = cli(main_lincls.main, *words, f"{kept['lr']:g}")
    assert code == 0 and f"Epoch: [{kept['epoch']}]" in output, errors
    code, _, errors = cli(main_lincls.main, *words, "1", "3")
    assert code == 2 and "is of --lr one unknown value, not 1 3" in errors


def test_values_of_lr_and_what_follows_them(monkeypatch, cli, folders):
    def parsed(*words):
        monkeypatch.setattr(sys, "argv", ["main_lincls.py", *words])
        return main_lincls.parse_args()

    for words in (["--lr", "1", "3", "DIR"], ["DIR", "--lr", "1", "3"], ["--lr", "1", "3", "-b", "8", "DIR"]):
        assert (parsed(*words).lr, parsed(*words).folder) == ([1.0, 3.0], "DIR")
    assert parsed("--lr=2", "DIR").lr == [2.0]
    for words, message in (
        (["--lr", "1", "1.0", folders], "--lr has 1 more than once"),
        (["--lr", "1", "0", folders], "--lr must be above 0, not 0.0"),
        (["--lr", "1", "nan", folders], "--lr must be above 0, not nan"),
        (["--lr", "1", "x", folders], "'x' is no number"),
        (["--lr", folders], "argument --lr: no number"),
    ):
        code, _, errors = cli(main_lincls.main, *SMALL, *words)
        assert code == 2 and message in errors, errors
