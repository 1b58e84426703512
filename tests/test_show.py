"""The sheet of pairs: the pixels that training gets; and how moco.show is told what to draw, and where."""

import shutil
import sys

import numpy as np
import torch
from command_lines import MOCO
from PIL import Image
from sheets import draw_sheet, pictures, refused, texts

import main_moco
from moco import finish, show
from moco.data import image_folder
from moco.draws import VIEW, draw, moco_v2
from moco.show_pairs import pairs_of, what_was_done


def test_pairs_are_what_training_gets_to_the_pixel(folders, cli, tmp_path, monkeypatch):
    trained = []  # uint8 (N, 3, S, S): query views and key views in turn

    def normalise(pixels, plain=finish.normalise):
        trained.append(pixels.clone())
        return plain(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(finish, "normalise", normalise)
        words = [*MOCO, "--epochs", "2", "--output-dir", tmp_path / "run", folders]
        code, _, errors = cli(main_moco.main, *words)
    assert code == 0, errors
    queries, keys = (torch.cat(trained[first::2]).permute(0, 2, 3, 1).numpy() for first in (0, 1))
    assert len(queries) == len(keys) == 2 * 24

    words = ["pairs", folders, "--aug-plus", "--image-size", "16", "--seed", "3", "--count", "8"]
    shown = pictures(draw_sheet(cli, monkeypatch, *words, "--epoch", "1"))
    assert len(shown) == 3 * 8
    for number in range(8):
        image, query, key = shown[3 * number : 3 * number + 3]
        assert image.shape == (30, 40, 3)
        assert np.array_equal(query, queries[24 + number]) and np.array_equal(key, keys[24 + number])
    assert not np.array_equal(query, queries[7])  # of the other epoch

    words[-1] = "1"
    first = pictures(draw_sheet(cli, monkeypatch, *words))
    assert np.array_equal(first[1], queries[0]) and np.array_equal(first[2], keys[0])
    for other in (["--resize", "torch"], ["--seed", "4"]):
        assert not np.array_equal(pictures(draw_sheet(cli, monkeypatch, *words, *other))[1], queries[0])
    words.remove("--aug-plus")
    assert not np.array_equal(pictures(draw_sheet(cli, monkeypatch, *words))[1], queries[0])


def test_a_pair_comes_with_its_image_its_boxes_and_what_was_done(folders, cli, monkeypatch):
    figure = draw_sheet(
        cli,
        monkeypatch,
        "pairs",
        folders,
        "--image-size",
        "16",
        "--count",
        "2",
        "--aug-plus",
        "--decoder",
        "pillow",
    )
    images = image_folder(folders, "train")
    [first, second] = pairs_of(images, moco_v2(), 16, "pil", 0, 0, 2, "pillow")
    assert first.index != second.index
    path, target = images.samples[first.index]
    with Image.open(path) as image:
        assert np.array_equal(pictures(figure)[0], np.asarray(image))
    records = draw(moco_v2(), 40, 30, 0, 0, first.index)
    image_axis, *view_axes = figure.axes[:3]
    assert image_axis.get_title(loc="left") == f"image {first.index}" and texts(image_axis) == [
        images.classes[target]
    ]
    for record, box, axis in zip(records, image_axis.patches, view_axes, strict=True):
        place = (box.get_y() + 0.5, box.get_x() + 0.5, box.get_height(), box.get_width())
        assert place == record.item()[:4]
        assert texts(axis) == [what_was_done(record, (30, 40))]
    assert [axis.get_title(loc="left") for axis in view_axes] == ["query", "key"]
    assert "MoCo v2 augmentation, views of 16 x 16 pixels, resize pil" in figure.texts[0].get_text()
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:2] == ["the query is cut out here", "the key is cut out here"]
    boxes, examples = image_axis.patches, figure.legends[0].get_patches()[:2]
    assert [box.get_edgecolor() for box in boxes] == [example.get_edgecolor() for example in examples]
    assert boxes[0].get_linestyle() != boxes[1].get_linestyle()


def test_what_was_done_is_said_in_two_lines():
    record = np.zeros((), VIEW)
    record["height"], record["width"] = 10, 20
    assert what_was_done(record, (40, 10)) == "crop 50%\n"
    record["flip"] = record["gray"] = record["jitter"] = True
    record["sigma"] = 1.26
    assert what_was_done(record, (40, 10)) == "crop 50%, flipped\njitter, gray, blur 1.3"


def test_trifeature_is_found_as_the_programs_find_it(folders, cli, tmp_path, monkeypatch):
    for split, names in (("train", ["star_dots_red", "tee_grid_pink"]), ("val", ["star_grid_red"])):
        for name in names:
            shutil.copytree(folders / "train" / "ant", tmp_path / "trifeature" / split / name)
    data = ["--dataset", "trifeature", "--dataset_root", tmp_path, "--image-size", "32", "--count", "2"]
    figure = draw_sheet(
        cli, monkeypatch, "neighbours", "untrained", *data, "-a", "resnet18", "-j", "0", "--neighbours", "1"
    )
    assert "neighbours agree in shape" in figure.texts[0].get_text()
    names = [texts(axis)[0] for axis in draw_sheet(cli, monkeypatch, "pairs", *data).axes[::3]]
    assert names and set(names) <= {"star_dots_red", "tee_grid_pink"}


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
    assert list(tmp_path.iterdir()) == [out]


def test_without_matplotlib_nothing_is_computed(folders, cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(cli(show.main, "pairs", folders, "-o", tmp_path / "o.png"), "pip install matplotlib")
    monkeypatch.undo()


def test_an_image_that_cannot_be_read_is_named(folders, cli, tmp_path):
    shutil.copytree(folders, tmp_path / "data")
    bad = tmp_path / "data" / "train" / "ant" / "0.jpg"
    bad.write_bytes(b"no image")
    out = tmp_path / "o.png"
    refused(cli(show.main, "pairs", tmp_path / "data", "--count", "24", "-o", out), f"{bad} cannot be read")
    assert not out.exists()
