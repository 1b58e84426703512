"""Nearest neighbours against loops in float64, and the evaluation of an encoder in 1 and 2 processes."""

import math
import shutil

import pytest
import torch
from conftest import make_folders
from PIL import Image
from test_resume import content_hash
from torch import nn
from torchvision.transforms import functional

import main_moco
from moco import knn, knn_evaluation
from moco.data import Loading, image_folder
from moco.distributed import Process
from moco.encoders import base_encoder
from moco.errors import UserError
from moco.execution import Execution
from moco.factors import FACTORS, SETTINGS
from moco.knn_evaluation import KnnEvaluation, labellings
from moco.loader import IMAGENET_MEAN, IMAGENET_STD
from moco.small_maps import small_maps

CPU = torch.device("cpu")
ARCH = "shufflenet_v2_x0_5"


def literal(queries, bank, labels, classes, k, T):
    """The definition, a query, a neighbour and a class after the other."""
    found = []
    for query in queries.double().tolist():
        cosines = [
            math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in bank.double().tolist()
        ]
        nearest = sorted(range(len(bank)), key=lambda i: (-cosines[i], i))[:k]  # noqa: B023
        scores = [0.0] * classes
        for i in nearest:
            scores[labels[i]] += math.exp(cosines[i] / T)
        found.append(scores.index(max(scores)))
    return found


@pytest.mark.parametrize("k", [1, 20, 1000])
@pytest.mark.parametrize("part", [1, 1000, knn.PART])
def test_predictions_are_those_of_the_definition(k, part, monkeypatch):
    monkeypatch.setattr(knn, "PART", part)
    torch.manual_seed(0)
    queries, bank = knn.unit_rows(torch.randn(30, 6)), knn.unit_rows(torch.randn(90, 6))
    labels = torch.randint(7, (90,))
    predicted = knn.weighted_knn(queries, bank, labels, 7, k, 0.1).tolist()
    assert predicted == literal(queries, bank, labels.tolist(), 7, k, 0.1)
    assert predicted != knn.weighted_knn(queries, bank, labels, 7, k, 2.0).tolist() or k == 1  # T counts
    other = literal(queries, bank, labels.roll(1).tolist(), 7, k, 0.1)
    assert predicted != other  # negative control
    assert knn.weighted_knn(queries[:0], bank, labels, 7, k, 0.1).tolist() == []


def test_of_equally_near_ones_the_first_are_taken():
    torch.manual_seed(1)
    distinct = torch.cat([torch.eye(4), torch.full((1, 4), 0.5), torch.tensor([[0.5, 0.5, -0.5, -0.5]])])
    bank, queries = distinct[torch.randint(6, (80,))], distinct  # their products are exact
    labels = torch.randint(5, (80,))
    results = []
    for order in (torch.arange(80), torch.arange(79, -1, -1)):
        _, index = knn.neighbours(queries, bank[order], 9)
        assert all(len(set(row)) == 9 for row in index.tolist())
        predicted = knn.weighted_knn(queries, bank[order], labels[order], 5, 9, 0.1).tolist()
        assert predicted == literal(queries, bank[order], labels[order].tolist(), 5, 9, 0.1)
        results.append(predicted)
    assert results[0] != results[1]  # the ties decide


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 1, 2), (3, 1, 0), (1, 2, 0)]
)
def test_convolutions_of_small_maps(kernel, stride, padding):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, kernel, stride, padding), nn.Conv2d(4, 4, 1, groups=2)).double()
    plain = nn.Conv2d(3, 4, kernel, stride, padding).double()
    plain.load_state_dict(network[0].state_dict())
    names = list(network.state_dict())
    (small,) = small_maps(network)
    assert network[0] is small and list(network.state_dict()) == names
    matrices, windows, of_windows = 0, [], small._of_windows
    small._of_windows = lambda x: windows.append(x) or of_windows(x)
    for size in ((1, 1), (2, 2), (1, 3), (4, 4), (5, 4), (7, 7)):
        if min(size) + 2 * padding < kernel:
            continue
        x = torch.randn(5, 3, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
        small.matrix = None
        torch.testing.assert_close(small(x), plain(x), rtol=0, atol=1e-13)
        assert (small.matrix is not None) == (size[0] * size[1] < kernel**2)
        matrices += small.matrix is not None
    assert matrices or kernel == 1 or padding == 0
    assert bool(windows) == (stride > 1)


def network_of(seed=0, arch=ARCH):
    """An encoder whose BatchNorm has the statistics of some images, so that its features differ."""
    torch.manual_seed(seed)
    encoder = base_encoder(arch)(num_classes=5).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder(torch.randn(32, 3, 32, 32))
    return encoder


def evaluation(folder, rank=0, world=1, arch=ARCH, **execution):
    process = Process(rank, world, rank, world, world, CPU)
    made = KnnEvaluation(2, 5, arch, process, Execution(CPU, **execution))
    made.load(folder, image_folder(folder, "train"), Loading(32, "pil", 8, 0), may_skip=True)
    return made


def evaluated(rank, world, folder):
    encoder = network_of()
    if rank:
        for buffer in encoder.buffers():  # as under DistributedDataParallel after a step
            buffer.add_(1)
    knn_evaluation.K = 5
    made = evaluation(folder, rank, world)
    percent = made(1, encoder)["knn"]
    with torch.inference_mode():
        return percent, made._features(encoder)[0].numpy()


def by_hand(folder, seed=0):
    """Features (N x C) and folder names (N) of train/ and val/, from the image files on by other means."""
    encoder = network_of(seed).eval()
    encoder.fc = nn.Identity()
    found = []
    for split in ("train", "val"):
        images = image_folder(folder, split)
        views = []
        for path, _ in images.samples:
            view = functional.center_crop(functional.resize(Image.open(path).convert("RGB"), 37), 32)
            views.append(functional.normalize(functional.to_tensor(view), IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            features = nn.functional.normalize(encoder(torch.stack(views)), dim=1)
        found.append((features, [images.classes[target] for target in images.targets]))
    return found


def right(train, val, label_of, classes):
    """The percentage of val that the 5 nearest of train get right by definition."""
    (bank, bank_names), (queries, names) = train, val
    predicted = literal(queries, bank, [label_of(name) for name in bank_names], classes, 5, 0.1)
    return 100 * sum(a == label_of(b) for a, b in zip(predicted, names, strict=True)) / len(predicted)


def test_the_evaluation_is_exact_in_1_and_2_processes(folders, run_ranks):
    train, val = by_hand(folders)
    classes = ("ant", "bee", "cat")
    expected = right(train, val, classes.index, 3)
    for world in (1, 2):
        everyone = run_ranks(world, evaluated, folders)
        assert [percent for percent, _ in everyone] == [{"class": pytest.approx(expected)}] * world
        for rank, (_, features) in enumerate(everyone):
            share = torch.cat([train[0], val[0]])[rank::world]
            torch.testing.assert_close(torch.from_numpy(features), share, rtol=0, atol=2e-5)
    others = {right(*by_hand(folders, seed), classes.index, 3) for seed in range(1, 5)}
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
        (first, _), *others = run_ranks(world, evaluated, tmp_path)
        assert all(other == first for other, _ in others) and list(first) == ["shape", "texture", "color"]
    broken.unlink()
    train, val = by_hand(tmp_path)
    for number, (factor, values) in enumerate(FACTORS.items()):
        expected = right(train, val, lambda name: values.index(name.split("_")[number]), 10)  # noqa: B023
        assert first[factor] == pytest.approx(expected)
    assert len(set(first.values())) > 1
    (tmp_path / SETTINGS).write_text('{"hide": "color=white"}')  # whatever the names of the folders say
    assert list(labellings(tmp_path, image_folder(tmp_path, "train"))[1]) == ["shape", "texture"]


def test_nothing_of_the_encoder_changes_and_the_pixels_are_kept(folders):
    encoder, made = network_of(arch="resnet18"), evaluation(folders, arch="resnet18")
    state, random = content_hash(dict(encoder.state_dict())), torch.get_rng_state()
    assert made(0, encoder) == {} and made(2, encoder) == {} and not made.kept
    first = made(1, encoder)
    assert list(first["knn"]) == ["class"] and made.loader._loader is None  # its workers are gone
    assert made(3, encoder) == made(4, encoder) == first  # from memory; the last epoch comes besides
    assert torch.equal(torch.get_rng_state(), random) and encoder.training
    assert content_hash(dict(encoder.state_dict())) == state
    assert all(p.requires_grad and not p.is_inference() for p in encoder.parameters())

    before, _ = made._features(encoder)
    with torch.no_grad():
        for p in encoder.parameters():
            p.mul_(1.1)
    after, _ = made._features(encoder)
    assert not torch.allclose(before, after, atol=1e-4)
    anew, _ = evaluation(folders, arch="resnet18")._features(encoder)
    assert torch.equal(after, anew)  # it reads the weights as they are
    assert sum(convolution.matrix is not None for convolution in made.small) > 2
    in_bf16, _ = evaluation(folders, arch="resnet18", amp="bf16", channels_last=True)._features(encoder)
    torch.testing.assert_close(in_bf16, after, atol=0.05, rtol=0)
    assert not torch.equal(in_bf16, after)


def test_without_memory_for_pixels_they_are_read_again(folders, monkeypatch):
    encoder = network_of()
    expected = evaluation(folders)(1, encoder)
    monkeypatch.setattr(knn_evaluation, "KEEP", 100)
    monkeypatch.setattr(knn_evaluation, "PIXELS", 0)
    made = evaluation(folders)
    assert [made(1, encoder), made(3, encoder)] == [expected] * 2
    assert made.kept is None and made.loader._loader is not None


def test_other_classes_in_val_are_refused_before_training(tmp_path, cli):
    make_folders(tmp_path, ("ant", "bee"), train=4, val=1)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cat")
    words = [
        "-a",
        ARCH,
        "--image-size",
        "32",
        "-b",
        "4",
        "-j",
        "0",
        tmp_path,
        "--output-dir",
        tmp_path / "out",
    ]
    code, output, errors = cli(main_moco.main, *words, "--knn", "1")
    assert code == 2 and "Epoch" not in output and errors.count("\n") == 1
    assert "class bee stands in" in errors and "leave out --knn" in errors
    with pytest.raises(UserError, match="class numbers would not agree"):
        labellings(tmp_path, image_folder(tmp_path, "train"))
    code, _, errors = cli(main_moco.main, *words, "--knn", "-1")
    assert code == 2 and "--knn must be 0 (never) or more, not -1" in errors
