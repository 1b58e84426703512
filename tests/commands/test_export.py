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
from export_models import write_checkpoint
from torch import nn

from moco.encoders import base_encoder, last_linear, replace_layer
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


@pytest.mark.parametrize(
    ("arch", "stem", "size", "to"),
    [
        ("resnet18", "small", 32, "torchvision"),
        ("resnet18", "small", 32, "timm"),
        ("conv3", None, 30, "safetensors"),
        ("timm:test_vit", None, 32, "timm"),
        ("mobilenet_v3_small", None, 32, "torchvision"),
    ],
)
def test_the_printed_lines_build_what_is_not_of_the_librarys_default(tmp_path, cli, arch, stem, size, to):
    encoder = base_encoder(arch, stem=stem, image_size=size)
    own = encoder(num_classes=3).eval()
    found = {"arch": arch, "state_dict": own.state_dict(), "settings": {"image_size": size}}
    torch.save(found, tmp_path / "c.pth.tar")
    code, output, errors = cli(main, tmp_path / "c.pth.tar", tmp_path / f"b{SUFFIXES[to][0]}", "--to", to)
    assert code == 0, errors
    names = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors}
    exec("\n".join(output.splitlines()[2:]), names)
    replace_layer(own, last_linear(encoder), nn.Identity())
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(names["model"].eval()(images), own(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "to"),
    [("resnet18", "torchvision"), ("resnet18", "timm"), ("resnet18", "safetensors"), ("resnet50", "timm")],
)
def test_the_printed_lines_load_a_network_with_the_same_features(tmp_path, request, cli, arch, to):
    checkpoint, own = request.getfixturevalue(arch)
    out = tmp_path / f"backbone{SUFFIXES[to][0]}"
    code, output, errors = cli(main, checkpoint, out, "--to", to)
    assert code == 0, errors
    taken, first, *lines = output.splitlines()
    count = len(own.state_dict())
    assert taken.startswith(f"{checkpoint}: the tensors under module.encoder_q. of the file's state_dict, ")
    assert first == f"{out}: the {count} tensors of a {arch} backbone; load it in {to} with"
    names = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors}
    exec("\n".join(lines), names)
    loaded = names["model"].eval().requires_grad_(False)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(images), own(images), rtol=1e-6, atol=1e-6)
    loaded.get_parameter(next(name for name, _ in loaded.named_parameters())).mul_(1.01)
    assert (loaded(images) - own(images)).abs().max() > 1e-4  # negative control
    assert os.listdir(tmp_path) == [out.name]


def test_a_regnet_which_cannot_be_built_on_the_meta_device(tmp_path):
    own = write_checkpoint(tmp_path / "checkpoint", "regnet_y_400mf")
    found = export(tmp_path / "checkpoint", tmp_path / "out.pth", "torchvision")
    assert found[:2] == ("regnet_y_400mf", len(own.state_dict()))


@pytest.mark.parametrize("arch", ["resnet34", "resnext50_32x4d", "wide_resnet50_2"])
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


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_for_detectron2_are_the_published_converters(arch):
    with torch.device("meta"):
        names = list(headless(arch).state_dict())
    theirs = published_converter([f"module.encoder_q.{name}" for name in names])
    assert [detectron2_name(name) for name in names] == theirs
    assert not set(theirs) & set(names)


def test_the_file_for_detectron2_holds_arrays_that_every_numpy_reads(resnet18, tmp_path):
    checkpoint, own = resnet18
    export(checkpoint, tmp_path / "backbone.pkl", "detectron2")
    data = (tmp_path / "backbone.pkl").read_bytes()
    content = pickle.loads(data, encoding="latin1")  # as Detectron2's checkpointer
    assert content["matching_heuristics"] is True and content["__author__"] == "MOCO"
    arrays = content["model"]
    assert len(arrays) == len(own.state_dict())
    for name, tensor in own.state_dict().items():
        array = arrays[detectron2_name(name)]
        assert array.flags.writeable and torch.equal(torch.from_numpy(array), tensor)
    words = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert {"numpy", "ndarray"} <= words and not {word for word in words if "numpy." in word}
    plain = pickle.dumps(numpy.zeros(2), protocol=4)  # negative control
    assert any("numpy." in str(argument) for _, argument, _ in pickletools.genops(plain))


def test_bfloat16_becomes_float32_for_detectron2_alone(resnet18, tmp_path):
    content = torch.load(resnet18[0], weights_only=True)
    state = content["state_dict"]
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    torch.save({**content, "state_dict": half}, tmp_path / "half")
    weight = half["module.encoder_q.conv1.weight"]
    export(tmp_path / "half", tmp_path / "out.pkl", "detectron2")
    array = pickle.loads((tmp_path / "out.pkl").read_bytes())["model"]["stem.conv1.weight"]
    assert array.dtype == numpy.float32 and torch.equal(torch.from_numpy(array), weight.float())
    export(tmp_path / "half", tmp_path / "out.pth", "timm")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["conv1.weight"]
    assert written.dtype == torch.bfloat16 and torch.equal(written, weight)


def test_views_and_other_layouts_of_memory_are_written_plainly(resnet18, tmp_path):
    content = torch.load(resnet18[0], weights_only=True)
    state, conv, bn = content["state_dict"], "module.encoder_q.conv1.weight", "module.encoder_q.bn1.weight"
    state[conv] = state[conv].contiguous(memory_format=torch.channels_last)
    state[bn] = torch.cat([state[bn], torch.zeros(10**7)])[:64]
    torch.save(content, tmp_path / "checkpoint")
    for to, suffixes in SUFFIXES.items():
        out = tmp_path / f"{to}{suffixes[0]}"
        export(tmp_path / "checkpoint", out, to)
        assert out.stat().st_size < 50e6 < (tmp_path / "checkpoint").stat().st_size
    weight = torch.load(tmp_path / "torchvision.pth", weights_only=True)["conv1.weight"]
    assert weight.is_contiguous() and torch.equal(weight, state[conv])


@pytest.fixture(scope="module")
def files(resnet18, tmp_path_factory):
    """A folder that nobody may change: checkpoints with a fault each, and a file that is no checkpoint."""
    folder = tmp_path_factory.mktemp("faults")
    content = torch.load(resnet18[0], weights_only=True)
    without_arch = {name: value for name, value in content.items() if name != "arch"}
    for name, variant in {
        "as a resnet50": content | {"arch": "resnet50"},
        "misspelled": content | {"arch": "resnet81"},
        "without encoder": content | {"state_dict": {"module.queue": torch.zeros(1)}},
        "without arch": without_arch,
    }.items():
        torch.save(variant, folder / name)
    write_checkpoint(folder / "shufflenet", "shufflenet_v2_x0_5")
    (folder / "page").write_text("<!DOCTYPE html>")
    (folder / "half").write_bytes(resnet18[0].read_bytes()[:100_000])
    (folder / "there.pth").write_text("mine")
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "out", "to", "sentence"),
    [
        (None, "there.pth", "timm", "exists already.*--force"),
        (None, "out.pth", "detectron2", r"must end in \.pkl"),
        (None, "nowhere/out.pth", "timm", "folder .*nowhere does not exist"),
        (None, "out.safetensors", "safetensors", "pip install safetensors"),
        ("ifm-eps0.11", "out.pth", "timm", "no file .*ifm-eps0.11.*did you mean ifm-eps0.1"),
        ("page", "out.pth", "timm", "is a web page"),
        ("half", "out.pth", "timm", "damaged|cannot be read"),
        ("as a resnet50", "out.pth", "timm", "does not fit resnet50.* name that with --arch"),
        ("misspelled", "out.pth", "timm", "did you mean resnet18"),
        ("without encoder", "out.pth", "timm", "does not fit"),
        ("without arch", "out.pth", "timm", "--arch, such as resnet50"),
        (
            "shufflenet",
            "out.pth",
            "timm",
            "timm has no shufflenet_v2_x0_5 as it is here: .* --to torchvision",
        ),
    ],
)
def test_wrong_use_is_a_sentence_and_writes_nothing(
    checkpoint, out, to, sentence, resnet18, files, monkeypatch
):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    monkeypatch.chdir(files)
    before = {file: file.stat().st_mtime_ns for file in files.iterdir()}
    with pytest.raises(UserError, match=sentence):
        export(checkpoint or resnet18[0], out, to)
    assert {file: file.stat().st_mtime_ns for file in files.iterdir()} == before


def test_arch_and_force(files, tmp_path):
    count, out = len(headless("resnet18").state_dict()), tmp_path / "there.pth"
    out.write_text("mine")
    found = export(files / "without arch", out, "timm", arch="resnet18", force=True)
    assert found[:2] == ("resnet18", count) and len(torch.load(out, weights_only=True)) == count


@pytest.mark.parametrize("to", SUFFIXES)
def test_a_full_disk_leaves_nothing(resnet18, tmp_path, to):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # a file may not grow further
    try:
        with pytest.raises(UserError, match="cannot write"):
            export(resnet18[0], tmp_path / f"out{SUFFIXES[to][0]}", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("link", ["symbolic", "hard", None])
def test_the_checkpoint_itself_is_never_replaced(resnet18, tmp_path, link):
    path = out = tmp_path / "self.pth"
    path.write_bytes(resnet18[0].read_bytes())
    if link:
        out = tmp_path / "link.pth"
        os.link(path, out) if link == "hard" else out.symlink_to(path)
    with pytest.raises(UserError, match="is the checkpoint itself"):
        export(path, out, "timm", force=True)
    assert path.read_bytes() == resnet18[0].read_bytes()
