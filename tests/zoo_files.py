"""Released checkpoints as they could be, and torch.hub's folder for them: fixtures and their helpers."""

import pytest
import torch
import torchvision


@pytest.fixture(name="checkpoints", scope="session")
def released_checkpoints(tmp_path_factory):
    """A checkpoint of MoCo v2 as zip, one of MoCo v1 in torch's older format, and the model in both."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=128)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    v1 = {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(v1, folder / "v1", _use_new_zipfile_serialization=False)
    fc = {name: state[name] for name in state if ".fc." in name}
    hidden = {name.replace("fc", "fc.2"): tensor for name, tensor in fc.items()}
    v2 = {name: tensor for name, tensor in state.items() if name not in fc} | hidden
    torch.save(v1 | {"state_dict": v2}, folder / "v2")
    model.fc = torch.nn.Identity()
    yield {"v1": folder / "v1", "v2": folder / "v2", "model": model.eval()}
    for name in ("v1", "v2"):
        (folder / name).unlink()


@pytest.fixture(name="cache")
def empty_cache(tmp_path, monkeypatch):
    """An empty folder for torch.hub, no mirror, and no proxy before 127.0.0.1."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("ZOO_BASE_URL", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints" / "moco"


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
