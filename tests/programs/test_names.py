"""Names that are not UTF-8, hold line breaks or what a terminal obeys: escaped where they are shown, and no
state is lost for what cannot be printed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import linear_runs
import pytest
import torch
from command_lines import TINY
from forked_program import forked
from sheets import draw_sheet, refused, texts
from started_runs import Forked, at_step, run, send

from moco import check, errors, imagenet100, plot
from moco.trifeature import __main__ as trifeature
from moco.zoo import __main__ as zoo

BYTES = os.fsdecode(b"caf\xe9")  # from a zip file that was made on Windows
LINES, RED, ARABIC = "two\nlines", "\x1b[31mred", "\u202eright to left"
ESCAPED = [r"caf\udce9", r"two\nlines", r"\x1b[31mred", r"\u202eright to left"]
ODD = [BYTES, LINES, RED, ARABIC]


@pytest.fixture
def odd(folders, tmp_path):
    """A data set in a folder with an odd name, of three odd classes with a bad image of an odd name each."""
    root = tmp_path / ARABIC
    shutil.copytree(folders, root)
    for split in ("train", "val"):
        for plain, name in zip(("ant", "bee", "cat"), ODD, strict=False):
            (root / split / plain).rename(root / split / name)
    for name in ODD[:3]:
        (root / "train" / name / f"{name}.jpg").write_bytes(b"no image")
    return root


def clean(text):
    """Whether every line of a text can be printed anywhere."""
    return all(line.replace("\t", "").isprintable() for line in text.split("\n"))


def strict_json(text):
    """What a text of JSON holds, which any reader must take: also those that refuse half a pair of UTF-16."""
    found = json.loads(text)
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


@pytest.mark.parametrize("escaped", [True, False])
def test_pretraining(odd, tmp_path, escaped):
    def prepare():
        if not escaped:  # negative control
            errors.printable, errors.escape_output = str, lambda: None

    out = tmp_path / BYTES
    words = [*TINY, "--epochs", "1", "-j", "1", "--on-bad-image", "skip", "--knn", "1", "--output-dir", out]
    with Forked(*words, odd, prepare=prepare) as program:
        with open(program.stdout.fileno(), "rb", closefd=False) as output:
            said = output.read().decode("utf-8", "surrogateescape")
        code = program.end()
    assert (code == 0 and clean(said)) == escaped, said
    if not escaped:
        return
    assert all(f"{name}/{name}.jpg cannot be read" in said for name in ESCAPED[:3])
    assert rf"{tmp_path}/\u202eright to left/train: 27 images" in said
    start = strict_json((out / "log.jsonl").read_text(encoding="ascii").splitlines()[0])
    assert start["command"][-1] == rf"{tmp_path}/\u202eright to left"
    again = run(*words, odd, "--epochs", "2", "--resume", "auto")
    assert rf"--resume auto: {tmp_path}/caf\udce9/checkpoint_0000.pth.tar" in again and clean(again)


def test_linear_evaluation(odd, tmp_path, run_ranks):
    out = tmp_path / LINES
    words = ["--epochs", "1", "--schedule", "1", "--lr", "1", "2"]
    [code], said = linear_runs.run(run_ranks, 1, odd, out, *words, "--on-bad-image", "skip")
    assert code == 0 and clean(said), said
    assert said.split("\n")[-2].startswith("best Acc@1")
    report = strict_json((out / "linear.json").read_text(encoding="ascii"))
    assert report["classes"] == sorted(ESCAPED[:3], key=lambda name: ODD[ESCAPED.index(name)])
    assert linear_runs.load(out)["classes"] == sorted(ODD[:3])  # by which folders are found

    (odd / "val" / BYTES).rename(odd / "val" / f"other {BYTES}")
    words = ["--evaluate", "--resume", out / "model_best.pth.tar"]
    [sentence], _ = linear_runs.run(run_ranks, 1, odd, tmp_path / "unused", *words)
    assert r"class other caf\udce9 is in " in sentence and r"two\nlines/model_best.pth.tar" in sentence
    assert clean(sentence) and "\n" not in sentence


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize("escaped", [True, False])
def test_check_under_a_strict_locale(odd, encoding, escaped):
    def main():
        sys.argv = ["check", str(odd), "-j", "0"]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding, errors="strict")
        if not escaped:  # negative control
            errors.escape_output, check.printable = lambda: None, str
        errors.run_program(check.main)

    (odd / "train" / BYTES / "übung 日本.jpg").write_bytes(b"no image")
    pid, output = forked(main, (1, 2))
    with open(output.fileno(), "rb", closefd=False) as bytes_of_output:
        said = bytes_of_output.read().decode(encoding)
    output.close()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    bad = [line for line in said.split("\n") if line.startswith("bad: ")]
    assert (code == 1 and len(bad) == 4 and clean(said) and "Traceback" not in said) == escaped, said
    if escaped:
        assert all(any(f"/{name}.jpg: " in line for line in bad) for name in ESCAPED[:3])
        shown = "übung 日本".encode(encoding, "backslashreplace").decode(encoding)
        assert any(f"/{shown}.jpg: " in line for line in bad)


@pytest.mark.parametrize("name", ODD)
def test_errors_are_a_sentence_with_the_whole_path(tmp_path, cli, name):
    escaped, missing = ESCAPED[ODD.index(name)], tmp_path / name / "missing"
    whole = re.escape(f"{tmp_path}/{escaped}/missing")
    refused(cli(check.main, missing), whole)
    refused(cli(plot.main, missing, "-o", tmp_path / "plot.png"), whole)
    refused(cli(imagenet100.main, missing, tmp_path / "made"), whole)
    refused(cli(zoo.main, "download", name), re.escape(f"model {escaped};"))
    missing.parent.mkdir()
    missing.write_text("a file")
    refused(cli(trifeature.main, missing), f"{whole} exists")


@pytest.mark.parametrize("name", ODD)
def test_a_wrong_command_line_is_shown_escaped(capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["check", "a", name])
    with pytest.raises(SystemExit):
        errors.run_program(check.main)
    said = capsys.readouterr().err
    assert said.split("\n")[-2].endswith(f"error: unrecognized arguments: {ESCAPED[ODD.index(name)]}")
    assert clean(said)


def test_a_sheet(odd, cli, monkeypatch):
    for path in odd.glob("*/*/*"):
        if path.read_bytes() == b"no image":
            path.unlink()
    figure = draw_sheet(cli, monkeypatch, "pairs", odd, "--count", "24", "--image-size", "16")
    shown = [text for axis in figure.axes for text in texts(axis)]
    assert {text for text in shown if text in ESCAPED} == set(ESCAPED[:3])
    title = figure.texts[0].get_text()
    assert len(title.split("\n")) == 2 and r"\u202eright to left: the first pairs" in title and clean(title)


def test_commands_to_copy_name_the_file_for_the_shell(tmp_path):
    for name in [*ODD, "plain", "a b", "it's", "'\n\\\"$(x)", "日本", "日本\n", BYTES + "9a"]:
        path = tmp_path / name
        path.write_text("found")
        word = errors.shell_word(path)
        assert clean(word) and "\n" not in word
        found = subprocess.run(["bash", "-c", f"cat {word}"], capture_output=True, text=True)
        assert found.stdout == "found", word
    assert errors.shell_word("plain") == "plain"


@pytest.mark.parametrize(("goes_on", "stop"), [(True, False), (True, True), (False, True)])
def test_a_run_whose_reader_has_ended_loses_nothing(folders, tmp_path, goes_on, stop):
    closed = tmp_path / "closed"

    def prepare():
        def wait_and_stop():
            while not closed.exists():
                time.sleep(0.02)
            if stop:
                send(signal.SIGINT)()

        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does at its start
        at_step(2, wait_and_stop)
        if not goes_on:  # negative control
            errors._silence = lambda stream: sys.exit(9)

    out = tmp_path / "out"
    with Forked(*TINY, "-p", "1", "--output-dir", out, folders, prepare=prepare) as program:
        program.wait_for("Epoch: [0][0/3]")
        program.stdout.close()
        closed.touch()
        code = os.waitstatus_to_exitcode(os.waitpid(program.pid, 0)[1])
    saved = sorted(path.name for path in out.glob("checkpoint_*"))
    if not goes_on:
        assert code == 9 and not saved
        return
    assert code == (75 if stop else 0)
    assert saved == (
        ["checkpoint_0000_000002.pth.tar"] if stop else ["checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar"]
    )
    steps = [json.loads(line)["kind"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps.count("step") == (2 if stop else 6)
    assert torch.load(out / saved[-1], weights_only=True)["epoch"] == (0 if stop else 2)


@pytest.mark.parametrize(("name", "starts"), [(BYTES, False), (LINES, True)])
def test_tensorboard_is_refused_only_the_names_that_it_cannot_write(folders, tmp_path, name, starts):
    words = [*TINY, "--epochs", "1", "--tensorboard", "--output-dir", tmp_path / name, folders]
    said = run(*words, code=0 if starts else 2)
    assert ("Epoch: [0]" in said) == starts and clean(said)
    assert (r"TensorBoard cannot write below" in said) != starts
