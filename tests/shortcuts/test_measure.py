"""What is read from an encoder belongs to the right images, and the plain loss is what its name says."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import TinyEncoder
from torch import nn

from moco.builder import MoCo
from moco.data.augment import moco_v2
from moco.data.device import normalize
from moco.data.experiments import HELD_OUT, TRAIN, bits_of
from moco.data.folders import image_folder, labelled_folders, targets_of
from moco.data.loader import TrainLoader
from moco.encoders import base_encoder
from moco.errors import DivergedError
from moco.shortcuts import measure
from moco.trifeature import FACTORS, SETTINGS, factor_of

CPU = torch.device("cpu")
RUN = {"image_size": 16, "seed": 4, "random_bits": 0}
STEP = 25  # between the levels of a channel that encode the values of a factor


class Looks(nn.Module):
    """Tells the ten values of three factors, encoded in red, green and blue, by 30 features of 0 or 1."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(30, 2)

    def forward(self, x):
        return self.fc(F.one_hot((levels(x) / STEP).round().long(), 10).flatten(1).float())


class Means(nn.Module):
    """The mean of each channel."""

    fc = nn.Identity()

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


def levels(x):
    """The mean bytes (N, 3) of normalized views."""
    black, white = (normalize(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)).flatten() for v in (0, 255))
    return (x.mean(dim=(2, 3)) - black) / (white - black) * 255


@pytest.fixture
def combinations(tmp_path):
    """A folder of two parts with combinations of their own, whose images encode the factors."""
    for split, offsets in (("train", ((0, 0), (1, 2), (4, 9))), ("val", ((3, 5), (7, 1)))):
        for i in range(10):
            for a, b in offsets:
                numbers = i, (i + a) % 10, (i + b) % 10
                values = (names[n] for names, n in zip(FACTORS.values(), numbers, strict=True))
                folder = tmp_path / split / "_".join(values)
                folder.mkdir(parents=True)
                for render in range(2):
                    pixels = tuple(STEP * n for n in numbers)
                    Image.new("RGB", (20, 16), pixels).save(folder / f"{render}.png")
    (tmp_path / SETTINGS).write_text("{}")
    return tmp_path


def test_each_part_is_read_by_its_own_labels(combinations):
    for factor in FACTORS:  # the premise: combination numbers mean something else in val
        train, val, _ = labelled_folders(combinations, factor)
        by_name = [factor_of(val.classes[t], factor) for t in val.targets]
        assert (
            targets_of(val).tolist() == by_name != [train.target_transform(target) for target in val.targets]
        )
    found = measure.measure(combinations, CPU, Looks(), RUN)
    assert list(found) == ["readout"] and list(found["readout"]) == ["shape", "texture", "color"]
    for readout in found["readout"].values():
        assert (readout["accuracy"], readout["chance"], readout["converged"]) == (100, 10, True)


class Hidden(Looks):
    """The same with the values of each image moved on by as much as its bits say: 0 to 9."""

    def forward(self, x):
        moved = (x[:, 3:, 0, 0] * 2 ** torch.arange(x.shape[1] - 3)).sum(dim=1, keepdim=True)
        numbers = ((levels(x[:, :3]) / STEP).round() + moved).long() % 10
        return self.fc(F.one_hot(numbers, 10).flatten(1).float())


def test_with_random_bits_a_second_reading_gives_all_images_those_of_one(combinations, monkeypatch):
    real, seen = measure.with_channels, []
    monkeypatch.setattr(measure, "with_channels", lambda x, bits: (seen.append(bits), real(x, bits))[1])
    found = measure.measure(combinations, CPU, Hidden(), RUN | {"random_bits": 8})
    first, second = found["readout"], found["readout_shared_bits"]
    assert [second[factor]["accuracy"] for factor in second] == [100, 100, 100]
    assert max(first[factor]["accuracy"] for factor in first) < 60  # negative control: bits are in the way
    own = [bits_of(4, part, range(count), 8) for part, count in ((TRAIN, 60), (HELD_OUT, 40))]
    assert all(map(torch.equal, seen[:2], own)) and len(seen) == 4
    assert [bits.shape for bits in seen[2:]] == [(60, 8), (40, 8)]
    assert all(bool((bits == own[0][0]).all()) for bits in seen[2:])


def test_a_class_is_read_of_folders_that_are_no_trifeature(folders):
    (name, readout), *_ = measure.measure(folders, CPU, Means(), RUN)["readout"].items()
    assert name == "class" and readout["chance"] == pytest.approx(100 / 3) and 0 <= readout["accuracy"] <= 100


def test_features_are_in_the_order_of_the_images_over_batches_with_their_bits(tmp_path):
    for name, count in (("one", 200), ("two", 130)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(count):
            pixels = (i, 7 * i % 256, 100 if name == "one" else 200)
            Image.new("RGB", (8, 8), pixels).save(tmp_path / "train" / name / f"{i:03d}.png")
    images, encoder = image_folder(tmp_path, "train"), Means()
    expected = [Image.open(path).getpixel((0, 0)) for path, _ in images.samples]
    plain = measure.features_of(encoder, images, 8, CPU)
    assert plain.dtype == torch.float64 and plain.shape == (330, 3)
    assert levels(plain.float()[:, :, None, None]).round().int().tolist() == list(map(list, expected))
    for part in (TRAIN, HELD_OUT):
        bits = bits_of(9, part, range(330), 5)
        both = measure.features_of(encoder, images, 8, CPU, bits.__getitem__)
        assert torch.equal(both[:, :3], plain) and torch.equal(both[:, 3:], bits.double())


def settings(**other):
    return {
        "aug_plus": True, "crops_only": False, "resize": "pil", "image_size": 16, "batch_size": 8, "seed": 3,
        "epochs": 2, "bn_splits": 1, "random_bits": 0, **other,
    }  # fmt: skip


def small_moco(**options):
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 8, K=12, m=0.5, T=0.2, **options)
    with torch.no_grad():
        for parameter in model.encoder_k.parameters():  # so that a momentum below 1 would show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def literal(model, folder, epoch):
    """Mean InfoNCE of the epoch, written out, with the loader's views."""
    loader = TrainLoader(image_folder(folder, "train"), moco_v2(), size=16, batch_size=8, seed=3)
    queue, total, right, count = model.queue.T.clone(), 0.0, 0, 0  # K x C, the oldest first
    with torch.no_grad():
        for batch in loader.epoch(epoch):
            q, k = (
                F.normalize(encoder(normalize(view)), dim=1)
                for encoder, view in zip((model.encoder_q, model.encoder_k), batch.pixels, strict=True)
            )
            for one, key in zip(q, k, strict=True):
                logits = torch.stack([one @ key, *(one @ other for other in queue)]) / 0.2
                total -= float(logits.log_softmax(dim=0)[0])
                right += int(logits.argmax() == 0)
                count += 1
            queue = torch.cat([queue, k])[-12:]
    assert count == 24
    return total / count, 100 * right / count


def test_the_plain_loss_is_infonce_written_out_and_changes_no_weight(folders):
    model = small_moco()
    before = copy.deepcopy(model.state_dict())
    expected = literal(copy.deepcopy(model).train(), folders, epoch=2)
    found = measure.info_nce_after_training(model, folders, settings(), CPU)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(model.queue, before["queue"])  # negative control: the model was at work
    assert literal(small_moco().train(), folders, epoch=1)[0] != pytest.approx(found[0], rel=1e-3)
    with_ifm = small_moco(epsilon=0.5)  # the same measure for every epsilon
    assert measure.info_nce_after_training(with_ifm, folders, settings(), CPU) == found
    apart = measure.info_nce_after_training(small_moco(bn_splits=2), folders, settings(bn_splits=2), CPU)
    assert apart[0] != pytest.approx(found[0], rel=1e-3)  # in the run's own arrangement


def test_the_untrained_encoder_is_what_a_run_starts_from():
    arch = "shufflenet_v2_x0_5"
    untrained = measure.untrained_encoder(arch, 16, seed=5, random_bits=2)
    torch.manual_seed(5)
    run = MoCo(base_encoder(arch, 2), 16, 12, mlp=True).encoder_q.state_dict()
    names = [name for name in untrained.state_dict() if not name.startswith("fc.")]
    assert all(torch.equal(untrained.state_dict()[name], run[name]) for name in names) and len(names) > 100
    other = measure.untrained_encoder(arch, 16, seed=6, random_bits=2)
    assert not torch.equal(other.conv1[0].weight, untrained.conv1[0].weight)  # negative control


def test_weights_that_are_not_finite_have_diverged(folders, monkeypatch):
    class Broken(Means):
        def forward(self, x):
            return super().forward(x) * torch.nan

    with pytest.raises(DivergedError, match="a feature is not finite"):
        measure.measure(folders, CPU, Broken(), RUN)
    model = small_moco()
    with torch.no_grad():
        model.encoder_q.fc.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match="the InfoNCE loss is not finite"):
        measure.info_nce_after_training(model, folders, settings(), CPU)


def test_the_program_measures_a_checkpoint_and_its_log(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(measure, "base_encoder", lambda arch, extra_channels=0: TinyEncoder)
    model = MoCo(TinyEncoder, 8, K=12, m=0.5, T=0.2, mlp=True)
    run = settings(moco_dim=8, moco_k=12, moco_m=0.5, moco_t=0.2, mlp=True)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "arch": "tiny", "settings": run}, tmp_path / "checkpoint.pth.tar")
    lines = [
        {"kind": "start"},
        *({"kind": "epoch", "epoch": e, "loss": 5.0 - e, "acc1": e} for e in range(2)),
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "found.json"
    code, output, errors = cli(measure.main, out, folders, "--pretrained", tmp_path / "checkpoint.pth.tar")
    found = json.loads(out.read_text())
    assert (code, errors) == (0, "") and found["versions"]["torch"] == torch.__version__
    assert output == f"class: {found['readout']['class']['accuracy']:.2f} % (chance 33.33)\n"
    loss, accuracy = measure.info_nce_after_training(model, folders, run, CPU)
    expected = {"info_nce": loss, "info_nce_acc1": accuracy, "training": 4.0, "training_acc1": 1}
    assert found["losses"] == expected


def test_the_program_measures_what_a_run_starts_from_and_refuses_what_it_cannot(folders, tmp_path, cli):
    out = tmp_path / "found.json"
    words = ["-a", "shufflenet_v2_x0_5", "--image-size", "32", "--seed", "0", "--random-bits", "2"]
    code, _, errors = cli(measure.main, out, folders, *words)
    found = json.loads(out.read_text())
    assert (code, errors) == (0, "") and "losses" not in found
    assert "class" in found["readout"] and "class" in found["readout_shared_bits"]
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "bare.pth.tar")
    for words, message in (
        (["--pretrained", "x", "-a", "resnet18"], "a checkpoint says how it was trained: leave out -a"),
        (["--pretrained", tmp_path / "bare.pth.tar"], "does not say how it was trained"),
        (["--random-bits", "64"], "--random-bits"),
    ):
        code, _, errors = cli(measure.main, tmp_path / "none.json", folders, *words)
        assert code == 2 and message in errors and not (tmp_path / "none.json").exists()
