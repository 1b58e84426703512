"""Trifeature data sets: what is held out, and that a set is there as a whole or not at all."""

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
import time
from pathlib import Path

import pytest
from PIL import Image

from moco import files, trifeature
from moco.errors import UserError
from moco.trifeature import COMBINATIONS, FACTORS, factor_of, is_combination
from moco.trifeature.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PIXELS = "3087165b5cec189013ba4d1beaffb39a4b1d4e2cbb3b49daf42410cf65260db3"  # of 32 px, 1 render, seed 3


def command(*arguments):
    return [sys.executable, "-m", "moco.trifeature", *map(str, arguments)]


def contents(folder):
    """{path below the folder: bytes} of all its files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def alive(process):
    """Whether a process id is one that runs: zombies that nobody reaps do not count."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(process):
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                children.append(int(stat.parent.name))
        except OSError:
            pass  # it has ended since
    return children


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert value, "this did not happen in time"
    return value


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set of 32 px, 1 render, seed 3, drawn by one process."""
    out = tmp_path_factory.mktemp("trifeature") / "set"
    trifeature.generate(out, size=32, renders=1, seed=3, workers=1, progress=False)
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


def test_images_depend_on_the_seed_but_not_on_the_processes(small, tmp_path):
    first = {name: data for name, data in contents(small).items() if name.endswith(".png")}
    trifeature.generate(tmp_path / "a", size=32, renders=2, seed=3, workers=3, progress=False)
    more = contents(tmp_path / "a")
    assert first == {name: more[name] for name in first} and len(more) == 2 * len(first) + 1
    trifeature.generate(tmp_path / "b", size=32, renders=1, seed=4, workers=3, progress=False)
    other = contents(tmp_path / "b")
    same_name = [name for name in first if name in other]
    assert len(same_name) > 500 and all(first[name] != other[name] for name in same_name)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruption_leaves_neither_files_nor_processes(how, tmp_path):
    out = tmp_path / "set"
    process = subprocess.Popen(
        command(out, "--size", 64, "--renders", 100, "--workers", 2),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob(".set.*.tmp/train/*/*.png"))) > 20)
        workers = children_of(process.pid)
        assert len(workers) == 2 and all(map(alive, workers))
        os.killpg(process.pid, how)  # to the group, as a terminal does
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    wait_for(lambda: not any(map(alive, workers)))
    assert not out.exists()
    if how != signal.SIGKILL:  # nobody can clean up after that
        assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
        assert list(tmp_path.iterdir()) == []


def test_a_drawing_process_that_dies_ends_the_others(tmp_path):
    arguments = command(tmp_path / "set", "--size", 64, "--renders", 100, "--workers", 2)
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        workers = wait_for(lambda: len(found := children_of(process.pid)) == 2 and found)
        wait_for(lambda: len(list(tmp_path.glob(".set.*.tmp/train/*/*.png"))) > 20)
        os.kill(workers[1], signal.SIGKILL)
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == 2 and "a drawing process ended (-9)" in said and "Traceback" not in said
    assert not any(map(alive, workers)) and list(tmp_path.iterdir()) == []


def test_full_disk_is_a_sentence(tmp_path):
    def limit():  # stands for a full disk: the system refuses to write more, here to any one file
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    arguments = command(tmp_path / "set", "--size", 64, "--renders", 1, "--workers", 2)
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"cannot write {tmp_path}/set: File too large; make room" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["OUT", "--size", "15"], "--size must be from 16 to 1024 pixels, not 15"),
        (["OUT", "--size", "1025"], "--size must be from 16 to 1024 pixels, not 1025"),
        (["OUT", "--renders", "0"], "--renders must be at least 1, not 0"),
        (["OUT", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["OUT", "--seed", "-1"], "--seed must be at least 0, not -1"),
        (["FILE/OUT"], "cannot write"),
        (["FILE"], "is no Trifeature set (it has no trifeature.json); choose another folder"),
        (["FOLDER"], "is no Trifeature set (it has no trifeature.json); choose another folder"),
        (["FOLDER", "--force"], "(it has no trifeature.json): --force does not delete it; choose"),
        ([], "the following arguments are required: OUT"),
    ],
)
def test_wrong_use_is_a_sentence(arguments, sentence, tmp_path, monkeypatch, cli):
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER" / "train").mkdir(parents=True)
    (tmp_path / "FOLDER" / "train" / "file").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, errors = cli(main, *arguments)
    assert code == 2 and sentence in errors
    assert contents(tmp_path) == before and sorted(os.listdir()) == ["FILE", "FOLDER"]


def test_a_set_that_is_there_already_is_left_alone(small, cli):
    before = contents(small)
    code, output, errors = cli(main, small, "--size", 32, "--renders", 1, "--seed", 3)
    assert (code, output, errors) == (0, f"{small}: already drawn with these settings\n", "")
    for flags, asked in (
        (["--size", 32], "version 1, size 32, renders 10, seed 0"),
        (["--size", 32, "--renders", 1], "version 1, size 32, renders 1, seed 0"),
    ):
        code, _, errors = cli(main, small, *flags)
        assert code == 2 and errors.count("\n") == 1
        assert (
            f"holds a set drawn with version 1, size 32, renders 1, seed 3; to replace it by one with {asked}"
            in errors
        )
        assert "add --force, or choose another folder" in errors
    assert contents(small) == before


def test_force_replaces_a_set_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    def draw(folder, size, *rest):
        Path(folder, f"{size}.png").write_text("drawn")
        if size == 20:
            raise OSError("the disk is full")

    monkeypatch.setattr(trifeature, "_draw_in_processes", draw)
    out = tmp_path / "set"
    trifeature.generate(out, size=18, progress=False)
    before = contents(out)
    assert set(before) == {"18.png", "trifeature.json"}
    with pytest.raises(UserError, match="size 18.*size 19.*--force"):
        trifeature.generate(out, size=19, progress=False)
    with pytest.raises(UserError, match="the disk is full"):
        trifeature.generate(out, size=20, progress=False, force=True)
    assert contents(out) == before

    def interrupted(source, target, rename=os.replace):  # between the renames of the old folder and the new
        if str(source).endswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", interrupted)
        trifeature.generate(out, size=19, progress=False, force=True)
    assert contents(out) == before

    trifeature.generate(out, size=19, progress=False, force=True)
    assert set(contents(out)) == {"19.png", "trifeature.json"}
    assert list(tmp_path.iterdir()) == [out]


def test_two_that_ensure_at_once_get_one_whole_set(small, tmp_path, monkeypatch):
    outcomes = []

    def generate(*arguments, draw=trifeature.generate, **options):
        try:
            drawn = draw(*arguments, **options)
            outcomes.append("drawn")
        except UserError as error:
            outcomes.append(str(error))
            raise
        return drawn

    monkeypatch.setattr(trifeature, "generate", generate)
    out = tmp_path / "data" / "set"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(lambda _: trifeature.ensure(out, 32, 1, 3, progress=False), range(2)))
    assert sorted(drawn) == [False, True]
    # they did meet at the rename
    assert sorted(outcomes)[1] == "drawn" and "not empty" in sorted(outcomes)[0]
    assert contents(out) == contents(small) and list(out.parent.iterdir()) == [out]

    assert trifeature.ensure(out, 64, 2, progress=False) is False and len(outcomes) == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        trifeature.ensure(tmp_path / "file" / "set", 32, 1, progress=False)


def test_it_draws_from_a_script_without_a_main_guard_that_has_threads(small, tmp_path):
    script = (
        "import sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('once')\n"
        "from moco.trifeature import generate\n"
        "generate(sys.argv[1], 32, 1, 3, workers=2, progress=False)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "set"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "once\n", "")
    assert contents(tmp_path / "set") == contents(small)


def test_pixels_are_those_that_were_always_drawn(small):
    digest = hashlib.sha256()
    for name, data in sorted(contents(small).items()):
        with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:
            digest.update(name.encode() + image.tobytes())
    assert digest.hexdigest() == PIXELS


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
    with pytest.raises(UserError, match="no factor 'colour'; choose one of shape, texture, color"):
        factor_of("triangle_solid_red", "colour")
