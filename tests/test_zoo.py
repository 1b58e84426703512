"""Released models by name, from a local server that stands for Google Drive or for a mirror."""

import dataclasses
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from fake_web import fake_web, file_on_disk, google_drive, page, status, whole

from moco import zoo
from moco.errors import UserError, run_program
from moco.files import file_hash, sha256


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of MoCo v2 as zip, one of MoCo v1 in torch's older format, and the model in both."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=128)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    v1 = {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(v1, folder / "v1", _use_new_zipfile_serialization=False)
    fc = {name: state[name] for name in state if ".fc." in name}
    hidden = {name.replace("fc", "fc.2"): tensor for name, tensor in fc.items()}
    v2 = {name: tensor for name, tensor in state.items() if name not in fc} | hidden
    torch.save(v1 | {"state_dict": v2}, folder / "v2")
    model.fc = torch.nn.Identity()
    yield {"v1": folder / "v1", "v2": folder / "v2", "model": model.eval()}
    for name in ("v1", "v2"):
        (folder / name).unlink()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for torch.hub, no mirror, and no proxy before 127.0.0.1."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("ZOO_BASE_URL", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints" / "moco"


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


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
        with pytest.raises(UserError, match="is not that of the first download, recorded in .*sha256"):
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


class Attack:
    """Unpickling it with everything allowed creates the file `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_only_a_moco_resnet50_gets_the_name(checkpoints, cache, tmp_path):
    def written(data):
        path = tmp_path / "x"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        return path

    v2 = checkpoints["v2"].read_bytes()
    flipped = v2[:50_000_000] + bytes([v2[50_000_000] ^ 1]) + v2[50_000_001:]
    other = torchvision.models.resnet18().state_dict()
    pickle.loads(pickle.dumps(Attack(tmp_path / "trace")))
    (tmp_path / "trace").rmdir()  # so the attack works on a careless reader
    for reason, data in {
        "could run code": {"state_dict": Attack(tmp_path / "trace")},
        "checksum of .* is wrong": flipped,
        "damaged": v2[:-100],
        "ends before its tensors": checkpoints["v1"].read_bytes()[:60_000_000],
        "so it is not a checkpoint of MoCo": checkpoints["model"].state_dict(),
        "does not fit": {"state_dict": {f"module.encoder_q.{name}": t for name, t in other.items()}},
    }.items():
        with pytest.raises(UserError, match=reason):
            zoo.check(zoo.MODELS[0], written(data))
    zoo.check(zoo.MODELS[0], written(v2))

    with fake_web(file_on_disk(written({"state_dict": Attack(tmp_path / "trace")}))) as web:
        with pytest.raises(UserError, match="refused and removed .*could run code"):
            zoo.fetch("mocov2-in100", mirror=web.url)
        assert web.requests and names(cache) == [] and not (tmp_path / "trace").exists()


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
    }.items():
        with pytest.raises(UserError, match=re.escape(right)):
            zoo.resolve(wrong)
    with pytest.raises(UserError, match="no released model moco-v2-80ep; did you mean moco-v2-800ep"):
        zoo.fetch("moco-v2-80ep")
    with pytest.raises(UserError, match="starts with http"):
        zoo.fetch("ifm-eps0.1", mirror="ftp://x")


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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_checking_takes_little_memory(zipped, checkpoints, cache, tmp_path):
    large = torch.load(checkpoints["v2"], weights_only=True)
    large["optimizer"]["state"][0] = {"momentum_buffer": torch.ones(35_000_000)}
    torch.save(large, tmp_path / "large", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "large").stat().st_size > 230_000_000
    del large

    def growth(function, results):  # in MB, of a forked process's peak
        def peak():
            return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

        before = peak()
        function(tmp_path / "large")
        results.put(peak() - before)

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    for function in (lambda path: zoo.check(zoo.MODELS[0], path), Path.read_bytes):
        child = context.Process(target=growth, args=(function, results))
        child.start()
        child.join(30)
        assert child.exitcode == 0
    assert results.get() < 50 < 200 < results.get()
    (tmp_path / "large").unlink()


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
