"""Whole runs of the two programs: what they print, what they write, and how they go on."""

import os
import re

import pytest
import torch
from command_lines import MOCO, SMALL

import main_lincls
import main_moco
from moco import run_settings, trifeature

STEP = re.compile(
    r"Epoch: \[\d\]\[\d/\d\]\tTime +[\d.]+ \( *[\d.]+\)\tData +[\d.]+ \( *[\d.]+\)\tLoss \d\.\d{4}e[+-]\d\d "
    r"\(\d\.\d{4}e[+-]\d\d\)\tAcc@1 +[\d.]+ \( *[\d.]+\)\tAcc@5 +[\d.]+ \( *[\d.]+\)"
    r"\t\d+ images/s\t\d+ s left"
)


def long_lines(output, *paths):
    """Those of more than 80 letters but upstream's long ones, of steps, and those with one of the paths."""
    excused = ("Epoch: [", "Test: [")
    lines = [line for line in output.splitlines() if not line.startswith(excused)]
    assert len(lines) > 5 and len(lines) < len(output.splitlines())
    return [line for line in lines if len(line) > 80 and not any(str(path) in line for path in paths)]


def test_pretraining_prints_and_writes_what_upstream_does(pretrained, folders):
    output, out = pretrained
    assert len(STEP.findall(output)) == 2 * 3
    assert "ln(1+K) = 3.0445" in output
    assert re.search(r"queue 100% full,\n   \d+ images/s, \d+ s an epoch, 0 s left\n", output)
    assert long_lines(output, folders) == []
    assert "a query and its key share" not in output  # as there are two BatchNorm groups
    assert "holds every one of" not in output
    assert sorted(os.listdir(out)) == ["checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar", "log.jsonl"]
    checkpoint = torch.load(out / "checkpoint_0001.pth.tar", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["arch"] == "resnet18"
    names = set(checkpoint["state_dict"])
    assert {
        "module.encoder_q.conv1.weight",
        "module.encoder_k.fc.2.bias",
        "module.queue",
        "module.queue_ptr",
    } <= names
    assert checkpoint["state_dict"]["module.queue_ptr"].tolist() == [48 % 20]
    assert (
        len(checkpoint["optimizer"]["param_groups"][0]["params"]) == 2 * 64
    )  # both encoders', as upstream's


def test_resume_continues_as_if_never_stopped(pretrained, folders, tmp_path, cli):
    _, out = pretrained
    words = [*MOCO, "--epochs", "2", "--method", "ifm", "--bn-splits", "2", folders, "--output-dir", tmp_path]
    code, _, errors = cli(main_moco.main, *words, "--resume", out / "checkpoint_0000.pth.tar")
    assert code == 0, errors
    whole, resumed = (
        torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"]
        for folder in (out, tmp_path)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    earlier = torch.load(out / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
    assert not all(torch.equal(whole[name], earlier[name]) for name in whole)


def test_linear_evaluation_goes_on_by_itself(folders, tmp_path, cli):
    words = [*SMALL, folders, "--lr", "1", "--resume", "auto", "--output-dir"]
    code, output, errors = cli(main_lincls.main, *words, tmp_path / "whole", "--epochs", "2")
    assert code == 0 and "--resume auto: nothing to go on from yet" in output, errors
    for epochs in ("1", "2"):
        code, output, _ = cli(main_lincls.main, *words, tmp_path / "parts", "--epochs", epochs)
        assert code == 0
    assert f"--resume auto: {tmp_path / 'parts' / 'checkpoint.pth.tar'}" in output
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_linear_evaluation_from_checkpoint_to_accuracy(pretrained, folders, tmp_path, cli):
    path = pretrained[1] / "checkpoint_0001.pth.tar"
    words = [*SMALL, folders, "--output-dir", tmp_path, "--lr", "1"]
    code, output, errors = cli(
        main_lincls.main, *words, "--epochs", "2", f"--pretrained={path}", "--schedule", "1"
    )
    assert code == 0, errors
    reached = re.findall(r"^ \* Acc@1 (\d+\.\d{3}) Acc@5 100\.000$", output, re.MULTILINE)
    assert len(reached) == 2 and long_lines(output, folders, tmp_path, path) == []
    best = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    newest = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert newest["best_acc1"] == best["best_acc1"] == pytest.approx(max(map(float, reached)), abs=1e-3)
    assert best["state_dict"]["module.fc.weight"].shape == (3, 512)  # as many classes as there are folders
    source = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(best["state_dict"]["module.conv1.weight"], source["module.encoder_q.conv1.weight"])

    _, output, _ = cli(main_lincls.main, *words, "-e", "--resume", tmp_path / "model_best.pth.tar")
    assert f" * Acc@1 {best['best_acc1']:.3f} " in output
    code, output, _ = cli(
        main_lincls.main, *words, "--epochs", "3", "--resume", tmp_path / "checkpoint.pth.tar"
    )
    assert code == 0
    assert "Epoch: [2]" in output
    assert "Epoch: [1]" not in output


def test_linear_evaluation_finds_frozen_weights_that_moved(folders, tmp_path, cli, monkeypatch):
    real = main_lincls.train_epoch

    def thaw(run, *arguments):
        found = real(run, *arguments)
        run.model.module.bn1.running_mean.add_(1)
        return found

    monkeypatch.setattr(main_lincls, "train_epoch", thaw)
    with pytest.raises(RuntimeError, match=r"changed frozen tensors: bn1\.running_mean"):
        cli(main_lincls.main, *SMALL, folders, "--epochs", "1", "--lr", "1", "--output-dir", tmp_path)


def test_trifeature_is_drawn_and_its_factors_are_read(tmp_path, cli, monkeypatch):
    drawn = []

    def small(folder, size, renders):
        drawn.append((size, renders))
        if not folder.exists():
            trifeature.generate(folder, 16, 1, progress=False)

    monkeypatch.setattr(run_settings.trifeature, "ensure", small)
    words = [*SMALL, "--dataset", "trifeature", "--dataset_root", tmp_path]
    words += ["--output-dir", tmp_path, "--epochs", "1"]
    code, output, errors = cli(main_lincls.main, *words, "-b", "400", "--target", "color", "--lr", "1")
    assert code == 0, errors
    assert "800 training and 200 validation images" in output
    assert "10 classes" in output
    assert drawn == [(64, 4)]
    code, _, errors = cli(main_lincls.main, *words)
    assert code == 2
    assert "choose a --target" in errors


def test_notes_on_one_batchnorm_group_and_on_a_long_queue(folders, tmp_path, cli):
    code, output, errors = cli(
        main_moco.main, *MOCO, folders, "--output-dir", tmp_path, "--moco-k", "25", "--epochs", "1"
    )
    assert code == 0, errors
    assert "statistics that\n   a query and its key share" in output
    assert "a queue of 25 keys holds every one of 24 images more than once" in output
    assert long_lines(output, folders, tmp_path) == []
