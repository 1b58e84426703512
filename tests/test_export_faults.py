"""Exports that cannot be made: a sentence, and the files that were there stay as they were."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_models import write_checkpoint

from moco.errors import UserError
from moco.export import SUFFIXES, export

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    path = tmp_path_factory.mktemp("v2") / "checkpoint_0199.pth.tar"
    return path, write_checkpoint(path, "resnet18")


def test_wrong_use_is_a_sentence_and_writes_nothing(resnet18, tmp_path, monkeypatch):
    path = resnet18[0]
    content = torch.load(path, weights_only=True)

    def variant(name, **changes):
        torch.save({**content, **changes}, tmp_path / name)
        return tmp_path / name

    def refused(sentence, checkpoint, out, to, **options):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        with pytest.raises(UserError, match=sentence):
            export(checkpoint, tmp_path / out, to, **options)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "page.pth.tar").write_text("<!DOCTYPE html>")
    (tmp_path / "half.pth.tar").write_bytes(path.read_bytes()[:100_000])
    without_encoder = {"module.queue": content["state_dict"]["module.queue"]}
    without_arch = {name: value for name, value in content.items() if name != "arch"}
    torch.save(without_arch, tmp_path / "anonymous.pth.tar")

    refused("exists already.*--force", path, "there.pth", "timm")
    refused(r"must end in \.pkl", path, "out.pth", "detectron2")
    refused("folder .*nowhere does not exist", path, "nowhere/out.pth", "timm")
    refused("no file .*ifm-eps0.11.*did you mean ifm-eps0.1", "ifm-eps0.11", "out.pth", "timm")
    refused("is a web page", tmp_path / "page.pth.tar", "out.pth", "timm")
    refused("damaged|cannot be read", tmp_path / "half.pth.tar", "out.pth", "timm")
    refused("resnet50.*does not fit.*--arch", variant("50.pth.tar", arch="resnet50"), "out.pth", "timm")
    refused("did you mean resnet18", variant("typo.pth.tar", arch="resnet81"), "out.pth", "timm")
    refused("lacks", variant("queue.pth.tar", state_dict=without_encoder), "out.pth", "timm")
    refused("--arch, such as resnet50", tmp_path / "anonymous.pth.tar", "out.pth", "timm")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        refused("pip install safetensors", path, "out.safetensors", "safetensors")
    write_checkpoint(tmp_path / "shuffle.pth.tar", "shufflenet_v2_x0_5")
    refused("timm has no shufflenet", tmp_path / "shuffle.pth.tar", "out.pth", "timm")

    assert export(tmp_path / "anonymous.pth.tar", tmp_path / "named.pth", "timm", arch="resnet18") == (
        "resnet18",
        120,
    )
    export(path, tmp_path / "there.pth", "timm", force=True)
    assert len(torch.load(tmp_path / "there.pth", weights_only=True)) == 120


def test_a_full_disk_and_ctrl_c_leave_nothing(resnet18, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for to, suffixes in SUFFIXES.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # a file may not grow further
        try:
            with pytest.raises(UserError, match="cannot write"):
                export(resnet18[0], tmp_path / f"out{suffixes[0]}", to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []

    def interrupted(state, file):
        file.write(b"half")
        seen.extend(os.listdir(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)
        file.write(b"the other half")

    seen = []
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(resnet18[0], tmp_path / "out.pth", "timm")
    assert seen and os.listdir(tmp_path) == []


def test_the_checkpoint_itself_is_never_replaced(tmp_path):
    write_checkpoint(tmp_path / "self.pth", "resnet18")
    before = (tmp_path / "self.pth").read_bytes()
    (tmp_path / "link.pth").symlink_to("self.pth")
    os.link(tmp_path / "self.pth", tmp_path / "hard.pth")
    for name in ("self.pth", "link.pth", "hard.pth"):
        with pytest.raises(UserError, match="is the checkpoint itself"):
            export(tmp_path / "self.pth", tmp_path / name, "timm", force=True)
        assert (tmp_path / name).read_bytes() == before and len(os.listdir(tmp_path)) == 3
    (tmp_path / "copy.pth").write_bytes(before)  # the same bytes are not the same file
    export(tmp_path / "self.pth", tmp_path / "copy.pth", "timm", force=True)
    assert (tmp_path / "copy.pth").read_bytes() != before == (tmp_path / "self.pth").read_bytes()


def test_names_that_are_too_long_for_a_file(resnet18, tmp_path):
    with pytest.raises(UserError, match="there is no file xxx"):
        export("x" * 400, tmp_path / "out.pth", "timm")
    with pytest.raises(UserError, match="cannot write .*File name too long"):
        export(resnet18[0], tmp_path / f"{'x' * 400}.pth", "timm")
    with pytest.raises(UserError, match="the folder .* does not exist"):
        export(resnet18[0], tmp_path / ("x" * 400) / "out.pth", "timm")
    assert os.listdir(tmp_path) == []


def test_the_program_ends_with_a_sentence(tmp_path):
    command = [
        sys.executable,
        "-m",
        "moco.export",
        "nowhere.pth.tar",
        str(tmp_path / "out.pth"),
        "--to",
        "timm",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no file nowhere.pth.tar" in done.stderr
