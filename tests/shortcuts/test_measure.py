"""What is read belongs to the right images, with the right bits; and whether a run has learned its bits."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from moco import options
from moco.builder import MoCo
from moco.data.device import normalize
from moco.data.experiments import HELD_OUT, HELD_OUT_AGAIN, TRAIN, TRAIN_AGAIN, bits_of
from moco.data.folders import labeled_folders, targets_of
from moco.encoders import base_encoder
from moco.errors import DivergedError
from moco.shortcuts import measure
from moco.trifeature import FACTORS, SETTINGS, factor_of

CPU = torch.device("cpu")
FLAGS = ["-a", "conv3", "--image-size", "32", "--seed", "5", "--random-bits", "2", "--moco-k", "64", "--mlp"]
STEP = 25  # between the levels of a channel that encode the values of a factor


def levels(x):
    """The mean bytes (N, 3) of normalized views (N, 3, H, W)."""
    black, white = (normalize(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)).flatten() for v in (0, 255))
    return (x.mean(dim=(2, 3)) - black) / (white - black) * 255


class Looks(nn.Module):
    """The ten values of three factors, encoded in red, green and blue, as 30 features of 0 or 1; moved on by
    as much as the bits of an image say, 0 to 9.
    """

    def forward(self, x):
        moved = (x[:, 3:, 0, 0] * 2 ** torch.arange(x.shape[1] - 3)).sum(dim=1, keepdim=True)
        numbers = ((levels(x[:, :3]) / STEP).round() + moved).long() % 10
        return F.one_hot(numbers, 10).flatten(1).float()


@pytest.fixture
def combinations(tmp_path):
    """A folder of two parts with combinations of their own, whose images encode the factors."""
    for split, offsets in (("train", ((0, 0), (1, 2), (4, 9))), ("val", ((3, 5), (7, 1)))):
        for i in range(10):
            for a, b in offsets:
                numbers = i, (i + a) % 10, (i + b) % 10
                values = (names[n] for names, n in zip(FACTORS.values(), numbers, strict=True))
                folder = tmp_path / split / "_".join(values)
                folder.mkdir(parents=True)
                for render in range(2):
                    pixels = tuple(STEP * n for n in numbers)
                    Image.new("RGB", (20, 16), pixels).save(folder / f"{render}.png")
    (tmp_path / SETTINGS).write_text("{}")
    return tmp_path


def test_each_part_is_read_by_its_own_labels(combinations):
    for factor in FACTORS:  # the premise: combination numbers mean something else in val
        train, val, _ = labeled_folders(combinations, factor)
        by_name = [factor_of(val.classes[t], factor) for t in val.targets]
        assert targets_of(val).tolist() == by_name != [train.target_transform(t) for t in val.targets]
    found = measure.readouts(Looks(), combinations, 16, seed=4, bits=0, device=CPU)
    assert found == {"own": {factor: {"accuracy": 100, "converged": True} for factor in FACTORS}}


def test_with_random_bits_there_are_two_further_readings(combinations, monkeypatch):
    monkeypatch.setattr(measure, "BATCH", 20)
    real, seen = measure.with_channels, []
    monkeypatch.setattr(measure, "with_channels", lambda x, bits: (seen.append(bits), real(x, bits))[1])
    found = measure.readouts(Looks(), combinations, 16, seed=4, bits=8, device=CPU)
    percent = {name: [each["accuracy"] for each in readout.values()] for name, readout in found.items()}
    assert percent["shared"] == [100, 100, 100]
    assert max(percent["own"] + percent["redrawn"]) < 60  # negative control: bits are in the way
    parts = zip((TRAIN, HELD_OUT, TRAIN_AGAIN, HELD_OUT_AGAIN), (60, 40) * 2, strict=True)
    bits = [bits_of(4, part, range(count), 8) for part, count in parts]
    expected = torch.cat([*bits[:2], bits[0][:1].expand(100, -1), *bits[2:]])
    assert torch.equal(torch.cat(seen), expected) and len(seen) == 15


def test_features_that_are_not_finite_have_diverged(combinations):
    with pytest.raises(DivergedError, match="a feature is not finite"):
        measure.readouts(lambda x: x.mean(dim=(2, 3)) * torch.nan, combinations, 16, 4, 0, CPU)


class BitsOnly(nn.Module):
    """Features of length 1 that are nothing but the bits of an image, as +1 and -1."""

    def forward(self, x):
        return x[:, 3:, 0, 0] * 2 - 1


@pytest.mark.parametrize(("per", "is_learned"), [("image", True), ("view", False)])
def test_the_wrong_bits_raise_the_loss_of_an_encoder_that_uses_them(combinations, per, is_learned):
    words = ["-a", "conv3", "-b", "20", "--seed", "5", "--image-size", "16", "--random-bits", "6"]
    run = options.pretraining([*words, "--resize", "pil", "--bits-per", per])
    model = MoCo(base_encoder("conv3", 6, image_size=16), 6, 32, T=0.1)
    model.encoder_q = model.encoder_k = BitsOnly()
    matched, mismatched = measure.contrastive_losses(model.eval(), run, combinations, CPU)
    assert (mismatched - matched > 5) == is_learned and abs(mismatched - matched) < 20
    if not is_learned:  # no two views of an image have the same bits
        assert abs(mismatched - matched) < 1


def test_a_run_is_measured_from_its_start_or_its_checkpoint(combinations, tmp_path, cli):
    def model(seed):
        torch.manual_seed(seed)
        return MoCo(base_encoder("conv3", 2, image_size=32), 128, 64, mlp=True)

    def read(*words):
        code, output, errors = cli(
            measure.main, tmp_path / "found.json", combinations, *FLAGS, "-b", "20", *words
        )
        assert (code, errors) == (0, "") and output.startswith("own bits: shape ")
        return json.loads((tmp_path / "found.json").read_text())

    for seed in (5, 6):
        state = {f"module.{name}": value for name, value in model(seed).state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"{seed}.pth.tar")
    entries = [{"kind": "epoch", "epoch": e, "loss": 5.0 - e, "queue_mean": 0.1} for e in (0, 1, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    start, trained, other = read(), *(read("--pretrained", tmp_path / f"{seed}.pth.tar") for seed in (5, 6))
    assert start["readout"] == trained["readout"] != other["readout"]
    assert "loss" not in start and trained["loss"]["training"] == 4.0
    assert trained["course"] == {"info_nce": [5.0, 4.0], "queue_mean": [0.1, 0.1]}
    assert trained["loss"]["matched"] < trained["loss"]["mismatched"] < 10
    assert start["versions"]["torch"] == torch.__version__


def test_wrong_use_is_a_sentence(combinations, tmp_path, cli):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "bare.pth.tar")
    for words, message in (
        ([*FLAGS, "--pretrained", tmp_path / "bare.pth.tar"], "bare.pth.tar"),
        ([*FLAGS, "--random-bits", "64"], "--random-bits"),
        (FLAGS[:2], "--seed"),
    ):
        code, _, errors = cli(measure.main, tmp_path / "none.json", combinations, *words)
        assert code == 2 and message in errors and not (tmp_path / "none.json").exists()
