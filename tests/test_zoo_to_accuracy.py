"""From a released model's name to its linear accuracy in one command, the file served by a local server."""

import torch
from fake_web import fake_web, whole
from torchvision import models

import main_lincls
from moco import zoo


def test_a_name_is_downloaded_and_evaluated(folders, tmp_path, cli, monkeypatch):
    torch.manual_seed(0)
    encoder = models.resnet50(num_classes=128)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"module.encoder_k.{name}": tensor for name, tensor in encoder.state_dict().items()}
    hidden = {"fc.0.weight": torch.zeros(2048, 2048), "fc.0.bias": torch.zeros(2048)}
    for side in ("encoder_q", "encoder_k"):
        head = {
            "fc.2.weight": state.pop(f"module.{side}.fc.weight"),
            "fc.2.bias": state.pop(f"module.{side}.fc.bias"),
        }
        state |= {f"module.{side}.{name}": tensor for name, tensor in (hidden | head).items()}
    state |= {"module.queue": torch.zeros(128, 65536), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save(
        {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}, tmp_path / "released"
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    words = [
        folders,
        "--image-size",
        "16",
        "-b",
        "8",
        "--workers",
        "0",
        "--epochs",
        "1",
        "--lr",
        "1",
        "--seed",
        "0",
    ]
    words += ["--output-dir", tmp_path / "out", "--pretrained", "ifm-eps0.1"]
    with fake_web(whole((tmp_path / "released").read_bytes())) as web:
        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        code, output, errors = cli(main_lincls.main, *words)
        assert code == 0, errors
        assert [path for path, _ in web.requests] == ["/ifm-eps0.1.pth.tar"]
        code, again, errors = cli(main_lincls.main, *words)
        assert code == 0, errors
        assert len(web.requests) == 1  # the file is kept
    assert " * Acc@1 " in output
    assert output.splitlines()[-1] == again.splitlines()[-1]
    best = torch.load(tmp_path / "out" / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert torch.equal(best["module.layer4.2.conv3.weight"], encoder.layer4[2].conv3.weight)

    code, _, errors = cli(main_lincls.main, *words[:-1], "ifm-esp0.1")
    assert code == 2
    assert "did you mean ifm-eps0.1?" in errors
    assert zoo.cache_folder().is_relative_to(tmp_path)
