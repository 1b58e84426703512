"""What is read from an encoder belongs to the right images, with the right bits."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from moco.builder import MoCo
from moco.data.device import normalize
from moco.data.experiments import HELD_OUT, TRAIN, bits_of
from moco.data.folders import labeled_folders, targets_of
from moco.encoders import base_encoder
from moco.errors import DivergedError
from moco.run import checkpoint
from moco.run.backbone import load_encoder
from moco.shortcuts import measure
from moco.trifeature import FACTORS, SETTINGS, factor_of

CPU = torch.device("cpu")
ARCH = "shufflenet_v2_x0_5"
FLAGS = ["-a", ARCH, "--image-size", "32", "--seed", "5", "--random-bits", "2"]
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
    found = measure.readouts(combinations, CPU, Looks(), 16, seed=4, random_bits=0)
    assert list(found) == ["readout"] and list(found["readout"]) == ["shape", "texture", "color"]
    for readout in found["readout"].values():
        assert (readout["accuracy"], readout["chance"], readout["converged"]) == (100, 10, True)


def test_with_random_bits_a_second_reading_gives_all_images_those_of_one(combinations, monkeypatch):
    monkeypatch.setattr(measure, "BATCH", 20)
    real, seen = measure.with_channels, []
    monkeypatch.setattr(measure, "with_channels", lambda x, bits: (seen.append(bits), real(x, bits))[1])
    found = measure.readouts(combinations, CPU, Looks(), 16, seed=4, random_bits=8)
    own, shared = found["readout"], found["readout_shared_bits"]
    assert [shared[factor]["accuracy"] for factor in shared] == [100, 100, 100]
    assert max(own[factor]["accuracy"] for factor in own) < 60  # negative control: bits are in the way
    bits = [bits_of(4, part, range(count), 8) for part, count in ((TRAIN, 60), (HELD_OUT, 40))]
    assert torch.equal(torch.cat(seen), torch.cat([*bits, bits[0][:1].expand(100, -1)])) and len(seen) == 10


def test_features_that_are_not_finite_have_diverged(folders):
    with pytest.raises(DivergedError, match="a feature is not finite"):
        measure.readouts(folders, CPU, lambda x: x.mean(dim=(2, 3)) * torch.nan, 16, seed=4, random_bits=0)


def test_the_encoder_is_what_a_run_starts_from_or_that_of_a_checkpoint(folders, tmp_path, cli):
    def encoder_q(seed):
        torch.manual_seed(seed)
        model = MoCo(base_encoder(ARCH, 2), 128, 12, mlp=True)
        return {f"module.{name}": value for name, value in model.state_dict().items()}

    def read(*words):
        code, output, errors = cli(measure.main, tmp_path / "found.json", folders, *FLAGS, *words)
        assert (code, errors) == (0, "") and output.startswith("class: ")
        return json.loads((tmp_path / "found.json").read_text())

    for seed in (5, 6):
        torch.save({"state_dict": encoder_q(seed)}, tmp_path / f"{seed}.pth.tar")
    entries = [{"kind": "start"}, *({"kind": "epoch", "loss": 5.0 - e, "acc1": e} for e in range(2))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    start, trained = read(), read("--pretrained", tmp_path / "5.pth.tar")
    assert trained["losses"] == {"training": 4.0, "training_acc1": 1} and "losses" not in start
    readings = ["readout", "readout_shared_bits"]
    assert [start[reading] for reading in readings] == [trained[reading] for reading in readings]
    assert start["readout"]["class"]["chance"] == pytest.approx(100 / 3)
    assert start["versions"]["torch"] == torch.__version__
    networks = [measure.untrained_encoder(base_encoder(ARCH, 2), 128, seed=5) for _ in range(2)]
    load_encoder(networks[1], checkpoint.read(tmp_path / "6.pth.tar"), "6.pth.tar", ARCH)  # negative control
    assert not torch.equal(*(network.conv1[0].weight for network in networks))


def test_wrong_use_is_a_sentence(folders, tmp_path, cli):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "bare.pth.tar")
    for words, message in (
        (
            [*FLAGS, "--pretrained", tmp_path / "bare.pth.tar"],
            f"bare.pth.tar does not fit {ARCH}, of whose backbone it holds no tensor",
        ),
        ([*FLAGS, "--random-bits", "64"], "--random-bits"),
        (FLAGS[:2], "--seed"),
    ):
        code, _, errors = cli(measure.main, tmp_path / "none.json", folders, *words)
        assert code == 2 and message in errors and not (tmp_path / "none.json").exists()
