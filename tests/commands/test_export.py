"""Exports, loaded in the libraries that they are for: their features are the query encoder's. What cannot be
exported is a sentence, and the files that were there stay as they were."""

import os
import pickle
import pickletools
import resource
import sys

import numpy
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from export_models import D2ResNet, write_checkpoint
from torch import nn

from moco.errors import UserError
from moco.export import SUFFIXES, detectron2_name, export, main


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    path = tmp_path_factory.mktemp("v2") / "checkpoint_0199.pth.tar"
    return path, write_checkpoint(path, "resnet18")


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    path = tmp_path_factory.mktemp("v1") / "checkpoint_0199.pth.tar"
    return path, write_checkpoint(path, "resnet50", mlp=False)


def headless(arch):
    model = torchvision.models.get_model(arch, weights=None)
    model.fc = nn.Identity()
    return model


def load_in_library(to, arch, out):
    """The model of the real library with the exported file loaded strictly."""
    if to == "torchvision":
        model = headless(arch)
        model.load_state_dict(torch.load(out, weights_only=True), strict=True)
    elif to == "timm":
        model = timm.create_model(arch, num_classes=0, checkpoint_path=str(out))
    elif to == "safetensors":
        model = headless(arch)
        model.load_state_dict(safetensors.torch.load_file(out), strict=True)
    else:
        with open(out, "rb") as file:
            content = pickle.load(file, encoding="latin1")  # as Detectron2's checkpointer
        assert content["matching_heuristics"] is True and content["__author__"] == "MOCO"
        model = D2ResNet([2, 2, 2, 2], 1) if arch == "resnet18" else D2ResNet([3, 4, 6, 3], 4)
        tensors = {name: torch.from_numpy(array) for name, array in content["model"].items()}
        model.load_state_dict(tensors, strict=True)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("arch", "to"), [*(("resnet18", to) for to in SUFFIXES), ("resnet50", "timm"), ("resnet50", "detectron2")]
)
def test_the_library_computes_the_same_features(tmp_path, request, arch, to):
    checkpoint, own = request.getfixturevalue(arch)
    out = tmp_path / f"backbone{SUFFIXES[to][0]}"
    assert export(checkpoint, out, to) == (arch, len(own.state_dict()))
    loaded = load_in_library(to, arch, out)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(images), own(images), rtol=1e-6, atol=1e-6)
    loaded.get_parameter(next(name for name, _ in loaded.named_parameters())).mul_(1.01)
    assert (loaded(images) - own(images)).abs().max() > 1e-4
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("arch", ["resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_timm_and_torchvision_name_the_other_resnets_alike(arch):
    with torch.device("meta"):
        ours, timms = headless(arch).state_dict(), timm.create_model(arch, num_classes=0).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in timms.items()}


def published_converter(state_dict):
    """The names that MoCo's detection/convert-pretrain-to-detectron2.py gives, rule by rule."""
    names = []
    for key in state_dict:
        if not key.startswith("module.encoder_q."):
            continue
        key = key[len("module.encoder_q.") :]
        if "layer" not in key:
            key = "stem." + key
        for old, new in [(f"layer{t}", f"res{t + 1}") for t in (1, 2, 3, 4)]:
            key = key.replace(old, new)
        for old, new in [(f"bn{t}", f"conv{t}.norm") for t in (1, 2, 3)]:
            key = key.replace(old, new)
        names.append(key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm"))
    return names


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet152"])
def test_names_for_detectron2_are_the_published_converters(arch):
    with torch.device("meta"):
        names = list(torchvision.models.get_model(arch, weights=None).state_dict())
    theirs = published_converter([f"module.encoder_q.{name}" for name in names])
    pairs = [(name, other) for name, other in zip(names, theirs, strict=True) if not name.startswith("fc.")]
    assert [detectron2_name(name) for name, _ in pairs] == [other for _, other in pairs]
    assert len({other for _, other in pairs} - set(names)) == len(pairs)


def test_the_pickle_for_detectron2_names_no_private_module_of_numpy(resnet18, tmp_path):
    export(resnet18[0], tmp_path / "backbone.pkl", "detectron2")
    data = (tmp_path / "backbone.pkl").read_bytes()
    words = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert {"numpy", "ndarray"} <= words and not {word for word in words if "numpy." in word}
    plain = pickle.dumps(numpy.zeros(2), protocol=4)
    assert any("numpy." in str(argument) for _, argument, _ in pickletools.genops(plain))
    arrays = pickle.loads(data)["model"].values()
    assert all(array.flags.writeable for array in arrays)


def test_bfloat16_becomes_float32_for_detectron2_alone(resnet18, tmp_path):
    content = torch.load(resnet18[0], weights_only=True)
    state = content["state_dict"]
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    torch.save({**content, "state_dict": half}, tmp_path / "half")
    weight = half["module.encoder_q.conv1.weight"]
    assert not torch.equal(weight.float(), state["module.encoder_q.conv1.weight"])
    export(tmp_path / "half", tmp_path / "out.pkl", "detectron2")
    arrays = pickle.loads((tmp_path / "out.pkl").read_bytes())["model"]
    assert arrays["stem.conv1.weight"].dtype == numpy.float32
    assert torch.equal(torch.from_numpy(arrays["stem.conv1.weight"]), weight.float())
    assert arrays["stem.conv1.norm.num_batches_tracked"].dtype == numpy.int64
    export(tmp_path / "half", tmp_path / "out.pth", "timm")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["conv1.weight"]
    assert written.dtype == torch.bfloat16 and torch.equal(written, weight)


def test_safetensors_say_where_they_come_from(resnet18, tmp_path):
    export(resnet18[0], tmp_path / "backbone.safetensors", "safetensors")
    with safetensors.safe_open(tmp_path / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    source = "checkpoint_0199.pth.tar"
    assert metadata == {"format": "pt", "arch": "resnet18", "epoch": "200", "source": source}


def test_views_and_other_layouts_of_memory_are_written_plainly(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    own = write_checkpoint(path, "resnet18")
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for name, tensor in content["state_dict"].items()
    }
    name = "module.encoder_q.bn1.weight"
    content["state_dict"][name] = torch.cat([content["state_dict"][name], torch.zeros(10**7)])[:64]
    torch.save(content, path)
    for to, suffixes in SUFFIXES.items():
        out = tmp_path / f"{to}{suffixes[0]}"
        export(path, out, to)
        assert out.stat().st_size < 50e6 < path.stat().st_size
        loaded = load_in_library(to, "resnet18", out)
        assert torch.equal(loaded(torch.ones(1, 3, 32, 32)), own(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("to", ["torchvision", "timm", "safetensors"])
def test_the_command_line_says_how_to_load_what_it_wrote(resnet18, tmp_path, cli, to):
    path, own = resnet18
    out = tmp_path / f"backbone{SUFFIXES[to][0]}"
    _, output, _ = cli(main, path, out, "--to", to)
    first, *code = output.splitlines()
    assert first == f"{out}: the 120 tensors of a resnet18 backbone; load it in {to} with"
    names = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors}
    exec("\n".join(code), names)
    loaded = names["model"].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in own.state_dict().items())


def test_wrong_use_is_a_sentence_and_writes_nothing(resnet18, tmp_path, monkeypatch):
    path = resnet18[0]
    content = torch.load(path, weights_only=True)

    def variant(name, **changes):
        torch.save({**content, **changes}, tmp_path / name)
        return tmp_path / name

    def refused(sentence, checkpoint, out, to, **options):
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        with pytest.raises(UserError, match=sentence):
            export(checkpoint, tmp_path / out, to, **options)
        assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before

    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "page.pth.tar").write_text("<!DOCTYPE html>")
    (tmp_path / "half.pth.tar").write_bytes(path.read_bytes()[:100_000])
    without_encoder = {"module.queue": content["state_dict"]["module.queue"]}
    without_arch = {name: value for name, value in content.items() if name != "arch"}
    torch.save(without_arch, tmp_path / "anonymous.pth.tar")

    refused("exists already.*--force", path, "there.pth", "timm")
    refused(r"must end in \.pkl", path, "out.pth", "detectron2")
    refused("folder .*nowhere does not exist", path, "nowhere/out.pth", "timm")
    refused("no file .*ifm-eps0.11.*did you mean ifm-eps0.1", "ifm-eps0.11", "out.pth", "timm")
    refused("is a web page", tmp_path / "page.pth.tar", "out.pth", "timm")
    refused("damaged|cannot be read", tmp_path / "half.pth.tar", "out.pth", "timm")
    refused("resnet50.*does not fit.*--arch", variant("50.pth.tar", arch="resnet50"), "out.pth", "timm")
    refused("did you mean resnet18", variant("typo.pth.tar", arch="resnet81"), "out.pth", "timm")
    refused("does not fit", variant("queue.pth.tar", state_dict=without_encoder), "out.pth", "timm")
    refused("--arch, such as resnet50", tmp_path / "anonymous.pth.tar", "out.pth", "timm")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        refused("pip install safetensors", path, "out.safetensors", "safetensors")
    write_checkpoint(tmp_path / "shuffle.pth.tar", "shufflenet_v2_x0_5")
    refused("timm has no shufflenet", tmp_path / "shuffle.pth.tar", "out.pth", "timm")

    assert export(tmp_path / "anonymous.pth.tar", tmp_path / "named.pth", "timm", arch="resnet18") == (
        "resnet18",
        120,
    )
    export(path, tmp_path / "there.pth", "timm", force=True)
    assert len(torch.load(tmp_path / "there.pth", weights_only=True)) == 120


def test_a_full_disk_leaves_nothing(resnet18, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for to, suffixes in SUFFIXES.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # a file may not grow further
        try:
            with pytest.raises(UserError, match="cannot write"):
                export(resnet18[0], tmp_path / f"out{suffixes[0]}", to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []


def test_the_checkpoint_itself_is_never_replaced(tmp_path):
    write_checkpoint(tmp_path / "self.pth", "resnet18")
    before = (tmp_path / "self.pth").read_bytes()
    (tmp_path / "link.pth").symlink_to("self.pth")
    os.link(tmp_path / "self.pth", tmp_path / "hard.pth")
    for name in ("self.pth", "link.pth", "hard.pth"):
        with pytest.raises(UserError, match="is the checkpoint itself"):
            export(tmp_path / "self.pth", tmp_path / name, "timm", force=True)
        assert (tmp_path / name).read_bytes() == before and len(os.listdir(tmp_path)) == 3
    (tmp_path / "copy.pth").write_bytes(before)  # the same bytes are not the same file
    export(tmp_path / "self.pth", tmp_path / "copy.pth", "timm", force=True)
    assert (tmp_path / "copy.pth").read_bytes() != before == (tmp_path / "self.pth").read_bytes()


def test_names_that_are_too_long_for_a_file(resnet18, tmp_path):
    with pytest.raises(UserError, match="there is no file xxx"):
        export("x" * 400, tmp_path / "out.pth", "timm")
    with pytest.raises(UserError, match="cannot write .*File name too long"):
        export(resnet18[0], tmp_path / f"{'x' * 400}.pth", "timm")
    with pytest.raises(UserError, match="the folder .* does not exist"):
        export(resnet18[0], tmp_path / ("x" * 400) / "out.pth", "timm")
    assert os.listdir(tmp_path) == []
