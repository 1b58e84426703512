"""Files of other programs: the backbone is taken from where it is, which is said. What is refused says why,
and how to get the weights out. No code in a file is run."""

import argparse
import os
import pickle
import re
import shlex
import sys
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from command_lines import SMALL
from tiny import TinyEncoder
from torch import nn

import main_lincls
import main_moco
from moco import zoo
from moco.encoders import base_encoder
from moco.errors import UserError
from moco.evaluate.features import load_backbone
from moco.export import export
from moco.run.backbone import encoder_state, load_encoder, network_settings
from moco.run.checkpoint import read

ARCH = "tiny"


def trained(seed=3):
    """An encoder without its head, whose tensors all differ from those of a new one."""
    torch.manual_seed(seed)
    network = TinyEncoder(4)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    network.bn.running_var.abs_()
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}


GOOD, OTHER = trained(), trained(seed=4)
HEAD = {"head.weight": torch.zeros(2, 8), "head.bias": torch.zeros(2)}


def under(prefix, state=GOOD):
    return {prefix + name: tensor for name, tensor in state.items()}


def numbered(prefix, state=GOOD):
    """As nn.Sequential(*list(network.children())[:-1]) names them."""
    numbers = {"conv": "0", "bn": "1"}
    return {
        f"{prefix}{numbers[top]}.{rest}": t for name, t in state.items() for top, rest in [name.split(".")]
    }


def loaded(tmp_path, content, arch=ARCH, network=None):
    """(backbone's tensors after loading, what was taken in words) of a file with this content."""
    path = tmp_path / "file.pth"
    torch.save(content, path)
    network = network or TinyEncoder(4)
    taken = load_encoder(network, read(path), path, arch)
    return {name: t for name, t in network.state_dict().items() if not name.startswith("fc.")}, taken


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


VISSL = {
    "base_model": {"model": {"trunk": under("_feature_blocks."), "heads": under("0.clf.", HEAD)}},
    "loss": under("momentum_teacher.module.trunk._feature_blocks.", OTHER),
}
LAYOUTS = {  # name: (content, what is said to be taken)
    "MoCo": (
        {"state_dict": under("module.encoder_q.") | under("module.encoder_k.", OTHER) | under("", HEAD)},
        "under module.encoder_q. of the file's state_dict, 8 of other parts left out",
    ),
    "MoCo v3": (
        {"state_dict": under("module.momentum_encoder.", OTHER) | under("module.base_encoder.")},
        "under module.base_encoder. of the file's state_dict, 6 of other parts left out",
    ),
    "compiled": (
        {"model": under("module.encoder_q._orig_mod.")},
        "under module.encoder_q._orig_mod. of the file's model",
    ),
    "DINO": (
        {"student": under("module.backbone.", OTHER), "teacher": under("backbone.") | under("", HEAD)},
        "under backbone. of the file's teacher, 2 of other parts left out",
    ),
    "solo-learn": (
        {"state_dict": under("momentum_backbone.", OTHER) | under("backbone.") | under("classifier.", HEAD)},
        "under backbone. of the file's state_dict, 8 of other parts left out",
    ),
    "lightly": (
        {"state_dict": numbered("backbone.") | numbered("backbone_momentum.", OTHER)},
        "under backbone. of the file's state_dict, numbered as its layers, 6 of other parts left out",
    ),
    "lightly's DINO": (
        {"state_dict": numbered("student_backbone.", OTHER) | numbered("teacher_backbone.")},
        "under teacher_backbone. of the file's state_dict, numbered as its layers, 6 of",
    ),
    "a bare Sequential": (numbered(""), "the tensors of the file's state_dict, numbered as its layers"),
    "mmselfsup's MoCo": (  # the same tensors under two names
        {"state_dict": under("encoder_k.0.", OTHER) | under("encoder_q.0.") | under("backbone.")},
        "of the file's state_dict, 12 of other parts left out",
    ),
    "mmselfsup's BYOL": (
        {"state_dict": under("target_net.module.0.", OTHER) | under("backbone.")},
        "under backbone. of the file's state_dict",
    ),
    "VISSL": (
        {"classy_state_dict": VISSL, "phase_idx": 3},
        "under _feature_blocks. of the file's classy_state_dict.base_model.model.trunk",
    ),
    "VISSL's converter": (
        {"model_state_dict": under("trunk._feature_blocks.")},
        "under trunk._feature_blocks. of the file's model_state_dict",
    ),
    "SimSiam": (
        {"state_dict": under("module.encoder.") | under("module.encoder.fc.0.", HEAD)},
        "under module.encoder. of the file's state_dict, 2 of other parts left out",
    ),
    "timm with averaged weights": (
        {"state_dict_ema": OTHER, "state_dict": GOOD},
        "the tensors of the file's state_dict",
    ),
    "averaged alone": ({"model_ema": under("module.")}, "the tensors under module. of the file's model_ema"),
    "a net": ({"net": under("net."), "acc": 3.5, "epoch": 3}, "under net. of the file's net"),
    "a bare state_dict beside a number": (
        {**under("model."), "epoch": 3},
        "under model. of the file's state_dict",
    ),
    "a name that nobody has used yet": ({"weights": under("a.b.c.")}, "under a.b.c. of the file's weights"),
    "two entries": ({"model": OTHER, "state_dict": GOOD}, "the tensors of the file's state_dict"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_backbone_is_taken_from_where_a_program_puts_it(tmp_path, name):
    content, said = LAYOUTS[name]
    state, taken = loaded(tmp_path, content)
    assert said in taken
    assert same(state, GOOD) and not same(OTHER, GOOD)
    if name != "averaged alone":  # negative control: without one tensor nothing is taken
        broken = pickle.loads(pickle.dumps(content))
        remove(broken, "bn.weight" if "numbered" not in taken else "1.weight")
        with pytest.raises(UserError, match="does not fit tiny: .*weight is missing"):
            loaded(tmp_path, broken)


def remove(content, ending):
    """Delete the tensors with this end of their name, at any depth, that are in GOOD."""
    for name, value in list(content.items()):
        if isinstance(value, dict):
            remove(value, ending)
        elif name.endswith(ending) and any(torch.equal(value, t) for t in GOOD.values()):
            del content[name]


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_files_without_batchnorms_counters_are_taken_with_counters_at_0(tmp_path, prefix):
    old = {name: tensor for name, tensor in GOOD.items() if "num_batches" not in name}
    state, _ = loaded(tmp_path, {"state_dict": under(prefix, old)})
    assert state.pop("bn.num_batches_tracked") == 0 and same(state, old)
    state, _ = loaded(tmp_path, {"state_dict": under(prefix, GOOD)})
    assert state["bn.num_batches_tracked"] == 7  # negative control
    odd = GOOD | {"bn.num_batches_tracked": torch.tensor([5])}
    assert loaded(tmp_path, odd)[0]["bn.num_batches_tracked"] == 0
    with pytest.raises(UserError, match="running_var is missing"):
        loaded(tmp_path, {name: tensor for name, tensor in GOOD.items() if "running_var" not in name})


def test_a_resnet_by_number_and_a_deeper_one_by_name(tmp_path):
    """The children of a ResNet: conv1, bn1, relu, maxpool, layer1 to layer4, avgpool, fc."""
    torch.manual_seed(0)
    resnets = {depth: torchvision.models.get_model(f"resnet{depth}", weights=None) for depth in (18, 34)}
    sequential = nn.Sequential(*list(resnets[18].children())[:-1])
    state = {f"backbone.{name}": tensor for name, tensor in sequential.state_dict().items()}
    assert {"backbone.0.weight", "backbone.1.bias", "backbone.4.0.conv1.weight"} < state.keys()
    fresh = torchvision.models.resnet18()
    found, taken = loaded(tmp_path, {"state_dict": state}, "resnet18", fresh)
    expected = {name: t for name, t in resnets[18].state_dict().items() if not name.startswith("fc.")}
    assert same(found, expected) and "under backbone." in taken
    # all tensors of ResNet-18 are in ResNet-34, in the same shapes
    deeper = resnets[34].state_dict()
    assert all(deeper[name].shape == tensor.shape for name, tensor in expected.items())
    with pytest.raises(
        UserError, match=r"of the backbone's 100 tensors it has 100 of .*layer1\.2\..* not in resn"
    ):
        loaded(tmp_path, deeper, "resnet18", fresh)
    sequential = nn.Sequential(*list(resnets[34].children())[:-1])
    with pytest.raises(UserError, match="4.2.conv1.weight is not in resnet18"):
        loaded(tmp_path, sequential.state_dict(), "resnet18", fresh)


SMALLER = GOOD | {"conv.weight": torch.zeros(8, 3, 7, 7)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"model": under("backbone.", SMALLER)},
            r"of the backbone's 5 tensors it has 4 under backbone. of the file's model, and "
            r"backbone.conv.weight is \(8, 3, 7, 7\) there and \(8, 3, 3, 3\) in tiny; if",
        ),
        ({"net": HEAD}, "of whose backbone it holds no tensor: its net has head.weight, head.bias; if"),
        (
            {"state_dict": under("a.") | under("b.", OTHER)},
            "several .* under a. of .* under b. of .*: write the",
        ),
        (
            {"ours": GOOD, "theirs": OTHER},
            "several backbones of tiny, of the file's ours and of the file's theirs",
        ),
        # what follows the encoder does not stand in for an encoder that is there in part
        (
            {"state_dict": under("encoder_q.", SMALLER) | under("encoder_k.", GOOD)},
            "4 under encoder_q. of the file's state_dict, 5 under encoder_k. .* encoder_q.conv.weight is",
        ),
        ({"teacher": under("backbone.", SMALLER), "student": under("backbone.")}, "4 under .* 5 under"),
        (GOOD | {"conv.weight_mask": GOOD["conv.weight"]}, "conv.weight_mask is not in tiny"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_prefixes_found(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as error:
        loaded(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "file.pth"))
    assert not re.search("--moco|--mlp", str(error.value))


@pytest.mark.parametrize(
    ("arch", "settings", "asked"),
    [
        pytest.param("resnet18", {"stem": "small"}, "resnet34", marks=pytest.mark.slow),
        ("conv3", {"image_size": 32}, "resnet18"),
    ],
)
def test_of_another_network_the_one_that_would_fit_is_named(tmp_path, arch, settings, asked):
    content = base_encoder(arch, **settings)(num_classes=2).state_dict()
    with pytest.raises(UserError, match=f"; its tensors are those of {arch}; name that with --arch"):
        loaded(tmp_path, content, asked, base_encoder(asked)(num_classes=2))
    loaded(tmp_path, content, arch, base_encoder(arch, **settings)(num_classes=2))
    del content[next(iter(content))]
    with pytest.raises(UserError, match="; if it is of another architecture, name that with --arch"):
        loaded(tmp_path, content, asked, base_encoder(asked)(num_classes=2))


def test_flags_against_the_shapes_of_a_file_are_said():
    def settings(arch, asked, **made):
        file = {"state_dict": base_encoder(arch, **made)(num_classes=2).state_dict()}
        return network_settings(file, "file", arch, **asked)

    assert settings("resnet18", {}, stem="small") == {"stem": "small", "image_size": 224}
    assert settings("conv3", {"image_size": 27}, image_size=32) == {"stem": None, "image_size": 27}
    for arch, asked, made, said in (
        ("resnet18", {"stem": "small"}, {}, "file is of a network without --stem small: leave it out"),
        ("conv3", {"image_size": 33}, {"image_size": 32}, "file is of --image-size 32, not 33: use the same"),
    ):
        with pytest.raises(UserError, match=said):
            settings(arch, asked, **made)


def test_the_same_tensors_twice_are_no_question(tmp_path):
    assert same(loaded(tmp_path, {"state_dict": under("a.") | under("b.")})[0], GOOD)
    state, taken = loaded(tmp_path, {"best": GOOD, "state_dict": GOOD})
    assert same(state, GOOD) and taken == "the tensors of the file's state_dict"
    assert same(read(tmp_path / "file.pth")["state_dict"], GOOD)


def test_a_tensor_that_is_not_finite_is_named(tmp_path):
    for value in (float("nan"), float("inf")):
        broken = {name: tensor.clone() for name, tensor in GOOD.items()}
        broken["bn.bias"][3] = value
        with pytest.raises(UserError, match="backbone.bn.bias under backbone. of .* is not finite.*earlier"):
            loaded(tmp_path, {"net": under("backbone.", broken)})
    rest = under("head.", {"bn.bias": broken["bn.bias"]})
    assert same(loaded(tmp_path, {"net": under("backbone.") | rest})[0], GOOD)  # negative control


def test_a_network_that_is_not_known_here_is_said_to_be_the_files(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"arch": "vit_small", "model": under("backbone.")}, path)
    for use in (load_backbone, lambda path: export(path, tmp_path / "out.pth", "timm")):
        with pytest.raises(UserError, match="names the architecture vit_small, but torchvision .*--arch"):
            use(path)
    with pytest.raises(UserError, match="does not fit resnet18, .*; the file names vit_small, .* --arch$"):
        load_backbone(path, "resnet18")
    with pytest.raises(UserError, match="ResNet-50s, and the file names vit_small"):
        zoo.load(path)
    load_backbone(path, "tiny")
    torch.save({"arch": "resnet18", "model": under("backbone.")}, path)
    with pytest.raises(UserError, match="is of -a resnet18, not of -a tiny"):  # negative control
        load_backbone(path, "tiny")


def test_a_file_that_holds_itself_is_read(tmp_path):
    content = {"state_dict": dict(GOOD)}
    content["self"] = content["state_dict"]["self"] = content
    assert same(loaded(tmp_path, content)[0], GOOD)


VALUES = {
    "lr": 0.1,
    "best_acc1": np.float64(71.25),
    "half": np.float16(0.5),
    "big-endian": np.dtype(">f4").type(3),
    "epoch": np.int64(12),
    "flag": np.bool_(True),
    "name": np.str_("resnet"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("numpy_1", [True, False])
def test_a_namespace_and_numpys_numbers_are_read(tmp_path, zipped, numpy_1):
    path = tmp_path / "own.pth.tar"
    content = {"state_dict": GOOD, "args": argparse.Namespace(**VALUES), "best_acc1": np.float32(2.5)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if numpy_1 and zipped:  # the module's name before NumPy 2
        rewrite(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    found = read(path)
    assert vars(found["args"]) == VALUES and found["best_acc1"] == 2.5
    assert {type(value) for value in vars(found["args"]).values()} == {float, int, bool, str}
    assert same(found["state_dict"], GOOD)
    with pytest.raises(pickle.UnpicklingError):  # negative control, and nothing was allowed for good
        torch.load(path, weights_only=True)


def rewrite(path, old, new):
    """Replace bytes in the pickle of a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            assert old in data or not name.endswith("data.pkl")
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


class Settings(dict):
    """As OmegaConf's in files of Lightning: of a class of its own."""


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "inside", [Settings(lr=1), np.zeros(3), np.zeros(1, "f4,f4")[0], "module", "function"]
)
def test_other_objects_are_refused_with_a_command_that_gets_the_weights_out(tmp_path, inside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "the user's file.ckpt"
    inside = (
        {"module": nn.Linear(2, 2), "function": print}.get(inside, inside)
        if isinstance(inside, str)
        else inside
    )
    content = {
        "state_dict": under("backbone."),
        "hyper_parameters": argparse.Namespace(x=[inside]),
        "arch": "tiny",
    }
    torch.save(content, path)
    with pytest.raises(
        UserError, match=r"could run code; refused\. Where you trust it, `python -c "
    ) as error:
        read(path)
    assert same(*extracted(error.value, path))


@pytest.mark.parametrize(
    "content",
    [
        nn.Sequential(*list(TinyEncoder(4).children())[:-1]),
        {"model": nn.Sequential(*list(TinyEncoder(4).children())[:-1]), "epoch": 3},
    ],
)
def test_the_command_takes_modules_apart(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (content, content.get("model") if isinstance(content, dict) else None):
        if isinstance(module, nn.Module):
            module.load_state_dict(numbered(""))
    torch.save(content, tmp_path / "whole.pt")
    with pytest.raises(UserError, match="holds more than tensors and plain values .torch.nn") as error:
        read(tmp_path / "whole.pt")
    assert same(*extracted(error.value, tmp_path / "whole.pt"))


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_the_command_writes_arrays_as_tensors(tmp_path, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = {name: tensor.numpy() for name, tensor in GOOD.items()}
    content = {"model": under("module.", arrays) | {"module.bn.bias": arrays["bn.bias"].astype(">f4")}}
    if protocol:
        (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, tmp_path / "arrays.pkl")
    with pytest.raises(UserError, match="could run code; refused") as error:
        read(tmp_path / "arrays.pkl")
    assert same(*extracted(error.value, tmp_path / "arrays.pkl"))


def extracted(error, path):
    """(the backbone of the file that the command in a message writes, that which it should be)."""
    python, *words = shlex.split(re.search("`(.*)`", str(error))[1])
    assert python == "python" and words[2:] == [str(path), "weights.pth"] and "\n" not in str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[::2] + words[3:])
        assert words[0] == "-c"
        exec(words[1], {})
    return encoder_state(read("weights.pth"), "weights.pth", TinyEncoder(4), ARCH)[0], GOOD


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_a_torchscript_program_is_refused_with_a_command_that_gets_the_weights_out(
    tmp_path, traced, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    network = TinyEncoder(4).eval()
    network.load_state_dict(GOOD, strict=False)
    script = torch.jit.trace(network, torch.zeros(1, 3, 8, 8)) if traced else torch.jit.script(network)
    script.save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt") as archive:  # what a zip bomb is told from
        assert any(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
    with pytest.raises(UserError, match="is a TorchScript program, .*; refused: it is code") as error:
        read(tmp_path / "script.pt")
    assert same(*extracted(error.value, tmp_path / "script.pt"))


def test_a_safetensors_file_is_read_whatever_its_name(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.bin"
    safetensors.save_file(under("backbone."), path, metadata={"arch": "other", "format": "pt"})
    found = read(path)
    assert same(found.pop("state_dict"), under("backbone.")) and found == {"arch": "other"}
    network = TinyEncoder(4)
    assert "under backbone." in load_encoder(network, read(path), path, ARCH)
    assert same({name: tensor for name, tensor in network.state_dict().items() if name in GOOD}, GOOD)

    cut = path.read_bytes()
    path.write_bytes(cut[:-1])
    with pytest.raises(UserError, match="model.bin is damaged .*; copy or download it again"):
        read(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    with pytest.raises(UserError, match="model.bin is a safetensors file, .*: pip install safetensors"):
        read(path)


def test_files_of_other_kinds_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("arrays.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="is an archive of another kind than torch.save writes, with x.npy"):
        read("arrays.npz")


@pytest.mark.parametrize("where", ["args", "dtype"])
def test_a_trap_in_what_is_allowed_is_not_sprung(tmp_path, where):
    sprung = tmp_path / "sprung"
    trap = Trap(sprung)
    torch.save({"state_dict": GOOD, "args": argparse.Namespace(x=trap)}, tmp_path / "trap")
    if where == "dtype":  # numpy.dtype's place is taken by a call of os.mkdir's
        number = argparse.Namespace(x=np.float64(1))
        torch.save({"state_dict": GOOD, "args": number}, tmp_path / "trap")
        rewrite(tmp_path / "trap", b"cnumpy\ndtype\n", b"cposix\nmkdir\n")
    with pytest.raises(UserError, match="posix.mkdir.*could run code; refused"):
        read(tmp_path / "trap")
    assert not sprung.exists()


def test_linear_evaluation_takes_it_and_says_so(folders, tmp_path, cli):
    words = [*SMALL, "-a", "tiny", folders, "--epochs", "1", "--schedule", "--output-dir"]
    torch.save({"model": under("backbone.") | under("", HEAD), "epoch": 3}, tmp_path / "own.pth")
    code, output, errors = cli(main_lincls.main, *words, tmp_path / "a", "--pretrained", tmp_path / "own.pth")
    assert code == 0, errors
    said = "pretrained: the tensors under backbone. of the file's model, 2 of other parts left out\n"
    assert said in output
    result = torch.load(tmp_path / "a" / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert same({name: result[f"module.{name}"] for name in GOOD}, GOOD)

    torch.save({"model": under("backbone.", SMALLER)}, tmp_path / "no.pth")
    code, output, errors = cli(main_lincls.main, *words, tmp_path / "b", "--pretrained", tmp_path / "no.pth")
    assert code == 2 and errors.count("\n") == 1 and "--moco" not in errors and "under backbone." in errors


def test_a_classifier_without_counters_is_evaluated_but_pretraining_resumes_its_own_format(
    folders, tmp_path, cli
):
    state = GOOD | {"fc.weight": torch.zeros(3, 8), "fc.bias": torch.zeros(3)}
    del state["bn.num_batches_tracked"]
    torch.save({"epoch": 1, "arch": "tiny", "state_dict": under("module.", state)}, tmp_path / "best.pth.tar")
    words = [*SMALL, "-a", "tiny", folders, "--output-dir", tmp_path]
    code, output, errors = cli(main_lincls.main, *words, "-e", "--resume", tmp_path / "best.pth.tar")
    assert code == 0 and "Acc@1" in output, errors

    for content, program, said in (
        ({"model": under("module.", state)}, main_lincls.main, "has no entry state_dict"),
        ({"model": under("encoder_q.")}, main_moco.main, "is not of pre-training"),
    ):
        torch.save(content, tmp_path / "others.pth")
        command = ["-e"] if program is main_lincls.main else ["--moco-k", "8"]
        code, _, errors = cli(program, *words, *command, "--resume", tmp_path / "others.pth")
        assert code == 2 and said in errors and errors.count("\n") == 1, errors
