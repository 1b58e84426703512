"""The measurement of the data pipeline: it runs what it names, on the images it is given, and says so."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from command_lines import ROOT
from PIL import Image

from moco import bench, bench_data, bench_pipelines, bench_report, bench_workers, samples
from moco.decoders import decode_pillow
from moco.photometric import Finish

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


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_json_is_one_object_about_the_images_of_the_folder(pictures, cli):
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    code, output, errors = cli(bench.main, "data", pictures, *TINY, "--workers", "1", "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert report["images"]["folder"] == str(pictures)
    assert (report["images"]["count"], report["images"]["mean_width"]) == (2, 40)  # one of each sub-folder

    rows = report["pipelines"]
    fast = "simplejpeg" if "simplejpeg" in report["decoder"] else "torch_resize"
    for key, name in (("published", "published"), ("fast", fast), ("limit", "limit")):
        rate = rows[name]["pairs_per_s"]
        assert report[f"{key}_pairs_per_s"] == rate["median"] > 0
        assert rate["low"] <= rate["median"] <= rate["high"]
    assert rows["published"]["to_published"]["median"] == rows["limit"]["to_limit"]["median"] == 1
    assert report["fast_to_limit"] == rows[fast]["to_limit"]["median"]
    assert sum(report["published_stages_percent"].values()) == pytest.approx(100, abs=1)
    assert len(report["transport"]) == 3
    assert all(row["cpu_ms_per_pair"]["low"] > 0 for row in report["transport"].values())
    assert report["end_to_end"]["fast_to_published"]["low"] > 0
    assert report["device_half"].keys() >= ({"exact"} if torch.cuda.is_available() else {"not_run"})
    assert report["pinned_to_core"] in cores

    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads
    assert not multiprocessing.active_children()
    _check_tables(report)


def _check_tables(report):
    report["device_half"] = {"views": 1024, "exact": {"ms": 2.5, "how": "by kernels"}}
    report["hardware"]["gpu"] = "a GPU"
    text = bench_report.data_tables(report)
    assert max(map(len, text.splitlines())) <= 80
    for row in report["pipelines"].values():
        assert row["what"] in text
    for words in ("uint8, ring", "published DataLoader", "exact on a GPU", "2.50", "by kernels"):
        assert words in text


def test_images_are_made_when_no_folder_is_named_and_removed(temporary, cli, monkeypatch):
    code, output, errors = cli(bench.main, "data", *TINY, "--workers", "0")
    assert code == 0, errors
    assert "2 images made to be like photographs: 570 x 428" in output
    assert "--workers 0" in output
    assert not list(temporary.iterdir())

    def full(place, count):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bench_data, "make_photographs", full)
        assert "set TMPDIR to a folder" in cli(bench.main, "data", *TINY)[2]

    def interrupted(paths, *_):
        assert all(Path(path).parent.parent == temporary for path in paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_data, "_one_core", interrupted)
    assert cli(bench.main, "data", *TINY, "--workers", "0")[0] == 130
    assert not list(temporary.iterdir())


def test_each_pipeline_does_what_its_name_says(pictures, monkeypatch):
    calls = Counter()

    def spy(module, name, label=lambda arguments: None):
        original = getattr(module, name)

        def called(*arguments, **keywords):
            calls[label(arguments) or name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, called)

    monkeypatch.setattr(bench_pipelines, "decode_simplejpeg", lambda data: decode_pillow(data))
    for name in ("decode_pillow", "decode_simplejpeg", "read_as_published"):
        spy(bench_pipelines, name)
    spy(bench_pipelines, "default_collate", lambda arguments: f"collate {arguments[0][0][0][1].dtype}")
    spy(samples, "crop_resize", lambda arguments: f"resize {arguments[3]}")
    spy(samples, "photometric_pil")
    spy(bench_pipelines, "crop_resize", lambda arguments: f"resize {arguments[3]}")

    paths = sorted(map(str, pictures.glob("*/*.jpg")))
    runs = bench_pipelines.pipelines(paths, 16, 4, simplejpeg=True)
    crops = {"resize torch": 12}
    expected = {
        "published": {"read_as_published": 6, "collate torch.float32": 2},
        "decode_once": {"decode_pillow": 6, "resize pil": 12, "photometric_pil": 12},
        "colours_on_device": {"decode_pillow": 6, "resize pil": 12},
        "torch_resize": {"decode_pillow": 6, **crops},
        "simplejpeg": {"decode_simplejpeg": 6, **crops},
        "cached": crops,
        "limit": {"decode_simplejpeg": 6, **crops},
    }
    assert runs.keys() == expected.keys() == bench_pipelines.NAMES.keys()
    for name, run in runs.items():
        work = run(0)
        calls.clear()
        work()
        assert calls == expected[name], name

    runs = bench_pipelines.pipelines(paths, 16, 4, simplejpeg=False)
    assert runs.keys() == expected.keys() - {"simplejpeg"}
    calls.clear()
    runs["limit"](0)()
    assert calls == {"decode_pillow": 6, **crops}


def test_only_the_work_of_a_turn_is_timed():
    numbers = []

    def run(name, number):
        numbers.append((name, number))
        sum(range(2_000_000))
        return lambda: name == "b" and sum(range(200_000))

    turn = bench_pipelines.turn_of({name: lambda number, name=name: run(name, number) for name in "ab"})
    seconds = {name: [turn(name) for _ in range(3)] for name in "ab"}
    assert numbers == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert 10 * max(seconds["a"]) < min(seconds["b"])


def test_the_device_half_takes_the_batches_of_the_ring(pictures, monkeypatch):
    finished, original = [], Finish.__call__

    def spy(self, pixels, views):
        finished.append(original(self, pixels, views))
        return finished[-1]

    monkeypatch.setattr(Finish, "__call__", spy)
    paths, device = sorted(map(str, pictures.glob("*/*.jpg"))), torch.device("cpu")
    with bench_workers.end_to_end(paths, decode_pillow, 16, 2, 1, device, "exact") as epochs:
        epochs["fast"].run()
        count = epochs["fast"].pairs // 2
        first, whole, _ = epochs["published"].run()
        assert 0 < first < whole
    assert [(one.shape, one.dtype) for one in finished] == [((4, 3, 16, 16), torch.float32)] * count
    assert not multiprocessing.active_children()
    times = bench_data.device_times(("exact", "float"), 2, 16, device)
    assert times["exact"]["ms"] > 0 and times["float"]["ms"] > 0


def test_cpu_time_counts_that_of_children():
    def busy(ready, end):
        sum(range(5_000_000))
        ready.set()
        end.wait()

    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    child = context.Process(target=busy, args=(ready, end))
    before, own = bench_workers._cpu_seconds(), time.process_time()
    child.start()
    ready.wait()
    after, own = bench_workers._cpu_seconds(), time.process_time() - own
    end.set()
    child.join()
    assert after - before > own + 0.03


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "there is no folder missing"),
        (["EMPTY"], "holds no image; name a folder of photographs"),
        (["BAD"], "bad.jpg cannot be read as an image"),
        (["--images", "0"], "--images must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--size", "0"], "--size must be at least 1"),
        (["--batch-size", "-3"], "--batch-size must be at least 1"),
        (["--workers", "-1"], "--workers must be 0 or more"),
        (["--device-aug", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_use_is_a_sentence(words, message, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "BAD"):
        (tmp_path / name).mkdir()
    (tmp_path / "BAD" / "bad.jpg").write_text("no image")
    code, output, errors = cli(bench.main, "data", *words)
    assert (code, output) == (2, "")
    assert message in errors
    assert "Traceback" not in errors


def test_a_small_dev_shm_is_told_before_a_loader_dies_of_it(pictures, monkeypatch, cli):
    usage = shutil.disk_usage("/")._replace(free=64_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ["data", pictures, "--images", "2", "--rounds", "1", "--size"]
    code, _, errors = cli(bench.main, *words, "224")
    assert code == 2
    assert "/dev/shm has 64 MB free" in errors
    assert "--shm-size" in errors
    assert cli(bench.main, *words, "16", "--workers", "1", "--batch-size", "2")[0] == 0


def test_help_does_not_need_torch():
    script = "import sys, moco.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0
