"""The sheet of neighbours: those that a literal search finds, under the backbone of any checkpoint."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from sheets import draw_sheet, refused, texts
from torchvision import transforms

from moco import show
from moco.builder import MoCo
from moco.checkpoint import save_checkpoint
from moco.data import Loading, image_folder
from moco.distributed import Process
from moco.encoders import base_encoder
from moco.loader import IMAGENET_MEAN, IMAGENET_STD
from moco.show_neighbours import Shown, agreement, backbone_of, nearest, neighbours_of, neighbours_sheet

ALONE = Process(0, 1, 0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize("pieces", [[40], [7, 33], [1] * 40])
def test_nearest_is_a_literal_search(pieces):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(45, 6))
    vectors[12] = vectors[30]  # equal ones: the first comes first
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, others = vectors[40:], vectors[:40]
    cosines, numbers = nearest(
        torch.from_numpy(queries).float(), torch.from_numpy(others).float().split(pieces), 40
    )
    for query, cosine, number in zip(queries, cosines, numbers, strict=True):
        literal = [sum(a * b for a, b in zip(query, other, strict=True)) for other in others]
        assert number.tolist() == sorted(range(40), key=lambda n: (-literal[n], n))
        assert cosine.numpy() == pytest.approx(sorted(literal, reverse=True), abs=1e-6)
    few = nearest(torch.from_numpy(queries).float(), torch.from_numpy(others).float().split(pieces), 3)
    assert torch.equal(few[1], numbers[:, :3]) and torch.equal(few[0], cosines[:, :3])


def literal_features(model, images):
    """Features of an ImageFolder's images in float64, by torchvision's published transforms."""
    transform = transforms.Compose(
        [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor()]  # 37 = 32 * 256 / 224
    )
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    model = copy.deepcopy(model).double()
    features = []
    for path, _ in images.samples:
        with Image.open(path) as image:
            pixels = (transform(image).double() - mean) / std
        with torch.no_grad():
            [feature] = model(pixels[None])
        features.append((feature / feature.norm()).numpy())
    return np.array(features)


def test_neighbours_are_those_of_a_float64_search(folders):
    train, val = image_folder(folders, "train"), image_folder(folders, "val")
    model, arch, size, about = backbone_of("untrained", "resnet18", seed=5)
    assert (arch, size, about) == ("resnet18", None, "an untrained resnet18 (seed 5)")
    others, queries = literal_features(model, train), literal_features(model, val)
    loading = Loading(32, "pil", 8, workers=0, decode="pillow")
    found = neighbours_of(ALONE, model, train, val, loading, 0, count=9, neighbours=5)
    assert sorted(one.index for one, _ in found) == list(range(9))
    for one, near in found:
        literal = others @ queries[one.index]
        assert [shown.index for shown in near] == np.argsort(-literal)[:5].tolist()
        assert [shown.cosine for shown in near] == pytest.approx(np.sort(literal)[::-1][:5], abs=1e-5)
        assert [shown.name for shown in near] == [train.classes[train.targets[s.index]] for s in near]
        assert one.name == val.classes[val.targets[one.index]] and one.view.shape == (3, 32, 32)
    # Of fewer training images the same is found among them, and another network finds others.
    half = neighbours_of(ALONE, model, train, val, loading, 0, count=9, neighbours=5, among=12)
    searched = np.random.default_rng(0).permutation(24)[:12]
    for (one, near), (same, _) in zip(half, found, strict=True):
        literal = others[searched] @ queries[one.index]
        assert [s.index for s in near] == searched[
            np.argsort(-literal)[:5]
        ].tolist() and one.index == same.index
    other = neighbours_of(ALONE, backbone_of("untrained", "resnet18", 6)[0], train, val, loading, 0, 9, 5)
    assert [s.index for _, near in other for s in near] != [s.index for _, near in found for s in near]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A MoCo of a resnet18, and the folder with its checkpoint and one of linear evaluation."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    model = MoCo(base_encoder("resnet18"), dim=8, K=16, mlp=True)
    model.encoder_k.conv1.weight.data.zero_()  # unlike the query encoder
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"epoch": 7, "arch": "resnet18", "state_dict": state, "settings": {"image_size": 32}}
    save_checkpoint(content, folder / "moco.pth.tar")
    state = {name.replace("encoder_q.", ""): t for name, t in state.items() if ".encoder_q." in name}
    save_checkpoint({"epoch": 3, "arch": "resnet18", "state_dict": state}, folder / "linear.pth.tar")
    return model, folder


def test_the_backbone_is_the_query_encoder_of_any_checkpoint(checkpoints):
    model, folder = checkpoints
    own = {name: t for name, t in model.encoder_q.state_dict().items() if not name.startswith("fc.")}
    for name, size in (("moco.pth.tar", 32), ("linear.pth.tar", None)):
        backbone, arch, said, about = backbone_of(str(folder / name))
        state = backbone.state_dict()
        assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
        assert not backbone.training and (arch, said) == ("resnet18", size) and "resnet18 after" in about
    torch.manual_seed(2)
    before = torch.get_rng_state()
    untrained = [backbone_of("untrained", "resnet18", seed)[0].conv1.weight for seed in (0, 0, 1)]
    assert torch.equal(*untrained[:2]) and not torch.equal(*untrained[1:])
    assert not torch.equal(untrained[0], own["conv1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_neighbours_of_a_checkpoint_are_drawn_and_wrong_classes_marked(
    folders, cli, monkeypatch, checkpoints
):
    words = ["--count", "3", "--neighbours", "4", "-j", "0"]
    figure = draw_sheet(cli, monkeypatch, "neighbours", checkpoints[1] / "moco.pth.tar", folders, *words)
    train, val = image_folder(folders, "train"), image_folder(folders, "val")
    loading = Loading(32, "pil", 256, 0)  # 32 pixels as the checkpoint says
    model = backbone_of(str(checkpoints[1] / "moco.pth.tar"))[0]
    found = neighbours_of(ALONE, model, train, val, loading, 0, 3, 4)
    axes, marks = iter(figure.axes), []
    for one, near in found:
        axis = next(axes)
        assert axis.get_title(loc="left") == f"val {one.index}" and texts(axis) == [one.name]
        for shown in near:
            axis = next(axes)
            assert np.array_equal(axis.images[0].get_array(), shown.view.transpose(1, 2, 0))
            assert axis.get_title(loc="left") == f"cosine {shown.cosine:.3f}"
            mark = "✓" if shown.name == one.name else "✗"
            assert texts(axis) == [f"{mark} {shown.name}"]
            marks.append(mark)
    assert set(marks) == {"✓", "✗"} and next(axes, None) is None
    title = figure.texts[0].get_text()
    assert "moco.pth.tar (resnet18 after 7 epochs)" in title and "all 24 training images" in title
    assert f"{marks.count('✓')} of 12 neighbours have the image's class" in title


def test_for_trifeature_the_factors_that_agree_are_marked():
    view = np.zeros((3, 16, 16), np.uint8)
    one = Shown(0, "triangle_solid_red", view)
    near = [Shown(1, "triangle_dots_red", view, 0.5), Shown(2, "star_solid_blue", view, 0.4)]
    figure = neighbours_sheet([(one, near)], "title")
    assert [texts(axis) for axis in figure.axes] == [
        ["triangle", "solid", "red"],
        ["✓ triangle", "✗ dots", "✓ red"],
        ["✗ star", "✓ solid", "✗ blue"],
    ]
    legend = [text.get_text() for text in figure.texts[1:]]
    assert legend == ["✓ as in the image at the left", "✗ another"]
    many = neighbours_sheet([(one, near * 5)], "title").axes  # ten go on in a second line
    places = [(round(axis.get_position().x0, 6), axis.get_position().y0) for axis in many[1:]]
    assert [x for x, _ in places[:5]] == [x for x, _ in places[5:]] and len({x for x, _ in places}) == 5
    assert min(y for _, y in places[:5]) > max(y for _, y in places[5:])
    assert agreement([(one, near)]) == "of 2 neighbours agree in shape 1, texture 1, color 1"
    assert agreement([(one, [Shown(3, "dog", view)])]) == "0 of 1 neighbours have the image's class"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["pairs", "DATA", "--count", "0"], "--count must be from 1 to 40, not 0"),
        (["pairs", "DATA", "--count", "25"], "--count 25 is more than the 24 images of"),
        (["pairs", "DATA", "--epoch", "-1"], "--epoch must be at least 0, not -1"),
        (["pairs", "DATA", "--image-size", "4"], "--image-size must be at least 8"),
        (["pairs"], "where are the images"),
        (["pairs", "NOTHING"], "there is no folder"),
        (["neighbours", "untrained", "DATA", "--neighbours", "11"], "--neighbours must be from 1 to 10"),
        (["neighbours", "untrained", "DATA", "-a", "resnet19"], "no classification model 'resnet19'"),
        (["neighbours", "untrained", "DATA", "-a", "resnet18", "--count", "10"], "more than the 9 images"),
        (["neighbours", "untrained", "DATA", "-a", "resnet18", "--among", "2"], "--among must be from"),
        (["neighbours", "nothing.pth.tar", "DATA"], "there is no file nothing.pth.tar"),
        (["neighbours", "LINEAR", "DATA", "-a", "resnet50"], "is of -a resnet18, not of -a resnet50"),
        (["neighbours", "untrained", "DATA", "-a", "inception_v3", "--image-size", "16"], "cannot take"),
    ],
)
def test_wrong_use_is_one_sentence(words, sentence, folders, checkpoints, cli, tmp_path):
    stands_for = {"DATA": folders, "NOTHING": tmp_path / "no", "LINEAR": checkpoints[1] / "linear.pth.tar"}
    refused(cli(show.main, *(stands_for.get(w, w) for w in words), "-o", tmp_path / "o.png"), sentence)
    assert not list(tmp_path.iterdir())
