"""Linear evaluation that is killed while it saves, or finds its newest file damaged, goes on exactly; what is
of another course is refused, noted or set aside.
"""

import os
import shutil
import signal
import sys

import pytest
import torch
from command_lines import SMALL
from conftest import make_folders
from forked_program import forked
from linear_runs import load, run, tiny_encoder  # noqa: F401
from test_resume import damage
from tiny import TinyEncoder

import main_lincls
from moco import files
from moco.checkpoint import save_checkpoint
from moco.errors import UserError
from moco.factors import FACTORS
from moco.resume import same_classes

LRS = ["--lr", "1", "3"]


def words(folders, out):
    more = [*LRS, "--schedule", "2", "--epochs", "3"]
    return [*map(str, [*SMALL, *more, "--output-dir", out, "--resume", "auto", folders])]


def at_call(module, name, to, number, act):
    """Have act(), with the call's arguments, called before call `number`, from 1, of module.name whose last
    argument is a path with `to` in its name.
    """
    real, calls = getattr(module, name), [0]

    def counted(*arguments, **options):
        if to in os.path.basename(arguments[-1]):
            calls[0] += 1
            if calls[0] == number:
                act(*arguments)
        return real(*arguments, **options)

    setattr(module, name, counted)


def struck(prepare, folders, out):
    """Run in a forked process after prepare(): (how it ended, what it said)."""

    def main():
        prepare()
        main_lincls.base_encoder = lambda arch: TinyEncoder
        sys.argv = ["program", *words(folders, out)]
        main_lincls.main()

    pid, output = forked(main, (1, 2))
    said = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def same(one, other):
    """Whether the newest checkpoints of two folders hold the same values."""
    one, other = load(one), load(other)
    tensors = (
        [c["state_dict"], *(head["optimizer"]["state"][0] for head in c["heads"])] for c in (one, other)
    )
    equal = all(torch.equal(a[name], b[name]) for a, b in zip(*tensors, strict=True) for name in a)
    plain = ("epoch", "step", "arch", "best_acc1", "seed", "settings", "confusion")
    histories = [[head["history"] for head in c["heads"]] for c in (one, other)]
    return equal and all(one[name] == other[name] for name in plain) and histories[0] == histories[1]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The folder of an evaluation that never stopped."""
    out = tmp_path_factory.mktemp("whole")
    code, said = struck(lambda: None, folders, out)
    assert code == 0, said
    return out


# Where the saving of the second epoch is struck, and which checkpoint there is to go on from then.
FAULTS = {
    "in the file": (torch, "save", "checkpoint.", "checkpoint"),
    "before the names": (files.os, "replace", "checkpoint_previous.", "checkpoint"),
    "between the names": (files.os, "replace", "checkpoint.", "checkpoint_previous"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kill_9_while_it_saves(folders, tmp_path, cli, whole, fault):
    module, name, to, left = FAULTS[fault]
    real_save = torch.save

    def kill(*arguments):
        if name == "save":
            real_save(*arguments)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    number = 1 if to == "checkpoint_previous." else 2
    code, said = struck(lambda: at_call(module, name, to, number, kill), folders, tmp_path)
    assert "Epoch: [1][2/3]" in said and "Epoch: [2]" not in said
    assert code == -signal.SIGKILL and any(".tmp" in name for name in os.listdir(tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint*")] == [f"{left}.pth.tar"]
    assert load(tmp_path, f"{left}.pth.tar")["epoch"] == 1

    code, output, errors = cli(main_lincls.main, *words(folders, tmp_path))
    assert (code, errors) == (0, "") and f"--resume auto: {tmp_path / left}.pth.tar" in output
    assert "Epoch: [1][0/3]" in output and "Epoch: [0]" not in output
    assert same(tmp_path, whole) and not any(".tmp" in name for name in os.listdir(tmp_path))


@pytest.fixture(scope="module")
def in_the_middle(folders, tmp_path_factory):
    """The folder of an evaluation that was told to stop after two steps of its second epoch."""
    out = tmp_path_factory.mktemp("stopped")

    def prepare():
        real, calls = main_lincls.accuracy, [0]

        def counted(*inputs):
            calls[0] += 1
            if calls[0] == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*inputs)

        main_lincls.accuracy = counted

    code, said = struck(prepare, folders, out)
    assert code == 75 and "stopped in epoch 1 after 2 of 3 steps" in said
    return out


@pytest.fixture
def stopped(in_the_middle, tmp_path):
    """A copy of it."""
    out = tmp_path / "stopped"
    shutil.copytree(in_the_middle, out)
    return out


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_newest_file_is_named_and_the_one_before_is_used(stopped, folders, cli, whole, how):
    newest, before = stopped / "checkpoint.pth.tar", stopped / "checkpoint_previous.pth.tar"
    assert (load(stopped)["step"], load(stopped, before.name)["step"]) == (2, 0)
    assert not same(stopped, whole)  # negative control
    damage(newest, how)
    code, output, errors = cli(main_lincls.main, *words(folders, stopped))
    assert code == 0, errors
    assert f"warning: {newest} " in output and f"--resume auto: {before}" in output
    assert "Epoch: [1][0/3]" in output and "Epoch: [0]" not in output
    assert same(stopped, whole)


def test_without_a_whole_file_nothing_is_started_anew(stopped, folders, cli):
    for path in stopped.glob("checkpoint*"):
        damage(path, "flipped")
    names = sorted(os.listdir(stopped))
    code, output, errors = cli(main_lincls.main, *words(folders, stopped))
    assert code == 2 and f"none of the 2 checkpoints in {stopped} can be read" in errors
    assert errors.count("\n") == 1 and "Epoch" not in output and sorted(os.listdir(stopped)) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["-b", "4"],
            "the middle of an epoch of 8 global batch, and here it would be 4: go on with the same",
        ),
        (["--seed", "9"], "the middle of an epoch of --seed 3, whose other half --seed 9 does not know"),
        (["--lr", "1", "4"], "is of --lr 1 3, not 1 4"),
        (["more"], "the middle of an epoch of 24 images, and here it would be 27"),
        (["names"], "tells 3 classes apart that are not the 3 here, such as ant there for ape here"),
    ],
)
def test_what_cannot_go_on_says_why(stopped, folders, tmp_path, cli, change, message):
    if change[0] in ("more", "names"):
        folders = tmp_path / "other"
        more, names = {"train": 9}, {"classes": ("ape", "bee", "cat")}
        make_folders(folders, **(more if change == ["more"] else names))
        change = []
    code, output, errors = cli(main_lincls.main, *words(folders, stopped), *change)
    assert code == 2 and message in errors and errors.count("\n") == 1 and "Epoch" not in output
    if "classes" in message:
        code, _, errors = cli(main_lincls.main, *words(folders, stopped), "-e")
        assert code == 2 and message in errors


def test_another_target_is_not_taken_for_the_same():
    checkpoint = {"classes": list(FACTORS["color"])}
    same_classes(checkpoint, "x", list(FACTORS["color"]))
    same_classes({}, "x", list(FACTORS["shape"]))  # as of upstream
    with pytest.raises(UserError, match="x tells 10 classes apart that are not the 10 here, such as "):
        same_classes(checkpoint, "x", list(FACTORS["shape"]))
    with pytest.raises(UserError, match="x tells 10 classes apart that are not the 9 here: name their"):
        same_classes(checkpoint, "x", list(FACTORS["color"])[:9])


def test_another_number_of_processes_waits_for_the_next_epoch(run_ranks, stopped, folders):
    more = ["--schedule", "2", "--wd", "0", *LRS, "--resume"]
    codes, _ = run(run_ranks, 2, folders, stopped, *more, "auto")
    assert len(set(codes)) == 1 and "an epoch of 1 processes, and here it would be 2" in codes[0]
    codes, output = run(run_ranks, 2, folders, stopped, *more, stopped / "checkpoint_previous.pth.tar")
    assert codes == [0, 0] and "note: processes was 1 in " in output


def test_what_can_go_on_is_noted_and_what_does_not_matter_is_not(stopped, folders, tmp_path, cli):
    changed = ["--wd", "0.5", "--schedule", "1", "2", "--pretrained", "nowhere", "-j", "1", "-p", "2"]
    code, output, errors = cli(main_lincls.main, *words(folders, stopped), *changed)
    assert code == 0, errors
    newest = stopped / "checkpoint.pth.tar"
    notes = [line for line in output.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: schedule was [2] in {newest} and is [1, 2] from here on",
        f"note: weight_decay was 0.0 in {newest} and is 0.5 from here on",
        "note: --pretrained nowhere is not read: what goes on has its features",
    ]
    # A checkpoint of before says nothing of this, and a validation alone does not ask.
    old = {"settings", "data", "classes", "confusion", "step", "logs"}
    checkpoint = {name: value for name, value in load(stopped).items() if name not in old}
    save_checkpoint(checkpoint, tmp_path / "old")
    more = [*changed, "--epochs", "4", "-b", "4", "--resume", tmp_path / "old"]
    code, output, errors = cli(main_lincls.main, *words(folders, tmp_path), *more)
    assert code == 0 and output.count("note: ") == 1 and "Epoch: [3]" in output, errors
    code, output, _ = cli(main_lincls.main, *words(folders, stopped), "-b", "4", "--wd", "1", "-e")
    assert code == 0 and "note: " not in output and " * Acc@1" in output


def test_the_results_of_another_evaluation_are_set_aside(folders, tmp_path, cli):
    fresh = [word for word in words(folders, tmp_path) if word not in ("--resume", "auto")]
    names = ["checkpoint.pth.tar", "linear.json", "model_best.pth.tar"]
    assert cli(main_lincls.main, *fresh)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in names}
    code, output, _ = cli(main_lincls.main, *fresh, "--seed", "4")
    assert code == 0 and f"note: 3 file(s) of another run in {tmp_path} are set aside" in output
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*names, "linear.jsonl", *(f"{name}.before" for name in names)]
    )
    for name in names:
        assert (tmp_path / f"{name}.before").read_bytes() == before[name] != (tmp_path / name).read_bytes()
    # With --resume of an earlier file, the newest is not what --resume auto is to find later.
    (tmp_path / "checkpoint_previous.pth.tar").write_bytes(before["checkpoint.pth.tar"])
    more = ["--epochs", "4", "--resume", tmp_path / "checkpoint_previous.pth.tar"]
    code, output, errors = cli(main_lincls.main, *fresh, *more)
    assert code == 0 and f"note: 1 file(s) of another run in {tmp_path} are set aside" in output, errors
