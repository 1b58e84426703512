"""Released models by name, from a local server that stands for Google Drive or for a mirror."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from fake_web import fake_web, file_on_disk, google_drive, page, status, whole
from zoo_files import empty_cache, names, released_checkpoints  # noqa: F401 (fixtures)

from moco import zoo
from moco.errors import UserError, run_program
from moco.files import file_hash, sha256


def test_the_table():
    assert len({model.name for model in zoo.MODELS}) == len({model.link for model in zoo.MODELS}) == 7
    for model in zoo.MODELS:
        if model.drive_id:
            assert re.fullmatch(r"[\w-]{33}", model.drive_id) and not model.url and not model.md5
        else:
            assert re.fullmatch(r"https://\S+/(moco_v[12]_\d+ep)/\1_pretrain\.pth\.tar", model.url)
            assert re.fullmatch(r"[0-9a-f]{8}", model.md5)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_load_gives_the_backbone_that_was_trained(version, checkpoints, cache):
    images = torch.rand(2, 3, 64, 64)
    before = torch.get_rng_state()
    with fake_web(file_on_disk(checkpoints[version])) as web:
        model = zoo.load("ifm-eps0.1", mirror=web.url + "/")
        assert web.requests[0][0] == "/ifm-eps0.1.pth.tar"
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    with torch.no_grad():
        features = model(images)
        assert features.shape == (2, 2048) and torch.equal(features, checkpoints["model"](images))
        model.conv1.weight[0, 0, 0, 0] += 1
        assert not torch.equal(model(images), features)
    again = zoo.load(checkpoints[version])  # and by its path; the first model's memory was not the file's
    assert torch.equal(again.conv1.weight, checkpoints["model"].conv1.weight)


def test_google_drive_and_the_hash_of_the_first_download(checkpoints, cache, monkeypatch):
    path, record = cache / "ifm-eps0.1.pth.tar", cache / "ifm-eps0.1.pth.tar.sha256"
    with fake_web(google_drive(file_on_disk(checkpoints["v2"]))) as web:
        assert zoo.fetch("ifm-eps0.1", drive_host=web.url) == path
        assert (
            web.requests[0][0] == "/download?id=1kNj6YleQu8vrC6ggbFVYvIUhiMHgbkew&export=download&confirm=t"
        )
        assert record.read_text() == f"{sha256(checkpoints['v2'])}  ifm-eps0.1.pth.tar\n"

        asked = len(web.requests)
        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        assert zoo.resolve("ifm-eps0.1") == path and len(web.requests) == asked  # from the cache

        web.answers = [file_on_disk(checkpoints["v1"])]  # sound, but not what was there before
        with pytest.raises(
            UserError,
            match="that of the first download, as recorded in .*sha256, with .* delete .*sha256 and run",
        ):
            zoo.fetch("ifm-eps0.1", force=True)
        assert len(web.requests) > asked and sha256(path) == sha256(checkpoints["v2"])

        with open(path, "r+b") as file:  # one bit of a file that was whole
            file.seek(50_000_000)
            byte = file.read(1)[0]
            file.seek(50_000_000)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(UserError, match="damaged .*python -m moco.zoo download ifm-eps0.1 --force"):
            zoo.resolve("ifm-eps0.1")
        web.answers = [file_on_disk(checkpoints["v2"])]
        zoo.fetch("ifm-eps0.1", force=True)
        assert sha256(zoo.resolve("ifm-eps0.1")) == sha256(checkpoints["v2"])
    assert names(cache) == [path.name, record.name]


def test_the_published_md5_decides(checkpoints, cache, monkeypatch):
    model = zoo._find("moco-v1-200ep")
    with fake_web(file_on_disk(checkpoints["v1"])) as web:
        with pytest.raises(UserError, match=f"md5 starts with [0-9a-f]{{8}}, .*b251726a.*{model.link}"):
            zoo.fetch(model.name, mirror=web.url)
        assert names(cache) == []
        published = dataclasses.replace(model, md5=file_hash(checkpoints["v1"], "md5")[:8])
        monkeypatch.setattr(zoo, "MODELS", (published,))
        zoo.fetch(model.name, mirror=web.url)
    assert names(cache) == ["moco-v1-200ep.pth.tar", "moco-v1-200ep.pth.tar.sha256"]


def test_a_file_fetched_by_hand_is_checked_and_used(checkpoints, cache):
    path = cache / "ifm-eps0.2.pth.tar"
    with fake_web(page("<title>Sign in</title>")) as web, pytest.raises(UserError) as raised:
        zoo.fetch("ifm-eps0.2", drive_host=web.url)
    link = "https://drive.google.com/file/d/1A4k6fC5jcoBLHGyJjd5ggBVPW9TtODtp/view"
    assert f"fetch {link} by hand and put the file into the folder {cache} as {path.name}" in str(
        raised.value
    )
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match="web page"):
        zoo.resolve("ifm-eps0.2")
    path.unlink()
    os.link(checkpoints["v2"], path)
    assert zoo.resolve("ifm-eps0.2") == path and path.with_name(path.name + ".sha256").exists()


def test_names_and_paths(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint_0199.pth.tar").touch()
    (tmp_path / "moco-v2-800ep").touch()
    assert zoo.resolve(tmp_path / "checkpoint_0199.pth.tar") == tmp_path / "checkpoint_0199.pth.tar"
    assert str(zoo.resolve("moco-v2-800ep")) == "moco-v2-800ep"  # a file of that name wins
    for wrong, right in {
        "ifm-esp0.1": "did you mean ifm-eps0.1?",
        "checkpoint_199.pth.tar": "did you mean checkpoint_0199.pth.tar?",
        str(tmp_path / "chekpoint_0199.pth.tar"): f"did you mean {tmp_path}/checkpoint_0199.pth.tar?",
        "qqqq": "`python -m moco.zoo list` shows the names",
        "nowhere/x.pth": "there is no file nowhere/x.pth",
        str(tmp_path): "is a folder",
        "x" * 400: "there is no file xxx",
        f"{'x' * 400}/y.pth": "there is no file xxx",
    }.items():
        with pytest.raises(UserError, match=re.escape(right)):
            zoo.resolve(wrong)
    with pytest.raises(UserError, match="no released model moco-v2-80ep; did you mean moco-v2-800ep"):
        zoo.fetch("moco-v2-80ep")
    for mirror, reason in {
        "ftp://x": "starts with http",
        "http://[bad": "Invalid IPv6 URL",
        "http://127.0.0.1:9/é": "letters other than ASCII",
        "http:///": "names no host",
        "http://127.0.0.1:x": "Port could not",
    }.items():
        with pytest.raises(UserError, match=f"the mirror .* is not a usable address: .*{reason}"):
            zoo.fetch("ifm-eps0.1", mirror=mirror)


def command_line(*arguments, **options):
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_listing_needs_no_torch():
    code = "import sys, moco.zoo; moco.zoo.main(['list']); sys.exit('torch' in sys.modules)"
    process = command_line("-c", code)
    listing, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "ifm-eps0.1      81.4  IFM-MoCo v2, epsilon 0.1, 200 epochs on ImageNet-100\n" in listing
    assert listing.count("\n") == 9 and max(map(len, listing.splitlines())) <= 80


def test_the_command_interrupted_and_given_again(checkpoints, cache, tmp_path, monkeypatch, capsys):
    data, folder = checkpoints["v2"].read_bytes(), tmp_path / "models"
    arguments = ["-m", "moco.zoo", "download", "ifm-eps0.05", "--to", str(folder)]
    with fake_web(whole(data, '"1"', pace=60), whole(data, '"1"')) as web:
        environment = os.environ | {"ZOO_BASE_URL": web.url, "OMP_NUM_THREADS": "1"}
        process = command_line(*arguments, env=environment)
        part = folder / "ifm-eps0.05.pth.tar.part"
        end = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > 50_000_000):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
        assert names(folder) == ["ifm-eps0.05.pth.tar.part", "ifm-eps0.05.pth.tar.part.json"]

        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        zoo.main(arguments[2:])
        assert int(web.requests[1][1]["Range"][6:-1]) > 50_000_000
    output = capsys.readouterr().out
    assert output == f"{folder}/ifm-eps0.05.pth.tar\n" and names(folder) == ["ifm-eps0.05.pth.tar"]
    assert sha256(output.strip()) == sha256(checkpoints["v2"])
    assert names(cache) == ["ifm-eps0.05.pth.tar.sha256"]


def test_an_error_of_the_command_is_one_sentence(cache, monkeypatch, capsys):
    with fake_web(status(404)) as web, pytest.raises(SystemExit) as ended:
        run_program(lambda: zoo.main(["download", "ifm-eps0.1", "--mirror", web.url]))
    output, errors = capsys.readouterr()
    assert ended.value.code == 2 and output == "" and errors.count("\n") == 1
    assert ": error: cannot download ifm-eps0.1.pth.tar: 127.0.0.1 answers 404 Not Found; " in errors
