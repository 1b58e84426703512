"""The measurement of the data pipeline: it runs what it names, on the images it is given, and says so."""

import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from moco.bench import __main__ as bench
from moco.bench import data as bench_data
from moco.bench import photographs
from moco.data import decode
from moco.data import loader as data_loader
from moco.data.decode import decode_by_pillow

TINY = ["--images", "2", "--rounds", "2", "--size", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three images of 60 x 40 pixels in one folder, three of 20 x 40 in another, and a text."""
    root = tmp_path_factory.mktemp("pictures")
    for name, width in (("wide", 60), ("narrow", 20)):
        (root / name).mkdir()
        for number in range(3):
            Image.effect_noise((width, 40), 50).convert("RGB").save(root / name / f"{number}.jpg")
    (root / "readme.txt").write_text("not an image")
    return root


def test_the_report_is_about_the_images_of_the_folder(pictures, tmp_path, cli):
    words = [pictures, *TINY, "--workers", "1", "--json", tmp_path / "found.json"]
    code, output, errors = cli(bench.main, "data", *words)
    assert code == 0, errors
    report = json.loads((tmp_path / "found.json").read_text())
    assert all(f"| {title} " in output for title in report["tables"])
    assert f"2 of {pictures} (40 x 40 and" in report["about"]["setting"]["images"]  # one of each sub-folder
    pipelines, transport, end_to_end, *_ = report["tables"].values()
    rows = list(pipelines.values())
    for row in (*rows, *transport.values(), *end_to_end.values()):
        assert 0 < row["pairs/s"]["low"] <= row["pairs/s"]["median"] <= row["pairs/s"]["high"]
    assert rows[0]["of published"]["median"] == rows[-1]["of the limit"]["median"] == 1
    cpu = rows[0]["CPU ms a pair"]["median"]
    assert rows[0]["pairs/s"]["median"] == pytest.approx(1000 / cpu, rel=0.3)  # rates of CPU time
    assert list(transport) == ["float32, default collate", "uint8, default collate", "uint8, ring"]
    assert list(end_to_end) == ["published DataLoader", f"TrainLoader, {decode.decoder_name()}"]
    assert not multiprocessing.active_children()


def test_images_are_made_when_no_folder_is_named_and_removed(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, output, errors = cli(bench.main, "data", *TINY, "--workers", "0")
    assert code == 0, errors
    assert "2 made to be like photographs (570 x 428" in output and "transport" not in output
    assert not list(tmp_path.iterdir())

    def interrupted(paths, *_):
        assert all(Path(path).parent.parent == tmp_path for path in paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_data, "pipelines", interrupted)
    assert cli(bench.main, "data", *TINY, "--workers", "0")[0] == 130
    assert not list(tmp_path.iterdir())


class FakeSimplejpeg:
    """Replaces the package, which need not be installed."""

    @staticmethod
    def decode_jpeg_header(data):
        return 40, 40, "YCbCr", "420"

    decode_jpeg = staticmethod(lambda data: decode_by_pillow(data))


def test_each_pipeline_does_what_its_name_says(pictures, monkeypatch):
    calls = Counter()

    def spy(module, name, label=None):
        original = getattr(module, name)

        def called(*arguments, **keywords):
            calls[label(*arguments) if label else name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, called)

    fake = FakeSimplejpeg()
    monkeypatch.setattr(decode, "simplejpeg", fake)
    spy(decode, "decode_by_pillow")
    spy(fake, "decode_jpeg")
    spy(data_loader, "photometric")
    for module in (data_loader, bench_data):
        spy(module, "crop_resize", lambda image, view, size, resize: f"resize {resize}")
    spy(bench_data.Images, "__getitem__")

    paths = sorted(map(str, pictures.glob("*/*.jpg")))
    torched, by_pillow = {"resize torch": 12}, {"decode_by_pillow": 6}
    expected = [
        {"__getitem__": 6},
        {**by_pillow, "resize pil": 12, "photometric": 12},
        {**by_pillow, "resize pil": 12},
        {**by_pillow, **torched},
        {"decode_jpeg": 6, **torched},
        torched,
        {"decode_jpeg": 6, **torched},
    ]

    def counted():
        for epoch, pairs in bench_data.pipelines(paths, 16, 3).values():
            calls.clear()
            assert len(list(epoch(0))) in (2, 6) and pairs == 6
            yield dict(calls)

    assert list(counted()) == expected
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert list(counted()) == [*expected[:4], torched, {**by_pillow, **torched}]


def test_cpu_time_counts_that_of_children():
    def busy(ready, end):
        sum(range(5_000_000))
        ready.set()
        end.wait()

    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    child = context.Process(target=busy, args=(ready, end))
    before, own = bench_data.cpu_seconds(), time.process_time()
    child.start()
    ready.wait()
    after, own = bench_data.cpu_seconds(), time.process_time() - own
    end.set()
    child.join()
    assert after - before > own + 0.03


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "there is no folder missing"),
        (["EMPTY"], "there is no image in "),
        (["BAD"], "bad.jpg cannot be read as an image"),
        (["--images", "0"], "--images must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
    ],
)
def test_wrong_use_is_a_sentence(words, message, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "BAD"):
        (tmp_path / name).mkdir()
    (tmp_path / "BAD" / "bad.jpg").write_text("no image")
    code, output, errors = cli(bench.main, "data", *words)
    assert (code, output) == (2, "")
    assert message in errors and "Traceback" not in errors


def test_made_photographs_are_jpeg_files_of_the_intended_size(tmp_path):
    for path, size in zip(photographs.make_photographs(tmp_path, 2), photographs.SIZES, strict=False):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", size)
        assert os.path.getsize(path) / (size[0] * size[1]) == pytest.approx(0.42, rel=0.15)
