"""Features in files: those of linear evaluation, with paths and labels, whole or absent; maps of them."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sheets import refused
from torch import nn
from torch.nn import functional as F

import main_lincls
from moco import embed, plot
from moco.builder import MoCo
from moco.data.folders import image_folder, paths_of
from moco.data.loader import ValidationLoader
from moco.encoders import base_encoder
from moco.evaluate.feature_file import read_features
from moco.evaluate.features import features_of, load_backbone
from moco.files import sha256
from moco.run.backbone import loaded_backbone
from moco.run.checkpoint import read

SIZE = ["--image-size", "16", "-j", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a checkpoint of pre-training with -a tiny and --mlp, whose encoders differ."""
    torch.manual_seed(0)
    model = MoCo(base_encoder("tiny"), dim=4, K=8, mlp=True)
    with torch.no_grad():
        for parameter in model.encoder_k.parameters():
            parameter.add_(0.3)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoints") / "moco.pth.tar"
    torch.save({"epoch": 3, "arch": "tiny", "state_dict": state, "settings": {"image_size": 16}}, path)
    return path


def literal(images, network, size=16):
    """Features of an ImageFolder's images by load_backbone's network and linear evaluation's loader."""
    return features_of(network, ValidationLoader(images, size=size, batch_size=4), "cpu")[0].numpy()


def test_the_features_are_those_of_linear_evaluation(folders, checkpoint, cli, tmp_path, monkeypatch):
    out = tmp_path / "f.npz"
    code, output, errors = cli(embed.main, checkpoint, folders, out, "-b", "5", "-j", "2")
    assert code == 0, errors
    assert output.splitlines()[-1] == f"24 x 8 features of {checkpoint} -> {out}"
    assert output.splitlines()[0] == f"{folders}/train: 24 images in 3 folders"
    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    features, images = arrays["features"], image_folder(folders, "train")
    assert features.dtype == np.float32 and arrays["labels"].dtype == np.int64
    assert [os.path.join(folders, path) for path in arrays["paths"]] == paths_of(images)
    assert arrays["labels"].tolist() == images.targets and arrays["classes"].tolist() == images.classes
    identity = {"checkpoint": str(checkpoint), "sha256": sha256(checkpoint), "arch": "tiny"}
    identity |= {"layer": "backbone", "image_size": 16, "resize": "pil", "gray_range": None}
    assert json.loads(str(arrays["checkpoint"])) == identity

    seen, of_program = [], main_lincls.features_of

    def recorded(*arguments):
        seen.append(of_program(*arguments))
        return seen[-1]

    monkeypatch.setattr(main_lincls, "features_of", recorded)
    swapped = tmp_path / "swapped"
    (swapped / "val").mkdir(parents=True)
    os.symlink(folders / "train", swapped / "train")
    for name in images.classes:
        os.symlink(folders / "train" / name, swapped / "val" / name)
    words = [*("-a", "tiny", "--image-size", "16", "-b", "8", "--workers", "0", "--seed", "3", "--lr", "1")]
    words += ["--epochs", "1", "--pretrained", checkpoint, "--output-dir", tmp_path / "lin", swapped]
    code, _, errors = cli(main_lincls.main, *words)
    assert code == 0, errors
    evaluated = torch.cat(seen)[-24:].numpy()  # after those of training, which are of other views
    assert np.abs(features - evaluated).max() <= 1e-6
    assert np.abs(features - torch.cat(seen)[:24].numpy()).max() > 1e-3  # negative control

    network, transform = load_backbone(checkpoint)
    with torch.no_grad(), Image.open(paths_of(images)[7]) as image:
        [row] = network(transform(image)[None]).numpy()
    assert np.abs(row - features[7]).max() <= 1e-6


def test_the_head_gives_the_rows_that_the_loss_sees(folders, checkpoint, cli, tmp_path):
    out = tmp_path / "f.npz"
    assert cli(embed.main, checkpoint, "--layer", "head", folders / "val", out, *SIZE)[0] == 0
    arrays = np.load(out)
    state = {k.removeprefix("encoder_q."): v for k, v in read(checkpoint)["state_dict"].items()}
    encoder = loaded_backbone(read(checkpoint), checkpoint, "tiny")[0]
    encoder.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    encoder.load_state_dict({k: v for k, v in state.items() if k in encoder.state_dict()})
    images = image_folder(folders, "val")
    expected = F.normalize(torch.from_numpy(literal(images, encoder)), dim=1).numpy()
    assert np.abs(arrays["features"] - expected).max() <= 1e-6 and expected.shape == (9, 4)
    assert json.loads(str(arrays["checkpoint"]))["layer"] == "head"
    assert arrays["labels"].tolist() == images.targets  # folders of a split alone are the classes too
    assert arrays["paths"][0] == "ant/0.jpg"

    plain = tmp_path / "plain.pth"
    torch.save({"arch": "tiny", "state_dict": {k: v for k, v in state.items() if "queue" not in k}}, plain)
    result = cli(embed.main, plain, folders, tmp_path / "g.npz", "--layer", "head", *SIZE)
    assert result[0] == 2 and "plain.pth has no head of MoCo (no encoder_q.fc)" in result[2]
    assert not (tmp_path / "g.npz").exists()


def test_the_size_of_conv3s_images_is_that_of_its_tensors(folders, cli, tmp_path):
    network = base_encoder("conv3", image_size=24)(num_classes=4)
    state = {f"encoder_q.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"arch": "conv3", "state_dict": state}, tmp_path / "c.pth")
    words = [tmp_path / "c.pth", folders / "val", tmp_path / "f.npz", "-j", "0"]
    code, output, errors = cli(embed.main, *words)
    assert code == 0 and "9 x 128 features" in output and "24 x 24 pixels" in output, errors
    refused(cli(embed.main, *words, "--force", "--image-size", "32"), "--image-size 24, not 32: use the same")


def test_paths_that_are_no_text_lists_and_bad_images(folders, checkpoint, cli, tmp_path):
    source = paths_of(image_folder(folders, "train"))
    odd = [os.fsdecode(b"caf\xe9.jpg"), 'a,"b\n.jpg', "ünd.jpg"]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, path in zip(odd, source, strict=False):
        shutil.copyfile(path, tmp_path / "in" / name)
    (tmp_path / "in" / "deep" / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "f.npy"
    result = cli(embed.main, checkpoint, tmp_path / "in", out, *SIZE)
    assert result[0] == 2 and "bad.jpg cannot be read" in result[2]
    assert "--on-bad-image skip leaves such images out" in result[2] and os.listdir(tmp_path) == ["in"]

    code, output, errors = cli(embed.main, checkpoint, tmp_path / "in", out, *SIZE, "--on-bad-image", "skip")
    assert code == 0 and "bad image: " in errors and "labels: none" in output
    assert sorted(os.listdir(tmp_path)) == ["f.csv", "f.json", "f.npy", "in"]
    found = read_features(out)
    assert found["paths"].tolist() == sorted(odd) and "labels" not in found
    by_name = dict(zip(found["paths"], found["features"], strict=True))
    assert (tmp_path / "f.csv").read_bytes().count(b"caf\xe9.jpg") == 1  # the bytes of the name

    (tmp_path / "list.txt").write_bytes(b"in/caf\xe9.jpg\n" + os.fsencode(source[1]) + b"\n")
    words = ["--images", tmp_path / "list.txt", checkpoint, tmp_path / "g.npz", *SIZE]
    assert cli(embed.main, *words)[0] == 0
    listed = np.load(tmp_path / "g.npz")
    assert listed["paths"].tolist() == ["in/" + odd[0], source[1]]
    assert np.array_equal(listed["features"], [by_name[odd[0]], by_name[odd[1]]])


def test_both_forms_hold_the_same_and_are_not_written_over(folders, checkpoint, cli, tmp_path):
    for name in ("f.npz", "f.npy"):
        assert cli(embed.main, checkpoint, folders, tmp_path / name, *SIZE)[0] == 0
    one, other = (read_features(tmp_path / name) for name in ("f.npz", "f.npy"))
    assert one.keys() == other.keys() == {"features", "paths", "labels", "classes", "checkpoint"}
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (tmp_path / "f.csv").read_text().splitlines()[:2] == ["path,label,class", "train/ant/0.jpg,0,ant"]

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("f.npz", "f.npy"):
        refused(
            cli(embed.main, checkpoint, folders / "val", tmp_path / name, *SIZE), "exists already.*--force"
        )
    (tmp_path / "f.npy").unlink()
    refused(cli(embed.main, checkpoint, folders, tmp_path / "f.npy", *SIZE), "f.csv exists already.*--force")
    (tmp_path / "f.npy").write_bytes(before[tmp_path / "f.npy"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli(embed.main, checkpoint, folders / "val", tmp_path / "f.npz", "--force", *SIZE)[0] == 0
    assert len(read_features(tmp_path / "f.npz")["features"]) == 9


def test_a_full_disk_leaves_nothing_and_the_old_file(folders, checkpoint, cli, tmp_path, monkeypatch):
    (tmp_path / "f.npz").write_text("old")

    def full(file, **arrays):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    result = cli(embed.main, checkpoint, folders, tmp_path / "f.npz", "--force", *SIZE)
    assert result[0] == 2 and "cannot write" in result[2] and "No space left on device" in result[2]
    assert (tmp_path / "f.npz").read_text() == "old" and os.listdir(tmp_path) == ["f.npz"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["CKPT", "DATA", "o.txt"], "o.txt must end in .npz"),
        (["CKPT", "DATA", "no/o.npz"], "the folder no does not exist"),
        (["CKPT", "DATA", "x" * 252 + ".npz"], "cannot write .*File name too long"),
        (["CKPT", "EMPTY", "o.npz"], "there is no image in .* names of images end in .jpg"),
        (["CKPT", "nowhere", "o.npz"], "there is no folder nowhere"),
        (["CKPT", "o.npz"], "give the folder DIR .* or a list of --images, one of them"),
        (["CKPT", "DATA", "o.npz", "--images", "list"], "one of them"),
        (["nothing", "DATA", "o.npz"], "there is no file nothing, and no released model"),
        (["CKPT", "DATA", "o.npz", "-a", "resnet18"], "is of -a tiny, not of -a resnet18"),
        (["CKPT", "DATA", "o.npz", "-b", "0"], "--batch-size must be 1 or more, not 0"),
        (["CKPT", "DATA", "o.npz", "--device", "gpu"], "--device gpu cannot be used here"),
    ],
)
def test_wrong_use_is_one_sentence(words, sentence, folders, checkpoint, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    paths = {"CKPT": checkpoint, "DATA": folders, "EMPTY": tmp_path / "empty"}
    refused(cli(embed.main, *(paths.get(word, word) for word in words)), sentence)
    assert os.listdir(tmp_path) == ["empty"]


# Maps.


def figure_of(paths, cli, monkeypatch, *words):
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(plot, "save_picture", lambda figure, out: drawn.append(figure))
        code, _, errors = cli(plot.main, *paths, "-o", "never_written.png", *words)
    assert code == 0, errors
    return drawn[0]


def points_of(axis):
    """{label: sorted points}."""
    found = {}
    for line in axis.lines:
        if line.get_gid():
            found.setdefault(line.get_gid(), []).extend(map(tuple, line.get_xydata().tolist()))
    return {label: np.array(sorted(points)) for label, points in found.items()}


def write(path, classes, count=60, spread=0.01):
    """A file of features about one direction for each class, in 8 dimensions. Returns (features, labels)."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % max(len(classes), 1)
    features = 7 * np.eye(8)[labels % 8] + rng.normal(0, spread, (count, 8))
    arrays = {"labels": labels, "classes": np.array(classes)} if classes else {}
    np.savez(path, features=features.astype(np.float32), **arrays)
    return features, labels


def test_a_map_shows_the_principal_components_colored_by_class(tmp_path, cli, monkeypatch):
    path = tmp_path / "f.npz"
    features, labels = write(path, ["ant", "b$e", "cat"])
    [axis] = figure_of([path], cli, monkeypatch).axes
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    rows -= rows.mean(axis=0)
    u, s, v = np.linalg.svd(rows)
    signs = [np.sign(weights[np.abs(weights).argmax()]) for weights in v[:2]]
    expected = u[:, :2] * s[:2] * signs
    for label, points in points_of(axis).items():
        assert np.allclose(points, sorted(map(tuple, expected[labels == int(label)])), atol=1e-5)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ant", r"b\$e", "cat"]
    assert axis.get_title(loc="left").endswith("f.npz\n60 images by PCA")
    share = s[0] ** 2 / (s**2).sum()
    assert axis.get_xlabel() == f"component 1 ({share:.0%} of the variance)"


def test_maps_of_few_labels_many_and_those_of_trifeature(tmp_path, cli, monkeypatch):
    write(tmp_path / "none.npz", [])
    write(tmp_path / "many.npz", [f"class {n}" for n in range(20)], count=3500)
    first, second = figure_of([tmp_path / "none.npz", tmp_path / "many.npz"], cli, monkeypatch).axes
    np.savez(tmp_path / "own.npz", features=np.eye(4), labels=np.array([0, 2, 2, 2]))  # of a clustering
    [own] = figure_of([tmp_path / "own.npz"], cli, monkeypatch).axes
    assert [text.get_text() for text in own.get_legend().get_texts()] == ["0", "2"]
    assert list(points_of(first)) == ["0"] and first.get_legend() is None
    texts = [text.get_text() for text in second.get_legend().get_texts()]
    assert len(texts) == 15 and texts[-1] == "6 others"
    assert second.get_title(loc="left").endswith("3,000 of 3,500 images by PCA")
    assert sum(map(len, points_of(second).values())) == 3000

    write(tmp_path / "tri.npz", ["star_solid_red", "star_dots_red", "plus_dots_blue"])
    axes = figure_of([tmp_path / "tri.npz"], cli, monkeypatch).axes
    assert [axis.get_title(loc="left").rpartition(", ")[2] for axis in axes] == ["shape", "texture", "color"]
    legends = [{text.get_text() for text in axis.get_legend().get_texts()} for axis in axes]
    assert legends == [{"star", "plus"}, {"solid", "dots"}, {"red", "blue"}]
    assert [sorted(map(len, points_of(axis).values())) for axis in axes] == [[20, 40]] * 3


@pytest.mark.slow
def test_tsne_keeps_classes_apart(tmp_path, cli, monkeypatch):
    pytest.importorskip("sklearn")
    path = tmp_path / "f.npz"
    write(path, ["ant", "bee", "cat"], count=30)
    [axis] = figure_of([path], cli, monkeypatch, "--tsne").axes
    points = points_of(axis)
    centers = np.array([group.mean(axis=0) for group in points.values()])
    radius = max(np.abs(group - center).max() for group, center in zip(points.values(), centers, strict=True))
    assert min(np.linalg.norm(centers[i] - centers[i - 1]) for i in range(3)) > 2 * radius


def test_without_scikit_learn_its_pip_line_is_said(tmp_path, cli, monkeypatch):
    path = tmp_path / "f.npz"
    write(path, ["ant"])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused(cli(plot.main, path, "--tsne", "-o", tmp_path / "o.png"), "pip install scikit-learn")
    assert os.listdir(tmp_path) == ["f.npz"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nothing.npz"], "nothing.npz cannot be read as features .No such file.*moco.embed"),
        (["text.npz"], "text.npz cannot be read as features"),
        (["flat.npz"], r"flat.npz holds no features N x D .*\(features float64 \(3,\)\)"),
        (["odd.npz"], r"odd.npz holds no features N x D with a label each"),
        (["two.npz"], "two.npz has 2 x 8 features; a map needs 3 images"),
        (["nan.npz"], "nan.npz has features that are not finite"),
        (["f.npz", "run"], "f.npz is of features and run of a run: draw them in two pictures"),
        (["run", "--tsne"], "--tsne maps features"),
    ],
)
def test_what_cannot_be_mapped_is_one_sentence(words, sentence, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("f.npz", ["ant"])
    write("two.npz", [], count=2)
    (tmp_path / "text.npz").write_text("no zip")
    np.savez("odd.npz", features=np.eye(3), labels=np.array([0, 1, -1]))
    np.savez("flat.npz", features=np.zeros(3))
    np.savez("nan.npz", features=np.full((5, 4), np.nan, np.float32))
    refused(cli(plot.main, *words, "-o", "o.png"), sentence)
    assert not (tmp_path / "o.png").exists()
