"""Trifeature data sets: what is held out, and that a set appears only when it is complete."""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_lines import ROOT
from forked_program import forked
from PIL import Image

from moco import trifeature
from moco.errors import UserError
from moco.trifeature import COMBINATIONS, FACTORS, factor_of, is_combination
from moco.trifeature.__main__ import main

PIXELS = "3087165b5cec189013ba4d1beaffb39a4b1d4e2cbb3b49daf42410cf65260db3"  # of 32 px, 1 render, seed 3


def command(*arguments):
    return [sys.executable, "-m", "moco.trifeature", *map(str, arguments)]


def contents(folder):
    """{path below the folder: bytes} of all its files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set of 32 px, 1 render, seed 3."""
    out = tmp_path_factory.mktemp("trifeature") / "set"
    trifeature.generate(out, size=32, renders=1, seed=3)
    return out


def test_set_on_disk(small):
    everything = {"_".join(combination) for combination in COMBINATIONS}
    held = {"_".join(combination) for combination in trifeature.held_out(3)}
    assert sorted(p.name for p in small.iterdir()) == ["train", "trifeature.json", "val"]
    assert {p.name for p in (small / "val").iterdir()} == held
    assert {p.name for p in (small / "train").iterdir()} == everything - held
    settings = json.loads((small / "trifeature.json").read_text())
    assert settings == {"version": 1, "size": 32, "renders": 1, "seed": 3}
    images = list(small.glob("*/*/*"))
    assert len(images) == 1000 and len({p.read_bytes() for p in images}) == 1000
    with Image.open(images[0]) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))


@pytest.fixture
def first(small, monkeypatch):
    """The images of `small` among the first 100 combinations, by name: all that is drawn from now on."""
    monkeypatch.setattr(trifeature, "COMBINATIONS", COMBINATIONS[:100])
    names = {"_".join(combination) for combination in COMBINATIONS[:100]}
    return {name: data for name, data in contents(small).items() if Path(name).parent.name in names}


def test_images_depend_on_the_seed_but_not_on_how_many_there_are(first, tmp_path):
    trifeature.generate(tmp_path / "a", size=32, renders=2, seed=3)
    more = contents(tmp_path / "a")
    assert first == {name: more[name] for name in first} and len(more) == 2 * len(first) + 1
    trifeature.generate(tmp_path / "b", size=32, renders=1, seed=4)
    other = contents(tmp_path / "b")
    same_name = [name for name in first if name in other]
    assert len(same_name) > 50 and all(first[name] != other[name] for name in same_name)


def test_pixels_are_those_that_were_always_drawn(small):
    digest = hashlib.sha256()
    for name, data in sorted(contents(small).items()):
        with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:
            digest.update(name.encode() + image.tobytes())
    assert digest.hexdigest() == PIXELS


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_behind(how, tmp_path):
    words = command(tmp_path / "set", "--size", 64, "--renders", 100)
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while len(list(tmp_path.glob(".set.*.tmp/train/*/*.png"))) < 20 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(how)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_sentence(tmp_path):
    def limit():  # as on a full disk the system refuses to write more, here to any one file
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    words = command(tmp_path / "set", "--size", 64, "--renders", 1)
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"cannot write {tmp_path}/set: File too large; make room" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["OUT", "--size", "15"], "--size must be from 16 to 1024 pixels, not 15"),
        (["OUT", "--renders", "0"], "--renders must be at least 1, not 0"),
        (["OUT", "--seed", "-1"], "--seed must be at least 0, not -1"),
        (["FILE/OUT"], "cannot write"),
        (["FILE"], "is no Trifeature set (it has no trifeature.json); choose another folder"),
        (["FOLDER", "--force"], "(it has no trifeature.json): --force does not delete it; choose"),
        (
            ["SET"],
            "holds a set drawn with version 1, size 32, renders 1, seed 3; replace it with --force, or",
        ),
    ],
)
def test_wrong_use_is_a_sentence_and_changes_nothing(arguments, sentence, small, tmp_path, monkeypatch, cli):
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "file").write_text("mine")
    (tmp_path / "SET").symlink_to(small)
    before = contents(tmp_path), contents(small)
    monkeypatch.chdir(tmp_path)
    code, _, errors = cli(main, *arguments)
    assert code == 2 and sentence in errors
    assert (contents(tmp_path), contents(small)) == before and len(os.listdir()) == 3


def test_force_replaces_a_set_only_when_the_new_one_is_complete(small, tmp_path, monkeypatch, cli):
    code, output, errors = cli(main, small, "--size", 32, "--renders", 1, "--seed", 3)
    assert (code, output, errors) == (0, f"{small}: already drawn with these settings\n", "")

    def draw(folder, size, *rest):
        Path(folder, f"{size}.png").write_text("drawn")
        if size == 20:
            raise OSError("the disk is full")

    monkeypatch.setattr(trifeature, "_draw", draw)
    out = tmp_path / "set"
    trifeature.generate(out, size=18)
    with pytest.raises(UserError, match="the disk is full"):
        trifeature.generate(out, size=20, force=True)
    assert set(contents(out)) == {"18.png", "trifeature.json"}
    trifeature.generate(out, size=19, force=True)
    assert set(contents(out)) == {"19.png", "trifeature.json"} and list(tmp_path.iterdir()) == [out]


def test_two_that_ensure_at_once_get_one_complete_set(first, tmp_path, monkeypatch):
    both, draw = threading.Barrier(2), trifeature._draw
    monkeypatch.setattr(trifeature, "_draw", lambda *words: both.wait(20) >= 0 and draw(*words))
    out = tmp_path / "data" / "set"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(lambda _: trifeature.ensure(out, 32, 1, 3), range(2)))
    assert sorted(drawn) == [False, True]
    images = {name: data for name, data in contents(out).items() if name.endswith(".png")}
    assert images == first and list(out.parent.iterdir()) == [out]

    assert trifeature.ensure(out, 64, 2) is False  # whatever its settings
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        trifeature.ensure(tmp_path / "file" / "set", 32, 1)


def test_a_process_waits_for_another_that_draws(first, tmp_path, monkeypatch):
    draw, begun = trifeature._draw, tmp_path / "begun"

    def draw_late(*words):
        with open(begun, "a") as file:
            file.write("drawn\n")
        time.sleep(0.3)
        draw(*words)

    monkeypatch.setattr(trifeature, "_draw", draw_late)
    out = tmp_path / "data" / "set"
    running = [forked(lambda: print(trifeature.ensure(out, 32, 1, 3)), (1,)) for _ in range(3)]
    assert sorted(output.read() for _, output in running) == ["False\n", "False\n", "True\n"]
    for pid, _ in running:
        os.waitpid(pid, 0)
    assert begun.read_text() == "drawn\n" and os.listdir(out.parent) == ["set"]
    assert {name: data for name, data in contents(out).items() if name.endswith(".png")} == first


def test_a_second_that_draws_the_same_folder_is_refused(first, tmp_path, monkeypatch):
    draw, out = trifeature._draw, tmp_path / "set"

    def draw_beside(*words):  # while the first draws
        pid, output = forked(lambda: trifeature.generate(out, 32, 1, 4, force=True), (1, 2))
        assert f"error: process {os.getpid()} is making {out} (" in output.read()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        draw(*words)

    monkeypatch.setattr(trifeature, "_draw", draw_beside)
    assert trifeature.generate(out, 32, 1, 3) and os.listdir(tmp_path) == ["set"]
    assert {name: data for name, data in contents(out).items() if name.endswith(".png")} == first


def test_held_out_combinations_are_balanced():
    assert [len(names) for names in FACTORS.values()] == [10, 10, 10]
    held = trifeature.held_out(3)
    assert len(held) == 200 and held <= set(COMBINATIONS)
    for position in range(3):
        values = collections.Counter(combination[position] for combination in held)
        pairs = collections.Counter((*c[:position], *c[position + 1 :]) for c in held)
        assert len(values) == 10 and set(values.values()) == {20}
        assert len(pairs) == 100 and set(pairs.values()) == {2}
    assert held == trifeature.held_out(3) != trifeature.held_out(4)


def test_factor_of_reads_each_factor_from_a_folder_name():
    for i, combination in enumerate(COMBINATIONS):
        name = "_".join(combination)
        values = [factor_of(name, factor) for factor in ("shape", "texture", "color")]
        assert is_combination(name) and values == [i // 100, i // 10 % 10, i % 10]
    for name in ("n01440764", "triangle_solid", "solid_triangle_red", "triangle_solid_red_", "tee_rain_Red"):
        with pytest.raises(UserError, match=f"'{name}' is not named shape_texture_color"):
            factor_of(name, "shape")
        assert not is_combination(name)
