"""Several linear classifiers that are stopped, go on exactly, and are asked for in all ways."""

import os
import sys

import pytest
import torch
from command_lines import SMALL
from linear_runs import CPU, WORDS, load, run, tiny_encoder  # noqa: F401
from test_resume import content_hash

import main_lincls
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


# Two heads, so two calls a step: 3 training and 2 validation steps an epoch. In two processes it is heard a
# step later, and they have but one validation step in common: a signal in it stops the next epoch.
@pytest.mark.parametrize(
    ("world", "call", "where"), [(1, 1, 0), (1, 9, 0), (1, 13, 1), (1, 19, 1), (2, 3, 0), (2, 15, 2)]
)
def test_a_signal_stops_it_and_it_goes_on_exactly(run_ranks, folders, tmp_path, whole, world, call, where):
    words, path = ["--lr", "1", "3"], tmp_path / "checkpoint.pth.tar"
    codes, output = run(run_ranks, world, folders, tmp_path, *words, stop=(world - 1, call))
    assert codes == [PREEMPTED] * world
    name = "SIGTERM" if world == 1 else "a signal to another process"
    kept = "no epoch is finished, so nothing is saved"
    if where > 0:
        kept = f"the last finished epoch is in {path}; --resume auto goes on from there"
    assert output.splitlines()[-1] == f"stopped in epoch {where}, as {name} said: {kept}"
    assert path.exists() == (where > 0) and not (tmp_path / "linear.json").exists()
    if where > 0:
        assert load(tmp_path)["epoch"] == where
    codes, output = run(run_ranks, world, folders, tmp_path, *words, "--resume", "auto")
    assert codes == [0] * world and f"Epoch: [{where}]" in output and f"Epoch: [{where - 1}]" not in output
    assert entries(tmp_path) == entries(whole(run_ranks, world))


def test_another_value_leaves_other_files(run_ranks, folders, tmp_path, whole):
    assert run(run_ranks, 1, folders, tmp_path, "--lr", "1", "4")[0] == [0]  # negative control of the above
    for ours, theirs in zip(entries(tmp_path), entries(whole(run_ranks, 1)), strict=True):
        assert ours != theirs


def test_a_signal_stops_a_validation_of_its_own(run_ranks, folders, tmp_path, whole):
    words = ["-e", "--resume", whole(run_ranks, 1) / "model_best.pth.tar"]
    codes, output = run(run_ranks, 1, folders, tmp_path, *words, stop=(0, 1))
    assert codes == [PREEMPTED] and output.endswith("as SIGTERM said: the validation is not finished\n")
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
