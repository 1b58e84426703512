"""The sheets: the very views of training; the neighbors that a literal search finds; what is said on them."""

import copy
import shutil

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from sheets import draw_sheet, pictures, refused, texts
from torchvision import transforms

from moco import show
from moco.builder import MoCo
from moco.data.augment import VIEW, draw, moco_v2
from moco.data.decode import read_pixels
from moco.data.folders import image_folder
from moco.data.loader import TrainLoader
from moco.data.pil import center_resize
from moco.encoders import backbone, base_encoder
from moco.loader import IMAGENET_MEAN, IMAGENET_STD
from moco.plot import BLUE, RED
from moco.seeds import seeded
from moco.show import agreement, class_name, marks, neighbors_of, what_was_done


def test_pairs_are_what_training_gets_to_the_pixel(folders, cli, monkeypatch):
    images = image_folder(folders, "train")
    loader = TrainLoader(images, moco_v2(), size=16, batch_size=12, seed=3)  # unlike the sheet's batch
    trained = torch.cat([batch.pixels.clone() for batch in loader.epoch(1)], dim=1)
    queries, keys = trained.permute(0, 1, 3, 4, 2).numpy()

    words = ["pairs", folders, "--aug-plus", "--image-size", "16", "--seed", "3", "--count", "14"]
    shown = pictures(draw_sheet(cli, monkeypatch, *words, "--epoch", "1"))
    assert len(shown) == 3 * 14
    for number in range(14):
        image, query, key = shown[3 * number : 3 * number + 3]
        assert image.shape == (30, 40, 3)
        assert np.array_equal(query, queries[number]) and np.array_equal(key, keys[number])
    first = pictures(draw_sheet(cli, monkeypatch, *words))[1]
    assert not np.array_equal(first, queries[0])  # of the other epoch
    for other in (["--resize", "torch"], ["--seed", "4"]):
        assert not np.array_equal(pictures(draw_sheet(cli, monkeypatch, *words, *other))[1], first)
    words.remove("--aug-plus")
    assert not np.array_equal(pictures(draw_sheet(cli, monkeypatch, *words))[1], first)


@pytest.mark.parametrize("labels", [True, False])
def test_a_pair_comes_with_its_image_its_boxes_and_what_was_done(folders, cli, monkeypatch, labels):
    folder = folders if labels else folders / "train"  # the same images
    words = ["pairs", folder, "--image-size", "16", "--count", "3", "--aug-plus"]
    figure = draw_sheet(cli, monkeypatch, *words)
    images = image_folder(folders, "train")
    for number in range(3):
        image_axis, *view_axes = figure.axes[3 * number : 3 * number + 3]
        index = int(image_axis.get_title(loc="left").removeprefix("image "))
        assert np.array_equal(pictures(figure)[3 * number], read_pixels(images.samples[index][0]))
        assert texts(image_axis) == [images.samples[index][0].split("/")[-2 if labels else -1]]
        records = draw(moco_v2(), 40, 30, 0, 0, index)
        for record, box, axis in zip(records, image_axis.patches, view_axes, strict=True):
            place = (box.get_y() + 0.5, box.get_x() + 0.5, box.get_height(), box.get_width())
            assert place == record.item()[:4]
            assert texts(axis) == list(what_was_done(record, (30, 40)))
            assert box.get_edgecolor()[:3] == to_rgb(axis._left_title.get_color())
        assert [axis.get_title(loc="left") for axis in view_axes] == ["query", "key"]
    assert "MoCo v2 augmentation, views of 16 x 16 pixels, resize pil" in figure.texts[0].get_text()
    corners = [tuple(axis.get_position(original=True).min.round(6)) for axis in figure.axes]
    assert sorted(corners, key=lambda corner: (-corner[1], corner[0])) == corners  # by row, from the left


def test_what_was_done_is_said_in_two_lines():
    record = np.zeros((), VIEW)
    record["height"], record["width"] = 10, 20
    assert what_was_done(record, (40, 10)) == ("crop 50%", "")
    record["flip"] = record["gray"] = record["jitter"] = True
    record["sigma"] = 1.26
    assert what_was_done(record, (40, 10)) == ("crop 50%, flipped", "jitter, gray, blur 1.3")


def literal_features(network, images):
    """Features of an ImageFolder's images in float64, by torchvision's published transforms."""
    transform = transforms.Compose(
        [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor()]  # 37 = 32 * 256 / 224
    )
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    network = copy.deepcopy(network).double()
    features = []
    for path, _ in images.samples:
        with Image.open(path) as image:
            pixels = (transform(image).double() - mean) / std
        with torch.no_grad():
            [feature] = network(pixels[None])
        features.append((feature / feature.norm()).numpy())
    return np.array(features)


def untrained(seed):
    with seeded(seed):
        return backbone(base_encoder("resnet18")).eval()


def neighbors_at_32(network, folders, count, number):
    train, val = image_folder(folders, "train"), image_folder(folders, "val")
    return neighbors_of(network, train, val, 0, count, number, size=32, batch_size=8)


def test_neighbors_are_those_of_a_float64_search(folders):
    train, val = image_folder(folders, "train"), image_folder(folders, "val")
    network = untrained(5)
    bank, queries = literal_features(network, train), literal_features(network, val)
    shown, nearest, cosines = neighbors_at_32(network, folders, 9, 5)
    assert sorted(shown) == list(range(9))
    for index, near, cosine in zip(shown, nearest, cosines, strict=True):
        expected = bank @ queries[index]
        assert near.tolist() == np.argsort(-expected)[:5].tolist()
        assert cosine == pytest.approx(np.sort(expected)[::-1][:5], abs=1e-5)
    others = neighbors_at_32(untrained(6), folders, 9, 5)
    assert others[0].tolist() == shown.tolist() and others[1].tolist() != nearest.tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(a MoCo of a resnet18, the path of its checkpoint)."""
    path = tmp_path_factory.mktemp("checkpoints") / "moco.pth.tar"
    with seeded(1):
        model = MoCo(base_encoder("resnet18"), dim=8, K=16, mlp=True)
    model.encoder_k.conv1.weight.data.zero_()  # unlike the query encoder
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 7, "arch": "resnet18", "state_dict": state, "settings": {"image_size": 32}}, path)
    return model, path


def test_the_neighbors_of_a_checkpoint_are_drawn_and_other_classes_marked(
    folders, cli, monkeypatch, checkpoint
):
    model, path = checkpoint
    words = [path, folders, "--count", "3", "--neighbors", "4", "-j", "0"]
    figure = draw_sheet(cli, monkeypatch, "neighbors", *words)
    train, val = image_folder(folders, "train"), image_folder(folders, "val")
    model.encoder_q.fc = torch.nn.Identity()
    found = neighbors_at_32(model.encoder_q.eval(), folders, 3, 4)  # 32 px, as the checkpoint says
    axes, seen = iter(figure.axes), []
    for index, near, cosines in zip(*found, strict=True):
        axis, name = next(axes), class_name(val, index)
        assert axis.get_title(loc="left") == f"image {index}" and texts(axis) == [name]
        for other, cosine in zip(near, cosines, strict=True):
            axis = next(axes)
            view = center_resize(read_pixels(train.samples[other][0]), 32, "pil")
            assert np.array_equal(axis.images[0].get_array(), view.permute(1, 2, 0))
            assert axis.get_title(loc="left") == f"cosine {cosine:.3f}"
            seen.append("✓" if class_name(train, other) == name else "✗")
            assert texts(axis) == [f"{seen[-1]} {class_name(train, other)}"]
    assert set(seen) == {"✓", "✗"} and next(axes, None) is None
    title = figure.texts[0].get_text()
    assert "moco.pth.tar (resnet18 after 7 epochs)" in title and "of 24 training images" in title
    assert f"of 12 neighbors agree in class {seen.count('✓')}" in title


def test_for_trifeature_the_factors_that_agree_are_marked():
    query, near = "triangle_solid_red", ["triangle_dots_red", "star_solid_blue"]
    assert marks(query, near[0]) == [("✓ triangle", BLUE), ("✗ dots", RED), ("✓ red", BLUE)]
    pairs = [(query, other) for other in near]
    assert agreement(pairs) == "of 2 neighbors agree in shape 1, texture 1, color 1"
    assert marks(query, "dog") == [("✗ dog", RED)] and marks("big_dog", "big_dog") == [("✓ big_dog", BLUE)]
    assert agreement([(query, "dog")]) == "of 1 neighbors agree in class 0"


def test_sheets_are_written_and_not_written_over(folders, cli, tmp_path):
    out = tmp_path / "pairs.png"
    words = ["pairs", folders, "--image-size", "16", "--count", "1", "-o", out]
    assert cli(show.main, *words) == (0, f"{out}\n", "")
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 2000
    first = out.read_bytes()
    refused(cli(show.main, *words, "--seed", "1"), "exists already.*--force")
    assert out.read_bytes() == first
    assert cli(show.main, *words, "--seed", "1", "--force")[0] == 0 and out.read_bytes() != first


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["pairs", "DATA", "--count", "0"], "--count must be from 1 to 40, not 0"),
        (["pairs", "DATA", "--count", "25"], "--count 25 is more than the 24 images to choose from"),
        (["pairs", "BAD", "--count", "24"], "0.jpg cannot be read"),
        (["pairs"], "where are the images"),
        (
            ["neighbors", "untrained", "FLAT"],
            "has no folder train/; it needs train/ and val/ with one folder",
        ),
        (["neighbors", "untrained", "DATA", "-a", "resnet19"], "no classification model 'resnet19'"),
        (["neighbors", "untrained", "DATA", "-a", "resnet18", "--count", "10"], "more than the 9 images"),
        (["neighbors", "nothing.pth.tar", "DATA"], "there is no file nothing.pth.tar"),
        (["neighbors", "MOCO", "DATA", "-a", "resnet50"], "resnet18.*resnet50|resnet50.*resnet18"),
        (["neighbors", "untrained", "DATA", "-a", "inception_v3", "--image-size", "16"], "cannot take"),
    ],
)
def test_wrong_use_is_one_sentence(words, sentence, folders, checkpoint, cli, tmp_path):
    bad = shutil.copytree(folders, tmp_path / "bad")
    (bad / "train" / "ant" / "0.jpg").write_bytes(b"no image")
    paths = {"FLAT": folders / "val" / "ant", "DATA": folders, "BAD": bad, "MOCO": checkpoint[1]}
    refused(cli(show.main, *(paths.get(word, word) for word in words), "-o", tmp_path / "o.png"), sentence)
    assert list(tmp_path.iterdir()) == [bad]
