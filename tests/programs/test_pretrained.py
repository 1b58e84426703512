"""Pre-training from weights: which tensors are taken, which stay as drawn, what is said, what is refused."""

import numpy as np
import pytest
import torch
from command_lines import MOCO, TINY
from fake_web import fake_web
from fake_web import whole as served
from PIL import Image
from run_files import checkpoints
from started_runs import run
from tiny import TinyEncoder
from torchvision import models
from written_logs import lines_of

import main_moco

STILL = ["--epochs", "1", "--lr", "1e-30", "--moco-k", "40", "--workers", "0"]  # of 40 keys 24 are replaced
HEAD = ("encoder_q.fc.", "encoder_k.fc.")


def tensors(path):
    """The encoders and the queue of a checkpoint, without BatchNorm's statistics, which training changes."""
    state = torch.load(path, weights_only=True)["state_dict"]
    names = [name for name in state if "running" not in name and "num_batches" not in name]
    return {name.removeprefix("module."): state[name] for name in names if "queue_ptr" not in name}


def first(folder):
    return tensors(folder / "checkpoint_0000.pth.tar")


def plain(seed=5):
    """The state_dict of a network without MoCo, with a classifier of 9 classes."""
    torch.manual_seed(seed)
    return TinyEncoder(9).state_dict()


@pytest.fixture(scope="module")
def fresh(folders, tmp_path_factory):
    """The tensors of a run without --pretrained."""
    out = tmp_path_factory.mktemp("fresh")
    run(*TINY, *STILL, folders, "--output-dir", out)
    return first(out)


@pytest.mark.parametrize("dim", ["8", "7"])
def test_a_run_of_moco_gives_both_encoders_and_a_head_that_fits(dim, whole, fresh, folders, tmp_path):
    path = whole(1) / "checkpoint_0001.pth.tar"
    output = run(*TINY, *STILL, "--moco-dim", dim, "--pretrained", path, folders, "--output-dir", tmp_path)
    before, after = tensors(path), first(tmp_path)
    fits = dim == "8"
    head = "" if fits else "the head fc (encoder_q.fc.2.weight is (8, 8) there and (7, 8) in tiny), "
    taken, left = (10, 12) if fits else (6, 16)
    said = (
        f"{taken} of the encoder's 10 tensors are those under module.encoder_q. of the file's "
        f"state_dict, {left} of"
    )
    assert f"pretrained: {path}: {said} other parts left out; fresh: {head}the queue" in output.splitlines()
    for name in ("encoder_q.conv.weight", "encoder_q.bn.weight", *[HEAD[0] + "2.weight"] * fits):
        assert torch.equal(after[name], before[name]) and not torch.equal(after[name], fresh[name])
        assert torch.allclose(after[name.replace("q.", "k.", 1)], before[name])  # not the file's key encoder
    assert not torch.allclose(before["encoder_k.conv.weight"], before["encoder_q.conv.weight"], rtol=1e-4)
    if fits:
        assert torch.equal(after["queue"][:, 24:], fresh["queue"][:, 24:])
        assert not torch.equal(after["queue"][:, :24], fresh["queue"][:, :24])
    taken = torch.load(tmp_path / "checkpoint_0000.pth.tar", weights_only=True)["pretrained"]
    assert taken == str(path) == lines_of(tmp_path)[0]["pretrained"]


@pytest.mark.parametrize(("ending", "world"), [("pth", 2), ("safetensors", 1)])
def test_a_plain_network_gives_all_but_its_classifier(ending, world, fresh, folders, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path, out = tmp_path / f"network.{ending}", tmp_path / "out"
    (safetensors.save_file if ending == "safetensors" else torch.save)(plain(), path)
    output = run(*TINY, *STILL, "--pretrained", path, folders, "--output-dir", out, world=world)
    said = "of the file's state_dict, 2 of other parts left out; fresh: the head fc, the queue\n"
    assert f"6 of the encoder's 10 tensors are those {said}" in output and output.count("pretrained:") == 1
    for name, tensor in first(out).items():
        encoder, _, own = name.partition(".")
        if name.startswith(HEAD):
            assert torch.allclose(tensor, fresh[name])
        elif encoder != "queue":
            assert torch.allclose(tensor, plain()[own])
            assert not torch.allclose(plain()[own], plain(6)[own]) or own.startswith("bn")


def test_a_classifier_of_the_heads_shape_is_no_head_and_batchnorms_statistics_are_taken(folders, tmp_path):
    state = TinyEncoder(8).state_dict()
    state["bn.running_mean"] += 1e6
    torch.save(state, tmp_path / "network.pth")
    words = ["-a", "tiny", "--moco-dim", "8", "--pretrained", tmp_path / "network.pth"]
    plain_moco = [word for word in MOCO if word != "--mlp"]  # whose head is one layer too
    output = run(*plain_moco, *STILL, *words, "--bn-splits", "2", folders, "--output-dir", tmp_path / "out")
    assert "fresh: the head fc, the queue\n" in output
    found = torch.load(tmp_path / "out" / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
    for encoder in ("encoder_q", "encoder_k"):
        assert (found[f"module.{encoder}.bn.running_mean"] > 1e5).all()


def test_resume_wins_and_what_the_run_started_from_stays_known(folders, tmp_path, cli):
    path, out = tmp_path / "network.pth", tmp_path / "out"
    torch.save(plain(), path)
    words = [*TINY, "--workers", "0", "--pretrained", path, folders, "--output-dir", out]
    run(*words, "--epochs", "1")
    before = (out / "checkpoint_0000.pth.tar").read_bytes()
    path.unlink()
    newest = out / "checkpoint_0000.pth.tar"
    output = run(*words, "--resume", "auto")
    assert f"the run continues from {newest}: --pretrained {path} is not read" in output
    assert "Epoch: [1]" in output and "Epoch: [0]" not in output
    found = torch.load(out / "checkpoint_0001.pth.tar", weights_only=True)
    assert (
        found["pretrained"]
        == str(path)
        == [line for line in lines_of(out) if line["kind"] == "start"][1]["pretrained"]
    )

    words[words.index(path)] = newest
    code, output, errors = cli(main_moco.main, *words, "--overwrite")
    assert code == 2 and f"--overwrite would remove --pretrained {newest}" in errors
    assert newest.read_bytes() == before and output == ""


def small_stem():
    return models.resnet18(num_classes=2).state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (
            plain() | {"conv.weight": torch.zeros(8, 3, 7, 7)},
            [],
            "conv.weight is (8, 3, 7, 7) there and (8, 3",
        ),
        ({"arch": "resnet18", "state_dict": plain()}, [], "is of -a resnet18, not of -a tiny"),
        (small_stem(), ["-a", "resnet18"], "is of a network with --stem small: add the flag"),
        (small_stem(), ["-a", "resnet34", "--stem", "small"], "those of resnet18; name that with --arch"),
        (plain(), ["--random-bits", "2"], "--random-bits adds channels of which --pretrained has no weights"),
        (None, [], "there is no file"),
        (None, ["--pretrained", "torchvison"], "did you mean torchvision?"),
        (None, ["--pretrained", "torchvision", "-a", "conv3"], "torchvision has no weights of conv3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(content, words, said, folders, tmp_path, cli):
    if content:
        torch.save(content, tmp_path / "weights")
    out = tmp_path / "out"
    words = ["--pretrained", tmp_path / "weights", *words, folders, "--output-dir", out]
    code, output, errors = cli(main_moco.main, *TINY, *words)
    assert code == 2 and said in errors and errors.count("\n") == 1, errors
    assert output == "" and not (out.exists() and checkpoints(out))


@pytest.mark.slow
def test_a_released_model_continues_on_a_folder_of_photographs(tmp_path, cli, monkeypatch):
    """With a nested folder, a hidden one and a file that is no image; the model comes from a server."""
    rng = np.random.default_rng(0)
    for folder, count in (("photos", 8), ("photos/of/2024", 7), ("photos/.thumbnails", 3)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.jpg")
    (tmp_path / "photos" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    torch.manual_seed(0)
    encoder = models.resnet50(num_classes=128)
    encoder.fc = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), encoder.fc)
    state = {
        f"module.{one}.{name}": tensor
        for one in ("encoder_q", "encoder_k")
        for name, tensor in encoder.state_dict().items()
    }
    state |= {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state}, tmp_path / "released")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = [*MOCO, "-a", "resnet50", "--moco-dim", "128", "--epochs", "1", "--on-bad-image", "skip"]
    words += ["--pretrained", "ifm-eps0.1", tmp_path / "photos", "--output-dir", tmp_path / "out"]
    with fake_web(served((tmp_path / "released").read_bytes())) as web:
        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        code, output, errors = cli(main_moco.main, *words)
    assert code == 0, errors
    assert web.requests == ["/ifm-eps0.1.pth.tar"]
    assert "16 images in 2 folders\n  1 hidden folder left out" in output
    assert f"{tmp_path / 'photos' / 'cut.jpg'} cannot be read" in output + errors
    assert "322 of the encoder's 322 tensors are those under module.encoder_q. of" in output
    assert "fresh: the queue\n" in output
