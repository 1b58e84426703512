"""Networks of each family through all programs: pre-training, kNN, linear evaluation, features in Python."""

import re

import pytest
import torch
from command_lines import MOCO
from PIL import Image

import main_lincls
import main_moco
from moco.data.folders import image_folder, paths_of
from moco.evaluate.features import load_backbone

HEADS = {  # the name of the classifier, and what else its network needs
    "conv3": ("fc", ["--bn-splits", "2"]),
    "timm:test_vit": ("head", ["--channels-last"]),
}
SLOW = {
    "resnet18 --stem small": ("fc", []),
    "shufflenet_v2_x0_5": ("fc", []),
    "timm:test_efficientnet": ("classifier", ["--bn-splits", "2"]),
    "timm:convnext_atto": ("head.fc", ["--compile"]),
    "vit_b_16": ("heads.head", []),
    "vgg11_bn": ("classifier.6", ["--bn-splits", "2"]),
    "timm:swin_tiny_patch4_window7_224": ("head.fc", []),
}
FAMILIES = [*HEADS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_trained_evaluated_and_loaded_alike(family, folders, tmp_path, cli, monkeypatch):
    arch, *stem = family.split()
    head, flags = (HEADS | SLOW)[family]
    size = ["--image-size", {"resnet18": "16", "shufflenet_v2_x0_5": "64"}.get(arch, "32")]
    words = [*MOCO, "-a", arch, *stem, *size, *flags, "--knn", "1", "--epochs", "1", "--output-dir", tmp_path]
    code, output, errors = cli(main_moco.main, *words, folders)
    assert code == 0, errors
    assert " * kNN class" in output
    assert ("one BatchNorm group" in output) == (
        arch.startswith(("resnet", "shuffle"))
    )  # not without BatchNorm
    pretrained = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint = torch.load(pretrained, weights_only=True)
    assert checkpoint["arch"] == arch
    state = checkpoint["state_dict"]
    assert {f"module.encoder_q.{head}.{n}.weight" for n in (0, 2)} < state.keys()  # the MLP head

    seen, real = [], main_lincls.features_of

    def features_of(backbone, images, args):
        seen.append(real(backbone, images, args))
        return seen[-1]

    monkeypatch.setattr(main_lincls, "features_of", features_of)
    words = ["-a", arch, *size, "-b", "8", "-j", "0", "--lr", "1", "--epochs", "1", "--seed", "3", folders]
    words += ["--output-dir", tmp_path / "linear", "--pretrained", pretrained]
    code, output, errors = cli(main_lincls.main, *words)
    assert code == 0, errors
    evaluated = tmp_path / "linear" / "checkpoint.pth.tar"
    assert f"module.{head}.weight" in torch.load(evaluated, weights_only=True)["state_dict"]
    code, again, errors = cli(main_lincls.main, *words[:-2], "--evaluate", "--resume", evaluated)
    assert code == 0, errors
    accuracy = [line for line in output.splitlines() if line.startswith(" * Acc@1")]
    assert accuracy[0] in again

    expected = torch.cat(seen[3:5])  # after the 24 training images, the 9 of val/
    before = torch.get_rng_state()
    for path in (pretrained, evaluated):
        network, transform = load_backbone(path)
        with torch.no_grad():
            images = [transform(Image.open(file)) for file in paths_of(image_folder(folders, "val"))]
            features = torch.cat([network(part) for part in torch.stack(images).split(8)])
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
        assert features.shape[1] == state[f"module.encoder_q.{head}.2.weight"].shape[1]
    assert not torch.allclose(features.roll(1, 0), expected, rtol=0, atol=1e-6)  # negative control
    assert torch.equal(torch.get_rng_state(), before)


WRONG = [
    (main_moco, "-a squeezenet1_1", "has its one Linear classifier, and SqueezeNet has none; choose another"),
    (
        main_moco,
        "-a timm:efficientformer_l1 --image-size 224",
        "EfficientFormer has 2 of them .head, head_dist.",
    ),
    (
        main_moco,
        "-a timm:convnext_ato",
        "timm has no network 'convnext_ato'; did you mean timm:convnext_atto",
    ),
    (main_moco, "-a vit_b_16 --image-size 33", r"vit_b_16 cannot take --image-size 33 \(.*; use another"),
    (
        main_moco,
        "-a timm:test_vit --image-size 32 --bn-splits 2",
        "has no BatchNorm that --bn-splits could split",
    ),
    (
        main_moco,
        "-a shufflenet_v2_x0_5 --stem small",
        "--stem small is of torchvision's ResNets, not of shuff",
    ),
]


@pytest.mark.parametrize(("script", "line", "message"), WRONG)
def test_networks_that_do_not_suit_are_a_sentence(script, line, message, folders, tmp_path, cli):
    code, _, errors = cli(script.main, *MOCO, *line.split(), folders, "--output-dir", tmp_path)
    assert code == 2 and errors.count("\n") == 1, errors
    assert re.search(message, errors), errors
