"""What a run writes about itself: log.jsonl, TensorBoard's files, and the numbers in them."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from command_lines import losses_of
from test_resume import WORDS, checkpoints, content, pretrained
from written_logs import expected_scalars, lines_of, scalars

import main_moco
from moco import feature_statistics
from moco.errors import UserError
from moco.run_log import JsonLines, RunLog, git_state
from moco.watch import PREEMPTED

NUMBERS = {
    *("loss", "acc1", "acc5", "lr", "seconds", "data_seconds", "images_per_s", "memory_mb", "queue_fill"),
    *("pos_similarity", "neg_similarity", "alignment", "uniformity"),
}
START = {
    *("kind", "time", "program", "command", "settings", "versions", "git", "host", "device", "processes"),
    *("images", "steps", "global_batch", "batchnorm_groups", "chance", "epoch", "step"),
}


def test_feature_statistics_are_those_of_loops():
    torch.manual_seed(0)
    N, C, K = 7, 5, 11
    q, k, queue = (torch.nn.functional.normalize(torch.randn(n, C).double(), dim=1) for n in (N, N, K))

    def dot(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))

    pairs = [(i, j) for j in range(N) for i in range(j)]
    expected = {
        "pos_similarity": sum(dot(q[i], k[i]) for i in range(N)) / N,
        "neg_similarity": sum(dot(q[i], key) for i in range(N) for key in queue) / (N * K),
        "alignment": sum(squared(q[i], k[i]) for i in range(N)) / N,
        "uniformity": math.log(sum(math.exp(-2 * squared(q[i], q[j])) for i, j in pairs) / len(pairs)),
    }
    found = feature_statistics.similarities(q, k, queue.T.mean(dim=1))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-12)
    other = feature_statistics.similarities(q, k.roll(1, 0), queue.T.roll(1, 0).mean(dim=1))
    differ = {name for name in expected if other[name].item() != pytest.approx(expected[name], rel=1e-3)}
    assert differ == {"pos_similarity", "neg_similarity", "alignment"}  # negative control


def test_the_log_has_every_number_and_those_of_the_console(folders, tmp_path, cli):
    words = [*WORDS, "-p", "2", "--knn", "2", "--tensorboard", "--output-dir", tmp_path, folders]
    code, output, errors = cli(main_moco.main, *words)
    assert code == 0, errors
    start, *others = lines_of(tmp_path)
    assert set(start) == START and start["kind"] == "start" and start["program"] == "main_moco.py"
    assert start["command"][:2] == ["main_moco.py", "-a"] and start["settings"]["method"] == "ifm"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", start["time"])
    assert set(start["versions"]) == {"python", "torch", "torchvision", "numpy", "pillow"}
    plain = {"processes": 1, "images": 24, "steps": 3, "global_batch": 8, "epoch": 0, "step": 0}
    plain["batchnorm_groups"] = 1
    assert {name: start[name] for name in plain} == plain
    assert start["device"] == "cpu" and start["chance"] > math.log(21)

    steps = [entry for entry in others if entry["kind"] == "step"]
    assert [(entry["epoch"], entry["step"]) for entry in steps] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert all(set(entry) == {"kind", "epoch", "step"} | NUMBERS for entry in steps)
    assert [f"{entry['loss']:.4e}" for entry in steps] == losses_of(output)
    assert [entry["queue_fill"] for entry in steps] == [0.4, 1, 1, 1]
    assert all(isinstance(entry[name], (int, float)) for entry in steps for name in NUMBERS)
    assert all(-1 <= entry["pos_similarity"] <= 1 for entry in steps)
    assert all(
        entry["alignment"] == pytest.approx(2 - 2 * entry["pos_similarity"], abs=1e-4) for entry in steps
    )
    rates = [f"{entry['images_per_s']:.0f} images/s" for entry in steps]
    assert re.findall(r"^Epoch.*\t(\d+ images/s)\t", output, re.MULTILINE) == rates

    epochs = [entry for entry in others if entry["kind"] == "epoch"]
    assert epochs.pop(1) == {name: value for name, value in epochs[-1].items() if name != "knn"}  # before kNN
    assert [set(entry) - NUMBERS for entry in epochs] == [{"kind", "epoch"}, {"kind", "epoch", "knn"}]
    means = re.findall(r"^epoch \d: loss (\d\.\d{4})", output, re.MULTILINE)
    assert [f"{entry['loss']:.4f}" for entry in epochs] == means
    assert f" * kNN class {epochs[1]['knn']['class']:.1f} (" in output and output.count("kNN") == 1
    for entry, two in zip(epochs, (steps[:2], steps[2:]), strict=True):
        for name in ("pos_similarity", "uniformity"):
            assert entry[name] == pytest.approx((two[0][name] + two[1][name]) / 2, rel=1e-5)
        assert entry["seconds"] == pytest.approx(two[0]["seconds"] + 2 * two[1]["seconds"])
        assert entry["images_per_s"] == pytest.approx(24 / entry["seconds"])
    found = scalars(tmp_path / "tensorboard")
    assert found == pytest.approx(expected_scalars(others), rel=1e-6)
    assert len(found) == 6 * len(NUMBERS) + 1


@pytest.mark.parametrize("world", [1, 2])
def test_seeing_a_run_changes_no_bit_of_it(run_ranks, folders, tmp_path, world):
    runs = {"unseen": ["-p", "100"], "seen": ["-p", "1", "--knn", "1", "--tensorboard"]}
    if world == 1:
        runs["another seed"] = ["--seed", "4"]
    for name, words in runs.items():
        (tmp_path / name).mkdir()
        words = [*WORDS, "--bn-splits", 2, "-j", 0, *words, "--output-dir", tmp_path / name]
        assert run_ranks(world, pretrained, words, folders) == [0] * world
    unseen, seen, *others = (content(tmp_path / name) for name in runs)
    assert seen.pop("noted") != unseen.pop("noted")  # what is logged of the steps that are printed
    assert seen == unseen
    others.append(content(tmp_path / "seen", "checkpoint_0000.pth.tar"))
    for other in others:  # negative control
        assert all(seen[name] != other[name] for name in ("state_dict", "optimizer", "log"))
    assert [len(line.get("knn", {})) for line in lines_of(tmp_path / "seen")[1:]] == [0, 0, 0, 0, 1] * 2
    assert lines_of(tmp_path / "seen")[0]["processes"] == world
    assert (tmp_path / "seen" / "tensorboard").is_dir()


def told_while_evaluating(rank, world, words, folder):
    """As `pretrained`, but every evaluation gets SIGTERM in its middle. Also: how often it was called."""
    real, calls = main_moco.KnnEvaluation._percent, [0]

    def percent(*arguments):
        calls[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    main_moco.KnnEvaluation._percent = percent
    try:
        return pretrained(rank, world, words, folder), calls[0]
    finally:
        main_moco.KnnEvaluation._percent = real


def test_a_signal_while_evaluating_ends_the_run_after_that_epoch(run_ranks, folders, tmp_path, world=2):
    words = [*WORDS, "--knn", "1", "--output-dir", tmp_path, "--resume", "auto"]
    ends = run_ranks(world, told_while_evaluating, words, folders)
    assert ends == [(PREEMPTED, 1)] * world
    assert checkpoints(tmp_path) == ["checkpoint_0000.pth.tar"]
    before = lines_of(tmp_path)
    assert [line["kind"] for line in before] == [
        "start",
        *["step"] * 3,
        "epoch",
        "epoch",
    ] and "knn" in before[-1]

    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind":"step","epoch":1,"st')  # as a kill in mid-line leaves it
    assert run_ranks(world, told_while_evaluating, words, folders) == [(0, 1)] * world  # only epoch 1's
    lines = lines_of(tmp_path)
    assert lines[: len(before)] == before
    after = lines[len(before) :]
    assert [(line["kind"], line["epoch"]) for line in after] == [
        ("start", 1),
        *[("step", 1)] * 3,
        *[("epoch", 1)] * 2,  # before and after the evaluation
    ]
    assert after[-1]["knn"]


def test_what_is_not_printed_is_not_computed(folders, tmp_path, cli, monkeypatch):
    called = []
    real = feature_statistics.similarities
    monkeypatch.setattr(main_moco, "similarities", lambda *args: called.append(1) or real(*args))
    words = [*WORDS, "--epochs", "1", folders, "--output-dir", tmp_path, "-p", "2"]
    assert cli(main_moco.main, *words)[0] == 0
    assert len(called) == 2 and len([line for line in lines_of(tmp_path) if line["kind"] == "step"]) == 2


def test_without_tensorboard_it_is_said_before_anything_starts(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = [*WORDS, folders, "--output-dir", tmp_path, "--tensorboard"]
    code, output, errors = cli(main_moco.main, *words)
    assert code == 2 and "pip install tensorboard" in errors and errors.count("\n") == 1
    assert output == "" and os.listdir(tmp_path) == []


def test_numbers_that_json_lacks_and_a_full_disk(tmp_path):
    log = RunLog(JsonLines(tmp_path / "log.jsonl"))
    log.write("step", epoch=1, step=2, loss=torch.tensor(torch.nan), lr=math.inf, acc1=torch.tensor(1.5))
    (line,) = lines_of(tmp_path)
    assert set(line) == {"kind", "epoch", "step"} | NUMBERS
    assert (line["loss"], line["lr"], line["acc1"], line["acc5"]) == (None, None, 1.5, None)
    if os.path.exists("/dev/full"):
        with pytest.raises(UserError, match="cannot write /dev/full .*; free space or choose another"):
            RunLog(JsonLines("/dev/full")).write("epoch", epoch=0)
    with pytest.raises(UserError, match="cannot write .*; free space or choose another"):
        JsonLines(tmp_path)


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
