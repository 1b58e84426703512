"""Checkpoint files: upstream's layout in both formats, strangers' files, and what is no checkpoint."""

import os
import pickle
import zipfile

import pytest
import torch
from tiny import TinyEncoder

from moco.builder import MoCo
from moco.checkpoint import check_arch, encoder_state, load_strictly, save_checkpoint
from moco.checkpoint_reader import read_checkpoint
from moco.errors import UserError


def upstream_layout(mlp):
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 4, 8, mlp=mlp)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"epoch": 200, "arch": "tiny", "state_dict": state, "optimizer": sgd.state_dict()}, model


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "", "module._orig_mod."])
def test_upstream_files_are_read(tmp_path, zipped, mlp, prefix):
    checkpoint, model = upstream_layout(mlp)
    checkpoint["state_dict"] = {
        name.replace("module.", prefix, 1): tensor for name, tensor in checkpoint["state_dict"].items()
    }
    path = tmp_path / "file.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    loaded = read_checkpoint(path)
    assert loaded["epoch"] == 200
    fresh = MoCo(TinyEncoder, 4, 8, mlp=mlp)
    load_strictly(fresh, loaded["state_dict"], path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True)
    )
    backbone = encoder_state(loaded, path)
    assert sorted(backbone) == sorted(
        name for name in TinyEncoder(4).state_dict() if not name.startswith("fc.")
    )
    assert torch.equal(backbone["conv.weight"], model.encoder_q.conv.weight)


def upstream_rule(checkpoint, model):
    """How MoCo's linear evaluation takes the encoder out of a checkpoint, written out."""
    taken = {}
    for name, tensor in checkpoint["state_dict"].items():
        if name.startswith("module.encoder_q") and not name.startswith("module.encoder_q.fc"):
            taken[name[len("module.encoder_q.") :]] = tensor
    message = model.load_state_dict(taken, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"}
    assert not message.unexpected_keys


def test_our_files_load_by_upstreams_rule(tmp_path):
    checkpoint, model = upstream_layout(mlp=True)
    path = tmp_path / "checkpoint_0000.pth.tar"
    save_checkpoint(checkpoint, path)
    assert os.listdir(tmp_path) == [path.name]
    fresh = TinyEncoder(10)
    upstream_rule(torch.load(path, weights_only=True), fresh)
    assert torch.equal(fresh.conv.weight, model.encoder_q.conv.weight)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped):
    path, sprung = tmp_path / "trap.pth.tar", tmp_path / "sprung"
    checkpoint, _ = upstream_layout(mlp=False)
    torch.save({**checkpoint, "extra": Trap(sprung)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert sprung.exists()


def test_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.pth.tar"
    torch.save({"state_dict": {"x": torch.zeros(1000)}}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name) + b"\0" * (1 << 20))
    with pytest.raises(UserError, match="zip bomb"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "is a web page"),
        (b"just text", "not a checkpoint"),
        (pickle.dumps([1, 2], protocol=2), "not a checkpoint|no state_dict"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, message):
    path = tmp_path / "file.pth.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_said(tmp_path, keep):
    path = tmp_path / "file.pth.tar"
    save_checkpoint(upstream_layout(mlp=True)[0], path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


def test_other_models_are_told_apart(tmp_path):
    checkpoint, _ = upstream_layout(mlp=True)
    path = tmp_path / "file.pth.tar"
    save_checkpoint(checkpoint, path)
    loaded = read_checkpoint(path)
    for other in (
        MoCo(TinyEncoder, 4, 16, mlp=True),
        MoCo(TinyEncoder, 4, 8),
        MoCo(TinyEncoder, 6, 8, mlp=True),
    ):
        with pytest.raises(UserError, match="does not fit"):
            load_strictly(other, loaded["state_dict"], path)
    with pytest.raises(UserError, match="is of -a tiny, not of -a resnet50"):
        check_arch(loaded, "resnet50", path)
    with pytest.raises(UserError, match="holds no encoder"):
        encoder_state({"state_dict": {"fc.weight": torch.zeros(1)}}, path)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint({}, tmp_path / "missing" / "file.pth.tar")
