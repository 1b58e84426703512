"""Nearest neighbors against loops in float64, and the monitor of an encoder in 1 and 2 processes."""

import math
import shutil

import pytest
import torch
from command_lines import MOCO
from made_folders import make_folders
from PIL import Image
from torch import nn
from torchvision.transforms import functional

import main_moco
from moco.data.folders import image_folder
from moco.encoders import base_encoder
from moco.errors import UserError
from moco.evaluate import knn
from moco.evaluate.knn import KnnMonitor, labelings, neighbors, vote
from moco.loader import IMAGENET_MEAN, IMAGENET_STD
from moco.run.launch import Rank
from moco.trifeature import FACTORS

ARCH = "shufflenet_v2_x0_5"


def literal(queries, bank, labels, classes, k, T):
    """The definition, a query, a neighbor and a class after the other."""
    found = []
    for query in queries.double().tolist():
        cosines = [
            math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in bank.double().tolist()
        ]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]  # noqa: B023
        scores = [0.0] * classes
        for i in nearest:
            scores[labels[i]] += math.exp(cosines[i] / T)
        found.append(scores.index(max(scores)))
    return found


@pytest.mark.parametrize("k", [1, 20, 1000])
@pytest.mark.parametrize("chunk", [1, 1000, knn.CHUNK])
def test_predictions_are_those_of_the_definition(k, chunk, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", chunk)
    torch.manual_seed(0)
    queries, bank = (nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (30, 90))
    labels = torch.randint(7, (90,))
    similarity, index = neighbors(queries, bank, k)
    predicted = vote(similarity, labels[index], 7, 0.1).tolist()
    assert predicted == literal(queries, bank, labels.tolist(), 7, k, 0.1)
    assert predicted != vote(similarity, labels[index], 7, 2.0).tolist() or k == 1  # T counts
    other = literal(queries, bank, labels.roll(1).tolist(), 7, k, 0.1)
    assert predicted != other  # negative control
    cosines = queries @ bank.T
    torch.testing.assert_close(similarity, cosines.sort(descending=True).values[:, :k])
    torch.testing.assert_close(similarity, cosines.gather(1, index))


def encoder_of(seed=0):
    """An encoder whose BatchNorm has the statistics of some images, so that its features differ."""
    torch.manual_seed(seed)
    encoder = base_encoder(ARCH)(num_classes=5).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder(torch.randn(32, 3, 32, 32))
    return encoder


def monitor(folder, rank=None, every=2, **more):
    rank = rank or Rank.alone()
    images = image_folder(folder, "train")
    loading = {"size": 32, "batch_size": 4, "rank": rank.rank, "world_size": rank.world_size}
    return KnnMonitor(every, 5, base_encoder(ARCH), images, rank, loading, **more)


def percentages(rank, world, folder):
    encoder = encoder_of()
    if rank:
        for buffer in encoder.buffers():  # as under DistributedDataParallel after a step
            buffer.add_(1)
    knn.K = 5
    who = Rank(rank, world, rank, world, world, torch.device("cpu"))
    found = monitor(folder, who, skip_bad=True)(1, encoder)
    return found["knn"], found["rankme"]


def by_hand(folder, seed=0):
    """Features (N x C) and folder names (N) of train/ and val/, from the image files on by other means."""
    encoder = encoder_of(seed).eval()
    encoder.fc = nn.Identity()
    found = []
    for split in ("train", "val"):
        images = image_folder(folder, split)
        views = []
        for path, _ in images.samples:
            view = functional.center_crop(functional.resize(Image.open(path).convert("RGB"), 37), 32)
            views.append(functional.normalize(functional.to_tensor(view), IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            features = encoder(torch.stack(views))
        found.append((features, [images.classes[target] for target in images.targets]))
    return found


def correct(train, val, label_of, classes):
    """The percentage of val that the 5 nearest of train classify right by the definition."""
    (bank, bank_names), (queries, names) = train, val
    bank, queries = nn.functional.normalize(bank, dim=1), nn.functional.normalize(queries, dim=1)
    predicted = literal(queries, bank, [label_of(name) for name in bank_names], classes, 5, 0.1)
    return 100 * sum(a == label_of(b) for a, b in zip(predicted, names, strict=True)) / len(predicted)


def effective_rank(features):
    """RankMe by its definition, from all singular values."""
    values = torch.linalg.svdvals(features.double())
    return math.exp(-sum(share * math.log(share) for share in (values / values.sum()).tolist() if share))


def test_the_percentage_is_exact_in_1_and_2_processes(folders, run_ranks):
    classes = ("ant", "bee", "cat")
    train, val = by_hand(folders)
    expected = correct(train, val, classes.index, 3), effective_rank(train[0])
    assert 1 < expected[1] < len(train[0])
    for world in (1, 2):
        percent, rank = pytest.approx(expected[0]), pytest.approx(expected[1], rel=1e-4)
        assert run_ranks(world, percentages, folders) == [({"class": percent}, rank)] * world
    expected = expected[0]
    others = {correct(*by_hand(folders, seed), classes.index, 3) for seed in range(1, 5)}
    assert others != {expected}  # negative control: the encoder counts


def test_factors_of_trifeature_and_an_image_that_cannot_be_read(tmp_path, run_ranks):
    shapes, textures, colors = FACTORS.values()
    there = [(0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0), (0, 0, 0), (1, 1, 1)]  # the last two in val/
    names = [f"{shapes[i]}_{textures[j]}_{colors[k]}" for i, j, k in there]
    make_folders(tmp_path, names, train=4, val=8)
    for split, others in (("train", names[4:]), ("val", names[:4])):
        for name in others:
            shutil.rmtree(tmp_path / split / name)
    broken = tmp_path / "train" / names[2] / "1.jpg"
    broken.write_text("no image")
    for world in (1, 2):
        (first, rank), *others = run_ranks(world, percentages, tmp_path)
        assert all(other == (first, rank) for other in others)
        assert list(first) == ["shape", "texture", "color"]
    with pytest.raises(UserError, match="1.jpg"):
        monitor(tmp_path)(1, encoder_of())
    broken.unlink()
    train, val = by_hand(tmp_path)
    assert rank == pytest.approx(effective_rank(train[0]), rel=1e-4)  # it was left out
    for number, (factor, values) in enumerate(FACTORS.items()):
        expected = correct(train, val, lambda name: values.index(name.split("_")[number]), 10)  # noqa: B023
        assert first[factor] == pytest.approx(expected)
    assert len(set(first.values())) > 1


def test_the_encoder_and_the_random_numbers_stay_as_they_are(folders, capsys):
    encoder, made = encoder_of(), monitor(folders)
    state, random = {name: t.clone() for name, t in encoder.state_dict().items()}, torch.get_rng_state()
    assert made(0, encoder) == {} and made(2, encoder) == {} and capsys.readouterr().out == ""
    first = made(1, encoder)
    assert capsys.readouterr().out.startswith(f" * kNN class {first['knn']['class']:.1f}, RankMe ")
    assert made(3, encoder) == made(4, encoder) == first  # epoch 4 is the last one
    assert torch.equal(torch.get_rng_state(), random) and encoder.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in encoder.parameters())

    before, _ = made._features(made.val)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    made(1, encoder)
    assert not torch.allclose(before, made._features(made.val)[0], atol=1e-4)  # it reads them as they are
    assert monitor(folders, every=0)(4, encoder) == {}


def test_other_classes_in_val_are_refused_before_training(tmp_path, cli):
    make_folders(tmp_path, ("ant", "bee"), train=4, val=1)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cat")
    words = [*MOCO, "-b", "4", "--moco-k", "16", tmp_path, "--output-dir", tmp_path / "out"]
    code, output, errors = cli(main_moco.main, *words, "--knn", "1")
    assert code == 2 and "Epoch" not in output and errors.count("\n") == 1
    assert "class cat is in" in errors and "leave out --knn" in errors
    (tmp_path / "val").rename(tmp_path / "test")
    errors = cli(main_moco.main, *words, "--knn", "1")[2]
    assert (
        f"--knn needs train/ and val/ with a folder per class each, but {tmp_path} has no val/; leave"
        in errors
    )
    (tmp_path / "test").rename(tmp_path / "val")
    with pytest.raises(UserError, match="class cat is in .* leave out --knn"):
        labelings(image_folder(tmp_path, "train"), image_folder(tmp_path, "val"))
