"""Random bits belong to images: alike in both views, for any number of processes, and after a stop."""

import signal

import numpy as np
import pytest
import torch
from command_lines import MOCO, SMALL
from PIL import Image
from test_resume import WORDS, content, pretrained

import main_lincls
import main_moco
from moco import export
from moco.builder import MoCo
from moco.data import EpochBatches
from moco.encoders import base_encoder
from moco.experiments import Experiments
from moco.random_bits import (
    HELD_OUT,
    TRAIN,
    bits_of,
    with_channels,
    with_input_channels,
)
from moco.views import normalise

BITS = ["--random-bits", "3"]
GAP = 10  # between the levels of the grey images of `greys`


def test_bits_are_a_function_of_seed_part_and_image():
    bits = bits_of(3, TRAIN, range(2000), 20)
    assert bits.shape == (2000, 20) and bits.dtype == torch.float32 and set(bits.unique().tolist()) == {0, 1}
    assert torch.equal(bits_of(3, TRAIN, [7, 1999, 7], 20), bits[[7, 1999, 7]])  # whatever is beside it
    for other in (bits_of(4, TRAIN, range(2000), 20), bits_of(3, HELD_OUT, range(2000), 20)):
        assert abs(float((other == bits).float().mean()) - 0.5) < 0.02  # as two that are independent
    assert float((bits.mean(dim=0) - 0.5).abs().max()) < 0.06  # 5 standard deviations
    assert float((torch.corrcoef(bits.T) - torch.eye(20)).abs().max()) < 0.12
    assert len({tuple(row) for row in bits_of(0, TRAIN, range(500), 63).tolist()}) == 500


def test_bits_are_constant_channels_behind_the_picture():
    images, values = torch.rand(2, 3, 4, 5), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    both = with_channels(images, values)
    assert both.shape == (2, 5, 4, 5) and torch.equal(both[:, :3], images)
    assert torch.equal(both[:, 3:], values[:, :, None, None].expand(2, 2, 4, 5))


def test_each_epoch_of_a_sampler_has_the_bits_of_its_images():
    batches = EpochBatches(10, 4, seed=1)
    append, views = Experiments(6, seed=5, batches=batches), [torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)]
    orders = []
    for batches.epoch in (0, 1, 0):
        for step in (1, 0):
            indices = batches.indices()[step]
            orders.append(indices.tolist())
            one, two = append(views, step)
            assert torch.equal(one[:, 3:, 0, 0], bits_of(5, TRAIN, indices, 6))
            assert torch.equal(two[:, 3:], one[:, 3:]) and not torch.equal(two[:, :3], one[:, :3])
    assert orders[0] != orders[2] and orders[0] == orders[4]  # the orders did differ
    assert Experiments()(views, 0) is views


def test_the_weights_for_the_picture_are_those_without_bits():
    def encoder(bits, seed=0):
        torch.manual_seed(seed)
        return MoCo(with_input_channels(base_encoder("resnet18"), bits), 8, 4)

    plain, wide = (encoder(bits).encoder_q.state_dict() for bits in (0, 5))
    assert wide["conv1.weight"].shape == (64, 8, 7, 7)
    assert torch.equal(wide["conv1.weight"][:, :3], plain["conv1.weight"])
    assert all(torch.equal(plain[name], wide[name]) for name in plain if name != "conv1.weight")
    assert not torch.equal(encoder(0, seed=1).encoder_q.conv1.weight, plain["conv1.weight"])  # control
    ratio = wide["conv1.weight"][:, 3:].std() / plain["conv1.weight"].std()
    assert 0.95 < ratio < 1.05 and len(wide["conv1.weight"][:, 3:].unique()) > 15000
    model = encoder(5)
    assert torch.equal(model.encoder_k.conv1.weight, model.encoder_q.conv1.weight)
    assert model(torch.rand(4, 8, 32, 32), torch.rand(4, 8, 32, 32))[0].shape == (4, 5)
    construct = base_encoder("resnet18")
    assert with_input_channels(construct, 0) is construct


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """24 images, each of one level of grey: whatever is cut out of one tells which it is."""
    root = tmp_path_factory.mktemp("greys")
    for index in range(24):
        folder = root / "train" / "ab"[index // 12]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), GAP * index, np.uint8)).save(folder / f"{index:02d}.png")
    return root


def seen(rank, world, words, folder):
    """What the model gets in a run: for each step and view the images' (number, bits)."""
    found, real = [], MoCo.forward
    black, white = (normalise(torch.full((1, 3, 1, 1), v, dtype=torch.uint8))[0, 0].item() for v in (0, 255))

    def forward(self, *views, **options):
        for view in views:
            assert bool((view == view[:, :, :1, :1]).all())
            numbers = (view[:, 0, 0, 0] - black) / (white - black) * 255 / GAP
            bits = view[:, 3:, 0, 0].int().tolist()
            found.append([(round(n), *b) for n, b in zip(numbers.tolist(), bits, strict=True)])
        return real(self, *views, **options)

    MoCo.forward = forward
    try:
        assert pretrained(rank, world, words, folder) == 0
    finally:
        MoCo.forward = real
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_every_process_gives_its_images_their_bits_in_both_views(run_ranks, greys, tmp_path, world):
    words = [word for word in WORDS if word != "--aug-plus"] + ["--crops-only", *BITS]
    ranks = run_ranks(world, seen, [*words, "--output-dir", tmp_path], greys)
    expected = {(i, *map(int, bits)) for i, bits in enumerate(bits_of(3, TRAIN, range(24), 3))}
    assert len({image[1:] for image in expected}) > 4
    for found in ranks:
        assert len(found) == 12  # 2 epochs of 3 steps with 2 views
        for one, two in zip(found[::2], found[1::2], strict=True):
            assert one == two and len(one) == 8 // world and set(one) <= expected
    everything = [image for found in ranks for view in found[:6:2] for image in view]
    assert sorted(everything) == sorted(expected)  # an epoch has every image once


@pytest.fixture(scope="module")
def with_bits(folders, tmp_path_factory):
    """The folder of a run with random bits that never stopped."""
    out = tmp_path_factory.mktemp("bits")
    assert pretrained(0, 1, [*WORDS, *BITS, "--output-dir", out], folders) == 0
    return out


def test_a_run_with_bits_that_stops_within_an_epoch_goes_on_exactly(with_bits, folders, run_ranks, tmp_path):
    words = [*WORDS, *BITS, "--output-dir", tmp_path]
    assert run_ranks(1, pretrained, words, folders, (0, 4, signal.SIGTERM)) == [75]
    assert (tmp_path / "checkpoint_0001_000001.pth.tar").is_file()
    assert run_ranks(1, pretrained, [*words, "--resume", "auto"], folders) == [0]
    assert content(tmp_path) == content(with_bits)
    weights, whole = (
        torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"]
        for folder in (tmp_path, with_bits)
    )
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert content(tmp_path, "checkpoint_0000.pth.tar") != content(with_bits)  # negative control


def test_no_bits_change_nothing(with_bits, folders, run_ranks, tmp_path):
    for name, flags in (("without", []), ("none", ["--random-bits", "0"])):
        words = [*WORDS, *flags, "--epochs", "1", "--output-dir", tmp_path / name]
        (tmp_path / name).mkdir()
        assert run_ranks(1, pretrained, words, folders) == [0]
    without, none = (content(tmp_path / name, "checkpoint_0000.pth.tar") for name in ("without", "none"))
    assert without == none
    assert without["state_dict"] != content(with_bits, "checkpoint_0000.pth.tar")["state_dict"]


def test_other_programs_and_other_runs_refuse_an_encoder_with_bits(with_bits, folders, tmp_path, cli):
    path, out = with_bits / "checkpoint_0001.pth.tar", tmp_path / "backbone.pth"
    arch = ["-a", "tiny"]
    for main, words in (
        (export.main, [path, out, "--to", "torchvision"]),
        (main_lincls.main, [*SMALL, *arch, "--pretrained", path, "--output-dir", tmp_path / "o", folders]),
    ):
        code, _, errors = cli(main, *words)
        assert code == 2 and "is of a run with --random-bits" in errors and "randbit" in errors
        assert errors.count("\n") == 1 and not out.exists()
    words = [*WORDS, "--epochs", "3", "--resume", path, "--output-dir", tmp_path, folders]
    code, _, errors = cli(main_moco.main, *words, "--random-bits", "2")
    assert code == 2 and "(8, 6, 3, 3) there and (8, 5, 3, 3) here" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--random-bits", "-1"], "--random-bits must be between 0 and 63, not -1"),
        (["--random-bits", "64"], "--random-bits must be between 0 and 63, not 64"),
        ([*BITS, "--knn", "1"], "--knn looks at pictures alone, without --random-bits"),
        (["--crops-only"], "--crops-only is a recipe without the operations of --aug-plus"),
    ],
)
def test_wrong_flags_are_one_sentence(folders, tmp_path, cli, words, message):
    code, _, errors = cli(main_moco.main, *MOCO, *words, "--output-dir", tmp_path / "out", folders)
    assert code == 2 and message in errors and errors.count("\n") == 1 and not (tmp_path / "out").exists()
