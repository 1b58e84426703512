"""Released models by name, from a local server that stands for Google Drive or for a mirror."""

import dataclasses
import multiprocessing
import os
import re

import pytest
import torch
import torchvision
from fake_web import fake_web, file_on_disk, hang, page, redirect, status, whole

from moco import zoo
from moco.errors import UserError
from moco.files import file_hash, sha256
from moco.zoo.__main__ import main

DRIVE_LINK = "https://drive.google.com/file/d/1kNj6YleQu8vrC6ggbFVYvIUhiMHgbkew/view"
QUOTA_PAGE = (
    "<html><head><title>Google Drive - Quota exceeded</title></head><body><p>Sorry, you "
    "can't view or download this file at this time.</p></body></html>"
)


@pytest.fixture(name="checkpoints", scope="session")
def released_checkpoints(tmp_path_factory):
    """A checkpoint of MoCo v2 as zip, one of MoCo v1 in torch's older format, and the model in both."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=128)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    v1 = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}
    torch.save(v1, folder / "v1", _use_new_zipfile_serialization=False)
    fc = {name: state[name] for name in state if ".fc." in name}
    hidden = {name.replace("fc", "fc.2"): tensor for name, tensor in fc.items()}
    v2 = {name: tensor for name, tensor in state.items() if name not in fc} | hidden
    torch.save(v1 | {"state_dict": v2}, folder / "v2")
    model.fc = torch.nn.Identity()
    yield {"v1": folder / "v1", "v2": folder / "v2", "model": model.eval()}
    for name in ("v1", "v2"):
        (folder / name).unlink()


@pytest.fixture(name="cache", autouse=True)
def empty_cache(tmp_path, monkeypatch):
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
        if model.md5:
            assert re.fullmatch(r"https://\S+/(moco_v[12]_\d+ep)/\1_pretrain\.pth\.tar", model.url)
            assert re.fullmatch(r"[0-9a-f]{8}", model.md5) and model.link == model.url
        else:
            file_id = re.search(r"/d/([\w-]{33})/view", model.link)[1]
            host, query = model.url.split("?")
            assert host == "https://drive.usercontent.google.com/download"
            assert query == f"id={file_id}&export=download&confirm=t"
    assert {model.name: model.link for model in zoo.MODELS}["ifm-eps0.1"] == DRIVE_LINK


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_load_gives_the_backbone_that_was_trained(version, checkpoints):
    images = torch.rand(2, 3, 64, 64)
    before = torch.get_rng_state()
    with fake_web(redirect("/elsewhere"), file_on_disk(checkpoints[version])) as web:
        model = zoo.load("ifm-eps0.1", mirror=web.url + "/")
        assert web.requests == ["/ifm-eps0.1.pth.tar", "/elsewhere"]
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    with torch.no_grad():
        features = model(images)
        assert features.shape == (2, 2048) and torch.equal(features, checkpoints["model"](images))
        model.conv1.weight[0, 0, 0, 0] += 1
        assert not torch.equal(model(images), features)
    again = zoo.load(checkpoints[version])  # and by its path; the first model's memory was not the file's
    assert torch.equal(again.conv1.weight, checkpoints["model"].conv1.weight)


def test_the_hash_of_the_first_download_is_kept(checkpoints, cache, monkeypatch):
    path, record = cache / "ifm-eps0.1.pth.tar", cache / "ifm-eps0.1.pth.tar.sha256"
    with fake_web(file_on_disk(checkpoints["v2"])) as web:
        monkeypatch.setenv("ZOO_BASE_URL", web.url)
        assert zoo.fetch("ifm-eps0.1") == path
        assert record.read_text() == f"{sha256(checkpoints['v2'])}  ifm-eps0.1.pth.tar\n"
        assert zoo.resolve("ifm-eps0.1") == path and len(web.requests) == 1  # it is there

        web.answers = [file_on_disk(checkpoints["v1"])]  # whole, but not what was there before
        with pytest.raises(UserError, match=f"that of the first download, in {record}, .* delete {record}"):
            zoo.fetch("ifm-eps0.1", force=True)
        assert len(web.requests) == 2 and sha256(path) == sha256(checkpoints["v2"])

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


def test_drives_address_is_asked_and_a_published_md5_decides(checkpoints, cache, monkeypatch):
    model = next(model for model in zoo.MODELS if model.name == "ifm-eps0.1")
    with fake_web(file_on_disk(checkpoints["v1"])) as web:
        local = dataclasses.replace(
            model, url=model.url.replace("https://drive.usercontent.google.com", web.url), md5="b251726a"
        )
        monkeypatch.setattr(zoo, "MODELS", (local,))
        with pytest.raises(UserError, match=f"md5 starts with [0-9a-f]{{8}}, .*b251726a.*{DRIVE_LINK}"):
            zoo.fetch("ifm-eps0.1")
        assert web.requests == ["/download?id=1kNj6YleQu8vrC6ggbFVYvIUhiMHgbkew&export=download&confirm=t"]
        assert names(cache) == []
        right = dataclasses.replace(local, md5=file_hash(checkpoints["v1"], "md5")[:8])
        monkeypatch.setattr(zoo, "MODELS", (right,))
        zoo.fetch("ifm-eps0.1")
    assert names(cache) == ["ifm-eps0.1.pth.tar", "ifm-eps0.1.pth.tar.sha256"]


class Attack:
    """Unpickling it with everything allowed makes the folder `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_failed_download_is_a_sentence_and_leaves_no_file(checkpoints, cache, tmp_path):
    def saved(content):
        torch.save(content, tmp_path / "saved")
        return whole((tmp_path / "saved").read_bytes())

    v1, v2 = checkpoints["v1"].read_bytes(), checkpoints["v2"].read_bytes()
    flipped = v2[:50_000_000] + bytes([v2[50_000_000] ^ 1]) + v2[50_000_001:]
    small = torchvision.models.resnet18().state_dict()
    cases = [
        (status(404), "404"),
        (status(503), "503"),
        (page(QUOTA_PAGE), 'it is a web page, "Google Drive - Quota exceeded"'),
        (page(QUOTA_PAGE, code=403), "403"),
        (page("\n<!DOCTYPE html><title>Sign\n in</title>"), 'it is a web page, "Sign in"'),
        (page("Sorry, try later"), "refused and removed: the file is damaged or not a checkpoint"),
        (redirect("/"), "redirect error that would lead to an infinite loop"),
        (hang, r"no answer for 0\.5 s"),
        (whole(v2, pace=30), r"no answer for 0\.5 s"),
        (whole(v2, stop_after=0), "damaged|empty"),
        (whole(v2, stop_after=60_000_000), "damaged"),
        (whole(v2[:-1000], length=False), "damaged"),
        (whole(v1[:-1], length=False), "damaged"),  # torch's older format
        (whole(flipped), "damaged .checksum"),
        (saved({"state_dict": Attack(tmp_path / "trace")}), "could run code"),
        (saved(checkpoints["model"].state_dict()), r"no query encoder \(encoder_q"),
        (saved({"state_dict": {f"module.encoder_q.{name}": t for name, t in small.items()}}), "does not fit"),
    ]
    with fake_web(hang) as web:
        for answer, reason in cases:
            web.answers = [answer]
            with pytest.raises(UserError, match=reason) as raised:
                zoo.fetch("ifm-eps0.1", mirror=web.url, timeout=0.5)
            said = str(raised.value)
            assert said.startswith("cannot download ifm-eps0.1 (") and "\n" not in said
            assert f"{DRIVE_LINK} in a browser and put the file into the folder {cache} as" in said
            assert names(cache) == [] and ".tmp" not in said
        assert len(web.requests) >= len(cases) and not (tmp_path / "trace").exists()
        web.answers = [whole(v2)]  # negative control
        zoo.fetch("ifm-eps0.1", mirror=web.url, timeout=5)
    with pytest.raises(UserError, match="refused"):
        zoo.fetch("ifm-eps0.2", mirror=web.url)  # the server is gone
    with pytest.raises(UserError, match="unknown url type"):
        zoo.fetch("ifm-eps0.2", mirror="no address")


def test_a_file_downloaded_by_hand_is_checked_and_used(checkpoints, cache):
    path = cache / "ifm-eps0.2.pth.tar"
    cache.mkdir(parents=True)
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match="web page"):
        zoo.resolve("ifm-eps0.2")
    path.unlink()
    os.link(checkpoints["v2"], path)
    assert zoo.resolve("ifm-eps0.2") == path and path.with_name(path.name + ".sha256").exists()


def test_two_processes_share_one_download(checkpoints, cache):
    context = multiprocessing.get_context("fork")
    with fake_web(whole(checkpoints["v2"].read_bytes(), pace=1)) as web:
        children = [context.Process(target=zoo.resolve, args=("ifm-eps0.1", web.url)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(30)
        assert [child.exitcode for child in children] == [0, 0] and len(web.requests) == 1
    assert names(cache) == ["ifm-eps0.1.pth.tar", "ifm-eps0.1.pth.tar.sha256"]


@pytest.mark.parametrize("wrong", [b"0" * 64 + b"  mocov2-in100.pth.tar\n", b"", b"\xff"])
def test_a_wrong_record_is_named_and_can_be_deleted(wrong, checkpoints, cache):
    record = cache / "mocov2-in100.pth.tar.sha256"
    cache.mkdir(parents=True)
    record.write_bytes(wrong)
    with fake_web(file_on_disk(checkpoints["v2"])) as web:
        with pytest.raises(UserError, match=f"delete {record}"):
            zoo.fetch("mocov2-in100", mirror=web.url)
        assert names(cache) == [record.name]
        record.unlink()
        assert zoo.fetch("mocov2-in100", mirror=web.url).exists()


def test_names_and_paths(tmp_path, monkeypatch):
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
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into .*choose another folder"):
        zoo.fetch("ifm-eps0.1", folder=tmp_path / "file" / "models")


def test_the_command_line(checkpoints, cli, tmp_path):
    code, listing, _ = cli(main, "list")
    assert code == 0 and listing.count("\n") == 9 and max(map(len, listing.splitlines())) <= 80
    assert "ifm-eps0.1      81.4  IFM-MoCo v2, epsilon 0.1, 200 epochs on ImageNet-100\n" in listing
    words = ["download", "ifm-eps0.05", "--to", tmp_path / "models", "--mirror"]
    with fake_web(status(404), file_on_disk(checkpoints["v2"])) as web:
        code, output, errors = cli(main, *words, web.url)
        assert (code, output, errors.count("\n")) == (2, "", 1) and ": error: cannot download" in errors
        code, output, _ = cli(main, *words, web.url)
    assert code == 0 and output == f"{tmp_path}/models/ifm-eps0.05.pth.tar\n"
    assert sha256(output.strip()) == sha256(checkpoints["v2"])
