"""Statistics of features against loops, and the backbone of a checkpoint with its features."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco.builder import MoCo
from moco.data.folders import image_folder
from moco.data.loader import ValidationLoader
from moco.encoders import backbone, base_encoder
from moco.errors import UserError
from moco.evaluate.features import backbone_of, features_of, gram, load_backbone, rankme, similarities

ARCH = "shufflenet_v2_x0_5"


def test_similarities_are_those_of_loops():
    torch.manual_seed(0)
    N, C, K = 7, 5, 11
    q, k, queue = (nn.functional.normalize(torch.randn(n, C).double(), dim=1) for n in (N, N, K))

    def dot(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))

    pairs = [(i, j) for j in range(N) for i in range(j)]
    expected = {
        "pos_similarity": sum(dot(q[i], k[i]) for i in range(N)) / N,
        "neg_similarity": sum(dot(q[i], key) for i in range(N) for key in queue) / (N * K),
        "alignment": sum(squared(q[i], k[i]) for i in range(N)) / N,
        "uniformity": math.log(sum(math.exp(-2 * squared(q[i], q[j])) for i, j in pairs) / len(pairs)),
        "queue_mean": math.sqrt(sum(dot(key, other) for key in queue for other in queue)) / K,
    }
    found = similarities(q, k, queue.T.mean(dim=1))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-12)
    other = similarities(q, k.roll(1, 0), queue.T.roll(1, 0).mean(dim=1))
    differ = {name for name in expected if other[name].item() != pytest.approx(expected[name], rel=1e-3)}
    assert differ == {"pos_similarity", "neg_similarity", "alignment"}  # negative control


@pytest.mark.parametrize("rows", [3, 5000])
def test_rankme_is_the_number_of_dimensions_that_features_use(rows):
    basis, _ = torch.linalg.qr(torch.randn(rows, 3))  # orthonormal columns
    found = [rankme(gram(basis[:, :used] @ torch.eye(3)[:used])) for used in (1, 2, 3)]
    assert found == pytest.approx([1, 2, 3], rel=1e-3)
    skewed = rankme(gram(basis * torch.tensor([3.0, 1.0, 0.0])))
    assert skewed == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-3)
    assert math.isnan(rankme(gram(torch.full((4, 3), math.inf))))
    assert rankme(torch.zeros(3, 3)) <= 1  # all features 0


def test_the_backbone_of_a_checkpoint_is_its_query_encoder(folders, tmp_path):
    torch.manual_seed(1)
    model = MoCo(base_encoder(ARCH), 8, 16, mlp=True)
    with torch.no_grad():
        for parameter in model.encoder_k.parameters():
            parameter.add_(1)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": ARCH, "state_dict": state}, tmp_path / "c.pth.tar")
    network, checkpoint = backbone_of(tmp_path / "c.pth.tar")
    assert checkpoint["arch"] == ARCH and checkpoint["epoch"] == 3 and not network.training
    assert checkpoint["taken"].startswith("the tensors under module.encoder_q. of the file's state_dict, ")

    images = image_folder(folders, "val")
    loader = ValidationLoader(images, size=32, batch_size=4)
    features, targets = features_of(network, loader, "cpu")
    encoder = model.encoder_q.eval()
    encoder.fc = nn.Identity()
    expected, _ = features_of(encoder, loader, "cpu")
    assert features.shape == (9, 1024) and targets.tolist() == images.targets
    assert torch.equal(features, expected)
    other, _ = features_of(backbone(base_encoder(ARCH)).eval(), loader, "cpu")
    assert not torch.allclose(features, other)  # negative control

    with pytest.raises(UserError, match="resnet18"):
        backbone_of(tmp_path / "c.pth.tar", "resnet18")
    others = {"student": model.encoder_k.state_dict(), "teacher": encoder.state_dict(), "arch": 5}
    torch.save(others, tmp_path / "others.pth")
    network, checkpoint = backbone_of(tmp_path / "others.pth", ARCH)
    assert checkpoint["taken"] == "the tensors of the file's teacher"
    assert torch.equal(features_of(network, loader, "cpu")[0], features)
    torch.save({"student": dict(list(encoder.state_dict().items())[:20])}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="does not fit resnet50, .* its student has conv1.0.weight, .*--arch"):
        backbone_of(tmp_path / "part.pth")
    with pytest.raises(UserError, match="nowhere"):
        backbone_of(tmp_path / "nowhere")


@pytest.mark.parametrize("gray_range", [None, [0, 4095]])
def test_the_transform_reads_gray_images_as_the_programs_do(tmp_path, gray_range):
    values = np.random.default_rng(0).integers(0, 4096, (40, 40), np.uint16)
    path, checkpoint = tmp_path / "images" / "train" / "a" / "x.png", tmp_path / "file.pth"
    path.parent.mkdir(parents=True)
    Image.fromarray(values).save(path)
    state = base_encoder(ARCH)(num_classes=1).state_dict()
    torch.save({"arch": ARCH, "state_dict": state, "settings": {"gray_range": gray_range}}, checkpoint)
    network, transform = load_backbone(checkpoint)
    with torch.no_grad():
        found = network(transform(Image.open(path))[None])
    images = image_folder(tmp_path / "images", "train")
    seen, other = (
        features_of(network, ValidationLoader(images, size=224, batch_size=1, gray_range=given), "cpu")[0]
        for given in (gray_range, [0, 2000])
    )
    assert torch.allclose(found, seen, rtol=1e-4, atol=1e-10)
    assert not torch.allclose(found, other, rtol=1e-2, atol=1e-8)  # negative control
