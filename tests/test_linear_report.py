"""The report of linear evaluation: what it counts, what it shows, and what it writes."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_lines import SMALL, losses_of
from tiny import TinyEncoder

import main_lincls
from moco import linear_report, plot, run_settings, trifeature
from moco.errors import UserError
from moco.factors import FACTORS
from moco.heads import Head
from moco.run_log import OF_BOTH


def head(lr, *acc1, diverged=None):
    history = [
        {"epoch": epoch, "loss": 123.456 / (epoch + 1), "acc1": value, "acc5": 99.5}
        for epoch, value in enumerate(acc1)
    ]
    return Head(lr, None, None, None, history, diverged)


def test_the_table_shows_final_and_best_and_fits():
    heads = [head(1, 50.0, 70.0, 60.0), head(0.00123456789, 70.0), head(30, 10.0, diverged=1)]
    heads.append(head(1e30, diverged=0))
    header, *rows = linear_report.table(heads)
    assert all(len(row) == len(header) <= 80 for row in rows)
    assert rows[0].split() == ["1", "60.000", "99.500", "70.000", "99.500", "1", "41.1520"]
    assert rows[2].split() == ["30", "diverged,", "epoch", "1", "10.000", "99.500", "0", "nan", "or", "inf"]
    assert rows[3].split() == ["1e+30", "diverged,", "epoch", "0", "-", "-", "-", "nan", "or", "inf"]
    assert linear_report.best_head(heads) is heads[0]  # the first of equal ones
    said = list(linear_report.lines(heads, ["a", "b"], [[0, 1, 2], [1, 1, 2]], 70.0, "linear.json"))
    assert "--lr 1 is the best of 4 compared on the validation split itself" in said[-3]
    assert said[-1] == "best Acc@1 70.000 (chance 50.000)" and max(map(len, said)) <= 80
    assert not any("the best of" in line for line in linear_report.lines(heads[:1], ["a"], None, 70.0, "x"))


def test_the_worst_classes_are_those_of_a_matrix():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 30, (2, 500))
    predictions[::2] = targets[::2]
    confusion = linear_report.confusion_of(torch.from_numpy(targets), torch.from_numpy(predictions))
    matrix = np.zeros((30, 30), int)
    np.add.at(matrix, (targets, predictions), 1)
    assert confusion == [[i, j, matrix[i, j]] for i, j in np.argwhere(matrix).tolist()]
    names = [f"class{i}" for i in range(30)]
    _, *rows = linear_report.worst_classes(confusion, names)
    right = matrix.diagonal() / matrix.sum(1)
    order = sorted(range(30), key=lambda i: (right[i], i))
    assert len(rows) == 10 and [row.split()[0] for row in rows] == [names[i] for i in order[:10]]
    for i, row in zip(order, rows, strict=False):
        others = np.where(np.arange(30) == i, 0, matrix[i])
        share = f"({100 * others.max() / matrix[i].sum():.1f}"
        assert row.split()[1:] == [
            str(matrix[i].sum()), f"{100 * right[i]:.1f}", names[others.argmax()], share, "%)"
        ]  # fmt: skip


def test_long_names_and_no_mistakes():
    lines = list(linear_report.worst_classes([[0, 1, 12345], [1, 1, 3]], ["n" * 70, "m" * 70]))
    assert len(lines) == 2 and max(map(len, lines)) <= 80 and "n" * 23 + ".." in lines[1]
    assert list(linear_report.worst_classes([[1, 1, 3]], "ab")) == [
        "all 3 validation images are classified right"
    ]


def shares(rank, world):
    return linear_report.confusion_of(torch.tensor([rank, 0]), torch.tensor([1, 1]))


def test_every_process_counts(run_ranks):
    assert run_ranks(2, shares) == [[[0, 1, 3], [1, 1, 1]]] * 2


def test_factors_of_trifeature_are_named_and_each_image_counted_once(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(main_lincls, "base_encoder", lambda arch: TinyEncoder)
    monkeypatch.setattr(
        run_settings.trifeature, "ensure", lambda folder, size, renders: folder.exists()
        or trifeature.generate(folder, 16, 1, workers=1, progress=False),
    )  # fmt: skip
    words = [*SMALL, "--dataset", "trifeature", "--dataset_root", tmp_path, "--output-dir", tmp_path]
    words += ["--epochs", "1", "-b", "200", "-p", "100", "--target", "color"]
    for lrs in (["1"], ["1", "3"]):
        code, output, errors = cli(main_lincls.main, *words, "--lr", *lrs)
        assert code == 0, errors
        check_report(lrs, output, (tmp_path / "linear.json").read_text())


def check_report(lrs, output, text):
    report = json.loads(text)
    assert report["classes"] == list(FACTORS["color"]) and report["seed"] == 3
    counted = np.zeros((10, 10), int)
    for true, taken, count in report["confusion"]:
        counted[true, taken] = count
    assert counted.sum(1).tolist() == [20] * 10
    best = report["best"]
    assert counted.trace() / 2 == pytest.approx(best["acc1"])
    assert best["acc1"] == max(entry["acc1"] for one in report["heads"] for entry in one["epochs"])
    assert [one["lr"] for one in report["heads"]] == list(map(float, lrs))
    lines = output.splitlines()
    assert lines[-1] == f"best Acc@1 {best['acc1']:.3f} (chance 10.000)"
    start = next(i for i, line in enumerate(lines) if line.startswith("class "))
    assert lines[start + 1].split()[0] in report["classes"] and lines[start + 1].split()[1] == "20"
    assert ("of --lr" in output) == (len(lrs) > 1)
    assert text == json.dumps(report, sort_keys=True) + "\n"


def test_the_log_has_what_the_console_and_the_report_say(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(main_lincls, "base_encoder", lambda arch: TinyEncoder)
    (tmp_path / "log.jsonl").write_text("of the pre-training\n")
    words = [*SMALL, "-p", "2", "--epochs", "2", "--schedule", "1", "--output-dir", tmp_path, folders]
    code, output, errors = cli(main_lincls.main, *words, "--lr", "1", "1e38", "3")
    assert code == 0, errors
    assert (tmp_path / "log.jsonl").read_text() == "of the pre-training\n"
    start, *others = map(json.loads, (tmp_path / "linear.jsonl").read_text().splitlines())
    told = {"program": "main_lincls.py", "images": 24, "validation_images": 9, "classes": 3, "steps": 3}
    told |= {"processes": 1, "global_batch": 8, "epoch": 0, "step": 0, "chance": math.log(3)}
    assert told.items() <= start.items() and {"command", "versions", "git", "host", "device"} <= start.keys()
    assert start["settings"]["lr"] == [1.0, 1e38, 3.0] and start["settings"]["target"] is None

    steps = [entry for entry in others if entry["kind"] == "step"]
    assert [(entry["epoch"], entry["step"]) for entry in steps] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert all(set(entry) == {"kind", "epoch", "step", "head", *OF_BOTH} for entry in steps)
    assert all(isinstance(entry[name], float) for entry in steps for name in OF_BOTH)
    assert [f"{entry['loss']:.4e}" for entry in steps] == losses_of(output)
    assert [entry["lr"] for entry in steps] == [entry["head"] / 10 ** entry["epoch"] for entry in steps]

    epochs = [entry for entry in others if entry["kind"] == "epoch"]
    report = json.loads((tmp_path / "linear.json").read_text())
    printed = re.findall(r"^ \* Acc@1 (\S+) Acc@5 (\S+)$", output, re.M)
    for number, (entry, (acc1, acc5)) in enumerate(zip(epochs, printed, strict=True)):
        assert (f"{entry['val_acc1']:.3f}", f"{entry['val_acc5']:.3f}") == (acc1, acc5)
        assert [own["head"] for own in entry["heads"]] == start["settings"]["lr"]
        assert [own["diverged"] for own in entry["heads"]] == [None, 0, None]
        for own, head in zip(entry["heads"], report["heads"], strict=True):
            if head["diverged"] is None:
                assert own["lr"] == pytest.approx(own["head"] / 10**number)
                written = {name: head["epochs"][number][name] for name in ("loss", "acc1", "acc5")}
                assert written == {"loss": own["loss"], "acc1": own["val_acc1"], "acc5": own["val_acc5"]}
                assert 0 <= own["acc1"] <= own["acc5"] <= 100
            else:
                assert own["loss"] is own["val_acc1"] is own["acc1"] is own["lr"] is None
        best = next(own for own in entry["heads"] if own["head"] == entry["head"])
        assert best.items() <= entry.items()

    picture = tmp_path / "linear.png"
    code, _, errors = cli(plot.main, tmp_path / "linear.jsonl", "-o", picture)
    assert code == 0 and picture.is_file(), errors
    code, _, errors = cli(plot.main, tmp_path, "-o", picture, "--force")
    assert code == 2 and "log.jsonl is no log" in errors  # the folder stands for its pre-training


def test_a_report_that_cannot_be_written_is_said(tmp_path):
    one = SimpleNamespace(lr=1.0, diverged=None, history=[], best={"acc1": 1.0})
    with pytest.raises(UserError, match=r"cannot write .*linear.json .*choose another --output-dir"):
        linear_report.write(tmp_path / "missing" / "linear.json", [one], ["a"], None)
