"""Linear evaluation that is stopped, killed or meets a damaged file continues exactly from an epoch's end."""

import os
import re
import shutil
import signal
import sys

import pytest
import torch
from command_lines import SMALL
from forked_program import forked
from linear_runs import WORDS, evaluated, load, run, same
from made_folders import make_folders
from tiny import TinyEncoder

import main_lincls
from moco import files
from moco.builder import MoCo
from moco.errors import UserError
from moco.evaluate import linear
from moco.run.signals import EXIT_CODE
from moco.trifeature import FACTORS

LRS = ["--lr", "1", "3"]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """`whole(run_ranks, world)`: the folder of a run with two values that never stopped."""
    made = {}

    def get(run_ranks, world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"whole{world}")
            assert run(run_ranks, world, folders, made[world], *LRS)[0] == [0] * world
        return made[world]

    return get


def equal(out, other):
    """Whether two runs ended with the same checkpoint and the same report."""
    reports = [(folder / "linear.json").read_text() for folder in (out, other)]
    return same(load(out), load(other)) and reports[0] == reports[1]


def printed(output):
    """The epochs whose steps were printed, with how many."""
    return [output.count(f"Epoch: [{epoch}]") for epoch in range(3)]


# An epoch has 3 training steps, then 2 validation steps; with two processes the second has 1 of these.
@pytest.mark.parametrize(
    ("world", "call", "where", "steps"),
    [
        (1, 2, "in epoch 0", [2, 0, 0]),
        (1, 3, "after epoch 0", [3, 0, 0]),
        (1, 9, "after epoch 1", [3, 3, 0]),
        (1, 11, "in epoch 2", [3, 3, 1]),
        (2, 5, "in epoch 1", [3, 1, 0]),
        (2, 8, "after epoch 1", [3, 3, 0]),
    ],
)
def test_a_signal_stops_it_and_it_continues_exactly(
    run_ranks, folders, tmp_path, whole, world, call, where, steps
):
    codes, output = run(run_ranks, world, folders, tmp_path, *LRS, stop=(world - 1, call))
    assert codes == [EXIT_CODE] * world
    finished = steps.count(3)
    stopped, advice = output.splitlines()[-2:]
    assert stopped.startswith(f"stopped {where} (")
    assert advice.strip() == (
        f"--resume auto continues from epoch {finished}" if finished else "nothing is saved yet"
    )
    assert printed(output) == steps and (tmp_path / "linear.json").exists() == (finished > 0)
    assert (tmp_path / "checkpoint.pth.tar").exists() == (finished > 0)
    if finished:
        assert load(tmp_path)["epoch"] == finished
        assert not same(load(tmp_path), load(whole(run_ranks, world)))  # negative control

    codes, output = run(run_ranks, world, folders, tmp_path, *LRS, "--resume", "auto")
    assert codes == [0] * world and printed(output) == [3 * (epoch >= finished) for epoch in range(3)]
    assert equal(tmp_path, whole(run_ranks, world))
    assert not (tmp_path / "checkpoint_previous.pth.tar").exists()


# An epoch has 3 training steps, the last with an image for rank 0 and none for rank 1, and 1 of validation.
@pytest.mark.parametrize(("call", "steps"), [(3, [3, 0, 0]), (6, [3, 2, 0])])
def test_so_it_does_when_a_rank_has_no_image_in_the_last_step(run_ranks, tmp_path, call, steps):
    make_folders(tmp_path / "data", train=7)
    words, whole, parts = [*LRS, "-b", "10"], tmp_path / "whole", tmp_path / "parts"
    assert run(run_ranks, 2, tmp_path / "data", whole, *words)[0] == [0, 0]
    codes, output = run(run_ranks, 2, tmp_path / "data", parts, *words, stop=(1, call))
    assert codes == [EXIT_CODE] * 2 and printed(output) == steps
    assert not same(load(parts), load(whole))  # negative control
    assert run(run_ranks, 2, tmp_path / "data", parts, *words, "--resume", "auto")[0] == [0, 0]
    assert equal(parts, whole)


def test_another_value_leaves_other_files(run_ranks, folders, tmp_path, whole):
    assert run(run_ranks, 1, folders, tmp_path, "--lr", "1", "4")[0] == [0]  # negative control of the above
    assert not equal(tmp_path, whole(run_ranks, 1))


def killed(folders, out, module, name, to, number):
    """Run in a forked process that is killed at call `number` of module.name whose last argument is a path
    with `to` in its name; at fsync_path half of it is written. (How it ended, what it printed.)
    """
    real, calls = getattr(module, name), [0]

    def counted(*arguments, **options):
        if to in os.path.basename(arguments[-1]):
            calls[0] += 1
            if calls[0] == number:
                if name == "fsync_path":
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    def main():
        setattr(module, name, counted)
        sys.argv = ["main_lincls.py", *map(str, [*WORDS, *LRS, folders, "--output-dir", out])]
        main_lincls.main()

    pid, output = forked(main, (1, 2))
    text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


# At which call the saving of the second epoch is killed, and which checkpoint there is to continue from.
FAULTS = {
    "in the file": (files, "fsync_path", "checkpoint.", 2, "checkpoint"),
    "before the names": (files.os, "replace", "checkpoint_previous.", 1, "checkpoint"),
    "between the names": (files.os, "replace", "checkpoint.", 2, "checkpoint_previous"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kill_9_while_it_saves(run_ranks, folders, tmp_path, cli, whole, fault):
    *where, left = FAULTS[fault]
    code, text = killed(folders, tmp_path, *where)
    assert code == -signal.SIGKILL, text
    assert "Epoch: [1][2/3]" in text and "Epoch: [2]" not in text
    assert [path.name for path in tmp_path.glob("checkpoint*")] == [f"{left}.pth.tar"]
    assert load(tmp_path, f"{left}.pth.tar")["epoch"] == 1

    words = [*WORDS, *LRS, folders, "--output-dir", tmp_path, "--resume", "auto"]
    code, output, errors = cli(main_lincls.main, *words)
    assert (code, errors) == (0, "") and f"--resume auto: {tmp_path / left}.pth.tar" in output
    assert printed(output) == [0, 3, 3] and equal(tmp_path, whole(run_ranks, 1))


@pytest.fixture
def stopped(run_ranks, folders, tmp_path):
    """The folder of an evaluation that was stopped after its second epoch, with the checkpoint before."""
    out = tmp_path / "stopped"
    assert run(run_ranks, 1, folders, out, *LRS, stop=(0, 10))[0] == [EXIT_CODE]
    assert [load(out, f"checkpoint{name}.pth.tar")["epoch"] for name in ("", "_previous")] == [2, 1]
    return out


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "flipped": data}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_newest_file_is_named_and_the_one_before_is_used(
    run_ranks, folders, stopped, cli, whole, how
):
    newest, before = stopped / "checkpoint.pth.tar", stopped / "checkpoint_previous.pth.tar"
    damage(newest, how)
    words = [*WORDS, *LRS, folders, "--output-dir", stopped, "--resume", "auto"]
    code, output, errors = cli(main_lincls.main, *words)
    assert code == 0, errors
    assert f"warning: {newest} " in output and f"--resume auto: {before}" in output
    assert printed(output) == [0, 3, 3] and equal(stopped, whole(run_ranks, 1))


def test_without_a_readable_file_nothing_starts_anew(folders, stopped, cli):
    for path in stopped.glob("checkpoint*"):
        damage(path, "flipped")
    names = sorted(os.listdir(stopped))
    words = [*WORDS, *LRS, folders, "--output-dir", stopped, "--resume", "auto"]
    code, output, errors = cli(main_lincls.main, *words)
    assert code == 2 and "none of the 2 checkpoints" in errors and errors.count("\n") == 1
    assert "Epoch" not in output and sorted(os.listdir(stopped)) == names


def test_what_cannot_continue_says_why_and_the_rest_is_noted(folders, stopped, tmp_path, cli):
    words = [*WORDS, "--output-dir", stopped, "--resume", "auto"]
    for lrs in (["1"], ["3", "1"], ["1", "3", "10"], ["1", "4"]):
        code, output, errors = cli(main_lincls.main, *words, folders, "--lr", *lrs)
        assert code == 2 and f"is of --lr 1 3, not {' '.join(lrs)}: continue with the same" in errors
        assert errors.count("\n") == 1 and "Epoch" not in output
    make_folders(tmp_path / "other", ("ape", "bee", "cat"))
    code, _, errors = cli(main_lincls.main, *words, *LRS, tmp_path / "other")
    assert code == 2 and "3 classes, the data set has 3 others (first difference: ant there, ape" in errors
    torch.save({**load(stopped), "step": 2}, tmp_path / "within")  # as earlier versions wrote
    more = ["--output-dir", tmp_path / "out", "--resume", tmp_path / "within"]
    code, _, errors = cli(main_lincls.main, *words, *more, *LRS, folders)
    assert code == 2 and "saved within an epoch" in errors and "checkpoint_previous.pth.tar" in errors
    odd = [("heads", [1, 2]), ("heads", "x"), ("confusion", 3), ("optimizer", {}), ("classes", 3)]
    for name, value in odd:
        entries = {**load(stopped), name: value}
        torch.save(entries, tmp_path / "odd")
        more = ["--output-dir", tmp_path / "out", "--resume", tmp_path / "odd", "--overwrite"]
        code, _, errors = cli(main_lincls.main, *words, *more, *LRS, folders)
        assert (code == 2 and errors.count("\n") == 1) or (code == 0 and name in ("confusion", "optimizer"))

    changed = ["--wd", "0.5", "--schedule", "1", "-b", "4", "-j", "1", "-p", "2"]
    code, output, errors = cli(main_lincls.main, *words, *LRS, folders, *changed)
    assert code == 0, errors
    names = [line.split()[1] for line in output.splitlines() if line.startswith("note: ")]
    assert sorted(names) == ["batch_size", "global_batch", "schedule", "weight_decay"]
    code, output, errors = cli(main_lincls.main, *words, *LRS, folders)
    assert code == 0 and output.endswith("all 3 epochs are finished\n")  # as a job that restarts may ask
    code, output, errors = cli(
        main_lincls.main, *words, *LRS, folders, "--resume", stopped / "checkpoint.pth.tar"
    )
    assert code == 2 and "has finished 3 epochs; raise --epochs" in errors


def test_another_target_has_other_classes():
    checkpoint = {"classes": list(FACTORS["color"])}
    linear.check_classes(checkpoint, "x", list(FACTORS["color"]))
    linear.check_classes({}, "x", list(FACTORS["shape"]))  # as of upstream
    unnamed = {"state_dict": {"head.bias": torch.zeros(10)}}
    linear.check_classes(unnamed, "x", list(FACTORS["shape"]), "head")
    with pytest.raises(UserError, match="x has 10 classes, which it does not name, the data set has 9; give"):
        linear.check_classes(unnamed, "x", list(FACTORS["color"])[:9], "head")
    with pytest.raises(UserError, match="x has 10 classes, the data set has 10 others .first difference: "):
        linear.check_classes(checkpoint, "x", list(FACTORS["shape"]))
    with pytest.raises(UserError, match="x has 10 classes, the data set has 9 others; give"):
        linear.check_classes(checkpoint, "x", list(FACTORS["color"])[:9])


def test_a_folder_of_another_run_is_refused_unless_overwrite(folders, stopped, cli):
    words = [*WORDS, *LRS, folders, "--output-dir", stopped]
    before = {path.name: path.read_bytes() for path in stopped.glob("*.pth.tar")}
    code, output, errors = cli(main_lincls.main, *words)
    assert code == 2 and "has checkpoints of another run" in errors and "--resume auto" in errors
    assert {path.name: path.read_bytes() for path in stopped.glob("*.pth.tar")} == before and len(before) == 3
    code, output, errors = cli(main_lincls.main, *words, "--overwrite")
    assert code == 0 and printed(output) == [3, 3, 3], errors


def test_a_validation_alone_and_upstreams_file(run_ranks, folders, tmp_path, whole, cli):
    done = whole(run_ranks, 1)
    kept = load(done, "model_best.pth.tar")
    words = [*WORDS, folders, "--output-dir", tmp_path]
    for path, reached in (
        (done / "model_best.pth.tar", kept["best_acc1"]),
        (done / "checkpoint.pth.tar", None),
    ):
        code, output, errors = cli(main_lincls.main, *words, *LRS, "-e", "--resume", path)
        [acc1] = re.findall(r"^ \* Acc@1 (\S+) Acc@5 100.000$", output, re.M)
        assert code == 0 and "Epoch" not in output, errors
        assert reached is None or acc1 == f"{reached:.3f}"
    code, _, errors = cli(main_lincls.main, *words, *LRS, "-e", "--resume", "auto")
    assert code == 2 and "--evaluate finds no classifier in --output-dir" in errors
    shutil.copy(done / "checkpoint.pth.tar", tmp_path)
    code, output, errors = cli(main_lincls.main, *words, *LRS, "-e", "--resume", "auto")
    assert code == 0 and f" * Acc@1 {acc1} " in output, errors
    assert os.listdir(tmp_path) == ["checkpoint.pth.tar"]

    upstreams = {name: kept[name] for name in ("epoch", "arch", "state_dict", "best_acc1", "optimizer")}
    upstreams["best_acc1"] = torch.tensor(upstreams["best_acc1"])  # as published
    torch.save(upstreams, tmp_path / "upstreams")
    words += ["--epochs", "4", "--overwrite", "--resume", tmp_path / "upstreams", "--lr"]
    code, output, errors = cli(main_lincls.main, *words, f"{kept['lr']:g}")
    assert code == 0 and f"Epoch: [{kept['epoch']}]" in output, errors
    assert load(tmp_path)["best_acc1"] >= kept["best_acc1"]
    code, _, errors = cli(main_lincls.main, *words, "1", "3")
    assert code == 2 and "is of --lr one unknown value, not 1 3" in errors


# Validation alone: only val/ is needed.


def classifier_of(folder, answer, classes, outputs):
    """The words to validate a classifier that gives every image the class number `answer`.

    classes: the names in its file, or None.
    """
    network = TinyEncoder(outputs)
    network.fc.weight.data.zero_()
    network.fc.bias.data.zero_()[answer] = 1
    path = folder / f"{answer} {classes}.pth.tar"
    names = {} if classes is None else {"classes": classes}
    torch.save({"epoch": 1, "arch": "tiny", "state_dict": network.state_dict(), **names}, path)
    return [*WORDS, "-e", "--resume", path, "--output-dir", folder / "out"]


def validated(cli, words, *more):
    """The top-1 accuracy in percent, or the line of an error."""
    code, output, errors = cli(main_lincls.main, *words, *more)
    if code:
        assert code == 2 and errors.count("\n") == 1
        return errors
    return float(re.search(r"^ \* Acc@1 (\S+)", output, re.M)[1])


THREE = ["ant", "bee", "cat"]


@pytest.mark.parametrize("more", [[], ["--cache", "decoded"], ["-j", "1"]])
@pytest.mark.parametrize("splits", [["val"], ["train", "val"]])
def test_a_class_missing_in_val_leaves_the_others_their_numbers(tmp_path, cli, splits, more):
    make_folders(tmp_path / "data", THREE)
    shutil.rmtree(tmp_path / "data" / "val" / "ant")
    if "train" not in splits:
        shutil.rmtree(tmp_path / "data" / "train")
    words = [tmp_path / "data", *more]
    answers = [classifier_of(tmp_path, answer, THREE, 3) for answer in range(3)]
    assert [validated(cli, one, *words) for one in answers] == [0, 50, 50]
    of_upstream = [classifier_of(tmp_path, answer, None, 3) for answer in range(3)]
    if "train" in splits:
        assert [validated(cli, one, *words) for one in of_upstream] == [0, 50, 50]
    else:
        sentence = (
            f"does not name its 3 classes, and {tmp_path}/data/val has 2: add train/, whose folders say"
        )
        assert sentence in validated(cli, of_upstream[0], *words)
        made = classifier_of(tmp_path, 1, None, 2)  # as many classes as folders
        assert validated(cli, made, *words) == 50


def test_a_class_in_val_that_the_classifier_lacks_is_refused(tmp_path, cli):
    make_folders(tmp_path / "data", ("ape", "bee", "cat"))
    of_others = f"class ape is in {tmp_path}/data/val but not one of the 3 of "
    assert of_others in validated(cli, classifier_of(tmp_path, 0, THREE, 3), tmp_path / "data")
    assert "has 4 classes, the data set has 3 others" in validated(
        cli, classifier_of(tmp_path, 0, None, 4), tmp_path / "data"
    )
    shutil.rmtree(tmp_path / "data" / "train" / "ape")
    assert f"class ape is in {tmp_path}/data/val but not in train/" in validated(
        cli, classifier_of(tmp_path, 0, None, 3), tmp_path / "data"
    )
    assert "entry classes is no list of names" in validated(
        cli, classifier_of(tmp_path, 0, 3, 3), tmp_path / "data"
    )
    shutil.rmtree(tmp_path / "data" / "val")
    assert "has no folder val/" in validated(cli, classifier_of(tmp_path, 0, THREE, 3), tmp_path / "data")


def test_a_factor_of_trifeature_needs_only_val(tmp_path, cli):
    make_folders(tmp_path / "data", ["triangle_solid_red", "square_solid_blue"])
    shutil.rmtree(tmp_path / "data" / "train")
    colors = list(FACTORS["color"])
    for answer in ("red", "green"):
        words = classifier_of(tmp_path, colors.index(answer), colors, 10)
        assert validated(cli, words, tmp_path / "data", "--target", "color") == 50 * (answer == "red")
    assert "10 classes, the data set has 10 others (first difference: " in validated(
        cli, words, tmp_path / "data", "--target", "shape"
    )
    assert "give the folder and --target of that run" in validated(cli, words, tmp_path / "data")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_more_ranks_than_images_to_validate(run_ranks, tmp_path, world):
    make_folders(tmp_path / "data", ("bee", "cat"), val=1)
    shutil.rmtree(tmp_path / "data" / "train")
    words = [*classifier_of(tmp_path, 2, THREE, 3), tmp_path / "data", "-b", world]
    for code, output in run_ranks(world, evaluated, words):
        assert code == 0 and (" * Acc@1 50.000" in output or not output)


def test_pretrained_gives_the_features_and_not_the_head(folders, tmp_path, cli):
    torch.manual_seed(7)
    model = MoCo(TinyEncoder, 5, 16, mlp=True)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 9, "arch": "tiny", "state_dict": state, "optimizer": {}}, tmp_path / "moco.pth.tar")
    words = [*WORDS, folders, "--epochs", "1", "--schedule", "--output-dir", tmp_path, "--lr", "1e-30"]
    code, output, errors = cli(main_lincls.main, *words, "--pretrained", tmp_path / "moco.pth.tar")
    assert code == 0 and f"features of {tmp_path / 'moco.pth.tar'}" in output, errors
    found = load(tmp_path)["state_dict"]
    encoder = {name: tensor for name, tensor in model.encoder_q.state_dict().items() if "fc." not in name}
    assert same({name.removeprefix("module."): t for name, t in found.items() if "fc." not in name}, encoder)
    assert 0.001 < found["module.fc.weight"].std() < 0.03 and found["module.fc.bias"].abs().max() < 1e-29

    words = [*SMALL, folders, "--output-dir", tmp_path / "out", "--pretrained", tmp_path / "moco.pth.tar"]
    code, _, errors = cli(main_lincls.main, *words)
    assert code == 2 and "is of -a tiny, not of -a resnet18" in errors
    code, _, errors = cli(main_lincls.main, *words[:-1], tmp_path / "nowhere.pth.tar")
    assert code == 2 and "nowhere.pth.tar" in errors and errors.count("\n") == 1
