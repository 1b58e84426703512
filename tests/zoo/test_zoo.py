"""Released models by name, from a local server that acts as Google Drive or as a mirror."""

import dataclasses
import multiprocessing
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from fake_web import fake_web, hang, page, redirect, status, whole

from moco import zoo
from moco.errors import UserError
from moco.files import file_hash, sha256
from moco.run.checkpoint import read
from moco.zoo.__main__ import main

NAME, FILE = "ifm-eps0.1", "ifm-eps0.1.pth.tar"
DRIVE_LINK = "https://drive.google.com/file/d/1kNj6YleQu8vrC6ggbFVYvIUhiMHgbkew/view"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The bytes of a checkpoint of MoCo v2 (zip) and of MoCo v1 (torch's older format), and their encoder."""
    path = tmp_path_factory.mktemp("released") / "checkpoint"
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=128)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    v1 = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}
    v2 = v1 | {"state_dict": {name.replace("q.fc", "q.fc.2"): tensor for name, tensor in state.items()}}
    torch.save(v1, path, _use_new_zipfile_serialization=False)
    found = {"v1": path.read_bytes()}
    torch.save(v2, path)
    found["v2"] = path.read_bytes()
    model.fc = torch.nn.Identity()
    return found | {"model": model.eval()}


@pytest.fixture
def web(monkeypatch):
    """A server that is the mirror, with answers to be set; no proxy before it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with fake_web(hang) as server:
        monkeypatch.setenv("ZOO_BASE_URL", server.url + "/")
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
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
            assert re.search(r"/d/([\w-]{33})/view", model.link)[1] in model.url
    assert {model.name: model.link for model in zoo.MODELS}[NAME] == DRIVE_LINK


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_load_gives_the_backbone_that_was_trained(version, released, web):
    web.answers = [redirect("/elsewhere"), whole(released[version])]
    before = torch.get_rng_state()
    model = zoo.load(NAME)
    assert web.requests == [f"/{FILE}", "/elsewhere"]
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = model(images)
        assert features.shape == (2, 2048) and torch.equal(features, released["model"](images))
        model.conv1.weight[0, 0, 0, 0] += 1
        assert not torch.equal(model(images), features)


def test_load_takes_a_file_of_another_program_and_says_what_fits(released, tmp_path):
    state = {f"backbone.{name}": tensor for name, tensor in released["model"].state_dict().items()}
    torch.save({"model": state}, tmp_path / "others.pth")
    loaded = zoo.load(tmp_path / "others.pth").state_dict()
    assert all(torch.equal(loaded[name.removeprefix("backbone.")], tensor) for name, tensor in state.items())
    torch.save({"model": torchvision.models.resnet18().state_dict()}, tmp_path / "others.pth")
    with pytest.raises(UserError, match="does not fit resnet50: .*; moco.zoo reads ResNet-50s"):
        zoo.load(tmp_path / "others.pth")


def test_the_hash_of_the_first_download_is_kept(released, cache, web):
    path, record = cache / FILE, cache / f"{FILE}.sha256"
    web.answers = [whole(released["v2"])]
    assert zoo.fetch(NAME) == path
    assert record.read_text() == f"{sha256(path)}  {FILE}\n"
    assert zoo.resolve(NAME) == path and len(web.requests) == 1  # it is there

    web.answers = [whole(released["v1"])]  # a checkpoint, but not the one that was there before
    with pytest.raises(UserError, match=f"that of the first download, in {record}; .* delete it"):
        zoo.fetch(NAME, force=True)
    assert len(web.requests) == 2 and path.read_bytes() == released["v2"]

    path.write_bytes(flipped(released["v2"]))
    with pytest.raises(UserError, match=f"damaged .*python -m moco.zoo download {NAME} --force"):
        zoo.resolve(NAME)
    web.answers = [whole(released["v2"])]
    zoo.fetch(NAME, force=True)
    assert zoo.resolve(NAME).read_bytes() == released["v2"]
    assert names(cache) == [path.name, record.name]

    record.write_text("")
    with pytest.raises(UserError, match="delete it"):
        zoo.resolve(NAME)


def flipped(data):
    return data[:50_000_000] + bytes([data[50_000_000] ^ 1]) + data[50_000_001:]


def test_drives_address_is_asked_and_a_published_md5_decides(released, cache, web, monkeypatch):
    monkeypatch.delenv("ZOO_BASE_URL")
    web.answers = [whole(released["v1"])]
    model = next(model for model in zoo.MODELS if model.name == NAME)
    url = model.url.replace("https://drive.usercontent.google.com", web.url)
    monkeypatch.setattr(zoo, "MODELS", (dataclasses.replace(model, url=url, md5="b251726a"),))
    with pytest.raises(UserError, match=f"md5 starts with [0-9a-f]{{8}}, .*b251726a.*{DRIVE_LINK}"):
        zoo.fetch(NAME)
    assert web.requests == ["/download?id=1kNj6YleQu8vrC6ggbFVYvIUhiMHgbkew&export=download&confirm=t"]
    assert names(cache) == []
    cache.with_name("v1").write_bytes(released["v1"])
    md5 = file_hash(cache.with_name("v1"), "md5")[:8]
    monkeypatch.setattr(zoo, "MODELS", (dataclasses.replace(model, url=url, md5=md5),))
    zoo.fetch(NAME)
    assert names(cache) == [FILE, f"{FILE}.sha256"]


class Attack:
    """Unpickling it with everything allowed makes the folder `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_failed_download_is_a_sentence_and_leaves_no_file(released, cache, web, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "TIMEOUT", 0.5)

    def saved(content):
        torch.save(content, tmp_path / "saved")
        return whole((tmp_path / "saved").read_bytes())

    v1, v2, small = released["v1"], released["v2"], torchvision.models.resnet18().state_dict()
    quota = "<html><head><title>Google Drive - Quota exceeded</title></head></html>"
    for answer, reason in [
        (status(404), "404"),
        (page(quota), "the file is a web page"),
        (page(quota, code=403), "403"),
        (redirect("/"), "redirect error that would lead to an infinite loop"),
        (hang, "timed out"),
        (whole(v2, pace=30), "timed out"),
        (whole(v2, stop_after=60_000_000), "damaged"),
        (whole(v2[:-1000], length=False), "damaged"),
        (whole(v1[:-1], length=False), "damaged"),  # torch's older format
        (whole(flipped(v2)), "damaged .checksum"),
        (saved({"state_dict": Attack(tmp_path / "trace")}), "could run code"),
        (saved(released["model"].state_dict()), r"no query encoder \(encoder_q"),
        (saved({"state_dict": {f"module.encoder_q.{name}": t for name, t in small.items()}}), "does not fit"),
    ]:
        web.answers = [answer]
        with pytest.raises(UserError, match=reason) as raised:
            zoo.fetch(NAME)
        said = str(raised.value)
        assert said.startswith(f"cannot download {NAME} (") and "\n" not in said
        assert f"{DRIVE_LINK} in a browser and put the file into the folder {cache} as {FILE}" in said
        assert names(cache) == [] and ".tmp" not in said
    assert not (tmp_path / "trace").exists()
    monkeypatch.setattr(zoo, "TIMEOUT", 5)
    web.answers = [whole(v2)]  # negative control
    zoo.fetch(NAME)
    for url, reason in ((web.url.replace(str(web.server_port), "1"), "refused"), ("x", "unknown url type")):
        monkeypatch.setenv("ZOO_BASE_URL", url)
        with pytest.raises(UserError, match=reason):
            zoo.fetch("ifm-eps0.2")


def test_a_file_downloaded_by_hand_is_checked_and_used(released, cache):
    path = cache / FILE
    cache.mkdir(parents=True)
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match="web page"):
        zoo.resolve(NAME)
    path.write_bytes(released["v2"])
    assert zoo.resolve(NAME) == path and names(cache) == [FILE, f"{FILE}.sha256"]


def test_two_processes_share_one_download(released, cache, web):
    web.answers = [whole(released["v2"], pace=1)]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=zoo.resolve, args=(NAME,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0] and len(web.requests) == 1
    assert names(cache) == [FILE, f"{FILE}.sha256"]


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint_0199.pth.tar").touch()
    (tmp_path / "moco-v2-800ep").touch()
    assert zoo.resolve(tmp_path / "checkpoint_0199.pth.tar") == tmp_path / "checkpoint_0199.pth.tar"
    assert str(zoo.resolve("moco-v2-800ep")) == "moco-v2-800ep"  # a file of that name wins
    for wrong, right in {
        "ifm-esp0.1": "did you mean ifm-eps0.1?",
        str(tmp_path / "chekpoint_0199.pth.tar"): f"did you mean {tmp_path}/checkpoint_0199.pth.tar?",
        "qqqq": "`python -m moco.zoo list` shows the names",
        "nowhere/x.pth": "there is no file nowhere/x.pth",
        str(tmp_path): "is a folder",
        "x" * 400: "there is no file xxx",
    }.items():
        with pytest.raises(UserError, match=re.escape(right)):
            zoo.resolve(wrong)
    with pytest.raises(UserError, match="cannot write into .*choose another folder"):
        zoo.fetch(NAME, folder=tmp_path / "moco-v2-800ep" / "models")


def test_the_command_line(released, cli, tmp_path, web):
    code, listing, _ = cli(main, "list")
    assert code == 0 and listing.count("\n") == 9 and max(map(len, listing.splitlines())) <= 80
    assert "ifm-eps0.1      81.4  IFM-MoCo v2, epsilon 0.1, 200 epochs on ImageNet-100\n" in listing
    web.answers = [status(404), whole(released["v2"])]
    code, output, errors = cli(main, "download", NAME, "--to", tmp_path / "models")
    assert (code, output, errors.count("\n")) == (2, "", 1) and ": error: cannot download" in errors
    code, output, _ = cli(main, "download", NAME, "--to", tmp_path / "models")
    assert code == 0 and output == f"{tmp_path}/models/{FILE}\n"
    assert (tmp_path / "models" / FILE).read_bytes() == released["v2"]


def test_torchvisions_own_weights_are_downloaded_once_where_torch_hub_puts_them(
    web, cache, tmp_path, monkeypatch
):
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "weights")
    file = f"shufflenet-{sha256(tmp_path / 'weights')[:8]}.pth"
    default = types.SimpleNamespace(url=f"https://download.pytorch.org/models/{file}")
    known = {"shufflenet_v2_x0_5": types.SimpleNamespace(DEFAULT=default)}
    monkeypatch.setattr(torchvision.models, "get_model_weights", known.__getitem__)
    web.answers = [page("<html>busy</html>"), whole((tmp_path / "weights").read_bytes())]
    with pytest.raises(UserError, match=f"SHA-256 does not start with .* {default.url} .* as {file}"):
        zoo.resolve("torchvision", "shufflenet_v2_x0_5")
    path = zoo.resolve("torchvision", "shufflenet_v2_x0_5")
    assert path == cache.parent / file and sha256(path) == sha256(tmp_path / "weights")
    assert zoo.resolve("torchvision", "timm:shufflenet_v2_x0_5") == path  # the same network in timm
    assert web.requests == [f"/{file}"] * 2


def test_timms_own_weights_are_fitted_to_the_size_of_the_images(cache, tmp_path, monkeypatch):
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    hub = pytest.importorskip("timm.models._hub")
    network = timm.create_model("test_vit")
    safetensors.save_file(network.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def downloaded(repo_id, **_):
        asked.append(repo_id)
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", downloaded)
    before = torch.get_rng_state()
    paths = [zoo.resolve("timm", "timm:test_vit", size) for size in (160, 160, 64)]
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == ["timm/test_vit.r160_in1k"] * 2 and paths[0] == paths[1]
    assert names(cache) == ["timm-test_vit.r160_in1k-160.pth", "timm-test_vit.r160_in1k-64.pth"]
    found, small = read(paths[0])["state_dict"], read(paths[2])["state_dict"]
    assert network.state_dict().keys() - found.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in found.items())
    assert found["pos_embed"].shape[1] == 1 + 10**2 and small["pos_embed"].shape[1] == 1 + 4**2

    def fails(**_):
        raise ConnectionError("the hub is away. Try again")

    monkeypatch.setattr(hub, "hf_hub_download", fails)
    with pytest.raises(
        UserError, match=r"\(the hub is away\); .* https://huggingface.co/timm/test_vit.r160_in1k"
    ):
        zoo.resolve("timm", "timm:test_vit", 96)
    for arch, said in (
        ("test_mambaout", "no weights of test_mambaout"),
        ("test_vi", "did you mean timm:test_vit"),
    ):
        with pytest.raises(UserError, match=said):
            zoo.resolve("timm", arch)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(UserError, match="--pretrained timm needs .* not installed: pip install timm"):
        zoo.resolve("timm", "test_vit")


def test_a_file_with_the_name_of_a_library_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file timm, and no released model"):
        zoo.resolve("timm")  # without a network it is no name
    (tmp_path / "timm").touch()
    assert zoo.resolve("timm", "resnet18") == Path("timm")
