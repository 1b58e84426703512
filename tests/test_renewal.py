"""BatchNorm's statistics taken anew: those of the images that are read, whatever they were before."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_shortcuts import LISTS, SMALL, sweep_of
from tiny import TinyEncoder
from torch import nn

from moco import measure, shortcuts
from moco.batchnorm import split_batchnorm
from moco.data import image_folder, labelled_folders
from moco.errors import UserError
from moco.measure import RENEWED
from moco.renewal import BATCH, renew_statistics
from moco.sweep import read_results
from moco.views import normalise

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path):
    """An ImageFolder of two classes whose colours lie far apart, of one batch and a part of a second."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 30), ("light", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(BATCH // 2 + 20):
            colour = rng.integers(level - 20, level + 20, (1, 1, 3), dtype=np.uint8)  # the same at any size
            Image.fromarray(colour.repeat(8, 0).repeat(8, 1)).save(
                tmp_path / "train" / name / f"{number:03d}.png"
            )
    return image_folder(tmp_path, "train")


def encoder_of(seed):
    torch.manual_seed(seed)
    encoder = TinyEncoder(4)
    encoder.bn.running_mean.normal_()  # as after a training on other images
    encoder.bn.running_var.uniform_(1, 9)
    return encoder


def views(images):
    loaded = np.stack([np.array(Image.open(path)) for path, _ in images.samples])
    return normalise(torch.from_numpy(loaded).permute(0, 3, 1, 2))


def test_statistics_are_those_of_a_batch_in_which_classes_are_mixed(images):
    encoder = encoder_of(0)
    weights = copy.deepcopy(list(encoder.parameters()))
    renew_statistics(encoder, images, 8, CPU)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert len(order) == BATCH + 40  # of which the last 40 are no whole batch
    maps = encoder.conv(views(images)[order[:BATCH]]).detach()
    torch.testing.assert_close(encoder.bn.running_mean, maps.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(encoder.bn.running_var, maps.transpose(0, 1).flatten(1).var(dim=1))
    in_order = encoder.conv(views(images)[:BATCH]).detach().mean(dim=(0, 2, 3))  # negative control
    assert not torch.allclose(encoder.bn.running_mean, in_order, atol=1e-3)
    assert all(map(torch.equal, weights, encoder.parameters())) and not encoder.training
    assert encoder.bn.momentum == 0.1 and not encoder.bn.training


def test_several_batches_are_averaged(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "train" / "one").mkdir(parents=True)
    for number in range(2 * BATCH):
        pixels = np.full((8, 8, 3), rng.integers(256), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "one" / f"{number:03d}.png")
    images, encoder = image_folder(tmp_path, "train"), encoder_of(0)
    renew_statistics(encoder, images, 8, CPU)
    maps = encoder.conv(views(images)).detach()
    torch.testing.assert_close(encoder.bn.running_mean, maps.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_what_was_trained_on_other_images_is_read_alike(images):
    one, two = encoder_of(0), encoder_of(0)
    two.bn.running_mean += 5
    before = [measure.features(encoder, images, 8, CPU) for encoder in (one, two)]
    assert not torch.allclose(*before)
    for encoder in (one, two):
        renew_statistics(encoder, images, 8, CPU)
    assert torch.equal(*(measure.features(encoder, images, 8, CPU) for encoder in (one, two)))


def test_batchnorm_of_groups_has_its_groups_again(images):
    plain, split = nn.Sequential(encoder_of(0)), nn.Sequential(encoder_of(0))
    assert split_batchnorm(split, 8) == 1
    for encoder in (plain, split):
        renew_statistics(encoder, images, 8, CPU)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split[0].bn, name), getattr(plain[0].bn, name))
    assert split[0].bn.splits == 8 and split[0].bn.momentum == 0.1


def test_a_second_reading_is_of_the_images_that_are_read(folders, tmp_path, monkeypatch):
    real, seen = measure.features, []
    monkeypatch.setattr(measure, "_model", lambda *_: encoder_of(0))
    monkeypatch.setattr(measure, "features", lambda *given: (seen.append(real(*given)), seen[-1])[1])
    found = measure.measure(folders, ["class"], CPU, renew=True, image_size=16, seed=0)
    assert found.keys() >= {"readout", RENEWED} and len(seen) == 4
    encoder = encoder_of(0)
    train, val, _ = labelled_folders(folders, None)
    assert torch.equal(seen[0], real(encoder, train, 16, CPU))
    renew_statistics(encoder, train, 16, CPU)
    assert torch.equal(seen[2], real(encoder, train, 16, CPU)) and not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[3], real(encoder, val, 16, CPU))
    with pytest.raises(UserError, match="--renew-statistics does not go with random bits"):
        measure.measure(folders, ["class"], CPU, renew=True, image_size=16, seed=0, random_bits=3)


def test_a_sweep_has_both_readings_in_its_lines_and_tables(tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["trifeature", *SMALL, *LISTS, "--renders", "1", "--recipe", "crops", "--moco-t", "0.2"]
    out = tmp_path / "s"
    code, _, errors = cli(shortcuts.main, *words, "--renew-statistics", "--out", out)
    assert code == 0, errors
    untrained = next(result for result in read_results(out) if not result["trained"])
    assert "--renew-statistics" in untrained["command"]
    assert json.loads((out / "sweep.json").read_text())["renew_statistics"] is True
    code, _, errors = cli(shortcuts.main, *words, "--out", out)
    assert code == 2 and "holds a sweep with renew_statistics True, not None" in errors
