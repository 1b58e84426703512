"""From a released model's name to its linear accuracy in one command, the file served by a local server."""

import torch
from command_lines import SMALL
from fake_web import fake_web, whole
from linear_runs import load
from torchvision import models

import main_lincls


def test_a_name_is_downloaded_and_evaluated(folders, tmp_path, cli, monkeypatch):
    torch.manual_seed(0)
    encoder = models.resnet50(num_classes=128)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for name in ("weight", "bias"):  # the head of MoCo v2: fc is a hidden layer and the last one
        state[f"module.encoder_q.fc.2.{name}"] = state.pop(f"module.encoder_q.fc.{name}")
        state[f"module.encoder_q.fc.0.{name}"] = torch.zeros(2048, *[2048] * (name == "weight"))
    state |= {name.replace("encoder_q", "encoder_k"): tensor for name, tensor in state.items()}
    state |= {"module.queue": torch.zeros(128, 65536), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    released = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}
    torch.save(released, tmp_path / "released")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    words = [*SMALL, folders, "-a", "resnet50", "--epochs", "1", "--lr", "1", "--pretrained"]
    with fake_web(whole((tmp_path / "released").read_bytes())) as web:
        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        outputs = []
        for out in ("one", "two"):
            code, output, errors = cli(main_lincls.main, *words, "ifm-eps0.1", "--output-dir", tmp_path / out)
            assert code == 0, errors
            outputs.append(output)
        assert web.requests == ["/ifm-eps0.1.pth.tar"]  # once: the file is kept
    assert " * Acc@1 " in outputs[0]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    found = load(tmp_path / "one")["state_dict"]
    assert torch.equal(found["module.layer4.2.conv3.weight"], encoder.layer4[2].conv3.weight)

    code, _, errors = cli(main_lincls.main, *words, "ifm-esp0.1", "--output-dir", tmp_path / "three")
    assert code == 2
    assert "did you mean ifm-eps0.1?" in errors
