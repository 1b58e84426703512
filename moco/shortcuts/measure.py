"""Measure one run, as JSON: what a linear classifier reads from its frozen features, and whether the random
bits were learned.

python -m moco.shortcuts.measure OUT.json DATA [--pretrained CKPT] [flags of main_moco.py, as of the run]
"""

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from moco import options
from moco.builder import MoCo
from moco.data.augment import pretraining
from moco.data.device import DeviceAugment, normalize
from moco.data.experiments import (
    HELD_OUT,
    HELD_OUT_AGAIN,
    TRAIN,
    TRAIN_AGAIN,
    RandomBits,
    bits_of,
    with_channels,
)
from moco.data.folders import image_folder, labeled_folders, targets_of
from moco.data.loader import TrainLoader, ValidationLoader
from moco.encoders import base_encoder, replace_layer
from moco.errors import DivergedError, Parser, UserError, interrupt_on_signals, run_program
from moco.files import atomic_file
from moco.losses import contrast
from moco.run.checkpoint import load_strictly, read
from moco.run.log import machine
from moco.shortcuts.probe import read_out
from moco.trifeature import FACTORS

# With which random bits features are read: each image's own; those of one image for all; for each image drawn
# anew, which training never saw.
READINGS = ("own", "shared", "redrawn")
BATCH = 256
COURSE = ("info_nce", "ifm_factor", "queue_mean", "ifm_weight")  # what is kept of each epoch of the log


def readouts(network, folder, size, seed, bits, device):
    """{reading: {factor: {"accuracy": percent, "converged": bool}}} of Trifeature's held-out images.

    network: from images with `bits` random channels of the run `seed` to features, N x d, in eval mode on
    `device`. Without bits there is one reading, "own". Bits that differ between images are noise to a linear
    classifier of anything else; with the same bits for all it reads what the network keeps of the pictures.
    DivergedError for features that are not finite.
    """
    labeled = {factor: labeled_folders(folder, factor) for factor in FACTORS}
    train, val, _ = next(iter(labeled.values()))  # the same images for all factors
    found = {}
    for reading in READINGS if bits else READINGS[:1]:
        parts = (TRAIN_AGAIN, HELD_OUT_AGAIN) if reading == "redrawn" else (TRAIN, HELD_OUT)
        features = []
        for images, part in zip((train, val), parts, strict=True):
            values = bits_of(seed, part, range(len(images)), bits)
            if reading == "shared":
                values = bits_of(seed, TRAIN, [0], bits).expand_as(values)
            features.append(features_of(network, images, size, device, values))
        found[reading] = {}
        for factor, (train, val, classes) in labeled.items():
            targets, held_out = (torch.as_tensor(targets_of(images)) for images in (train, val))
            groups = torch.tensor(train.targets)  # renders of a combination stay together
            readout = read_out(features[0], targets, groups, features[1], held_out, len(classes))
            found[reading][factor] = {name: readout[name] for name in ("accuracy", "converged")}
    return found


@torch.no_grad()
def features_of(network, images, size, device, values):
    """Features (N, d) of the central views of an ImageFolder's N images, float32 on the CPU.

    values: (N, B), those of the further channels. DivergedError for features that are not finite.
    """
    parts = []
    for batch in ValidationLoader(images, size=size, batch_size=BATCH, device=device):
        views = with_channels(normalize(batch.pixels[0]), values[batch.indices])
        parts.append(network(views).float().cpu())
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise DivergedError(
            "a feature is not finite: these weights cannot be measured; train with a lower --lr"
        )
    return features


@torch.no_grad()
def contrastive_losses(model, run, folder, device):
    """(InfoNCE of views of the training images, the same where the key has the random bits of another image),
    in nats; the second is None without bits. If the second is no higher, the bits have not been learned.

    model: a MoCo in eval mode, with the queue of its checkpoint; run: the flags of its training. The views
    are of the epoch after the last, which training did not see.
    """
    images, recipe = image_folder(folder, "train"), pretraining(run.aug_plus, run.crops_only)
    sizes = {"size": run.image_size, "batch_size": run.batch_size}
    loader = TrainLoader(images, recipe, seed=run.seed, resize=run.resize, device=device, **sizes)
    augment = DeviceAugment(recipe, device, photometric=False)
    augment = RandomBits(run.random_bits, run.seed, augment, per_view=run.bits_per == "view")
    matched, mismatched = [], []

    def losses(q, k):
        q, k = F.normalize(model.encoder_q(q), dim=1), F.normalize(model.encoder_k(k), dim=1)
        return contrast(q, k, model.queue, model.T, (1.0, 0.0))[2]

    for batch in loader.epoch(run.epochs):
        im_q, im_k = augment(batch)
        matched.append(losses(im_q, im_k))
        other = torch.cat([im_k[:, :3], im_k[:, 3:].roll(1, dims=0)], dim=1)
        differ = (other != im_k).flatten(1).any(dim=1)
        mismatched.append(losses(im_q, other)[differ])
    means = [torch.cat(each).mean().item() for each in (matched, mismatched)]
    return means[0], means[1] if run.random_bits else None


def course_of(path):
    """{name of COURSE: its mean in each epoch, a list} of the log.jsonl beside a checkpoint, without what it
    lacks. Without --method the loss is InfoNCE.
    """
    entries = map(json.loads, (Path(path).parent / "log.jsonl").read_text().splitlines())
    epochs = {entry["epoch"]: entry for entry in entries if entry["kind"] == "epoch"}  # of two the later
    epochs = [{"info_nce": epochs[number]["loss"]} | epochs[number] for number in sorted(epochs)]
    return {
        name: [value and float(f"{value:.5g}") for value in (epoch.get(name) for epoch in epochs)]
        for name in COURSE
        if name in epochs[-1]
    }


def measure(folder, run, pretrained, device):
    """What is recorded of a run with these flags: a dict (README.md). pretrained: its last checkpoint, beside
    its log, or "" for the network that it starts from.
    """
    torch.manual_seed(run.seed)
    encoder = base_encoder(run.arch, run.random_bits, run.stem, run.image_size)
    head = {"mlp": run.mlp, "bn_splits": run.bn_splits}
    model = MoCo(encoder, run.moco_dim, run.moco_k, run.moco_m, run.moco_t, **head)
    found = {}
    if pretrained:
        load_strictly(model, read(pretrained)["state_dict"], pretrained)
    model.to(device).eval()
    if pretrained:
        matched, mismatched = contrastive_losses(model, run, folder, device)
        found["course"] = course_of(pretrained)
        training = found["course"]["info_nce"][-1]
        found["loss"] = {"training": training, "matched": matched, "mismatched": mismatched}
    network = copy.deepcopy(model.encoder_q)
    replace_layer(network, model.head, nn.Identity())
    own = run.image_size, run.seed, run.random_bits
    return found | {"readout": readouts(network, folder, *own, device)}


def main():
    parser = Parser(
        prog="python -m moco.shortcuts.measure",
        usage="python -m moco.shortcuts.measure OUT.json DATA [--pretrained CKPT] [flags of main_moco.py]",
        description="Read Trifeature's factors from frozen features by a linear classifier, compare the loss "
        "with that of mismatched random bits, and write both as JSON. The flags of main_moco.py are those of "
        "the run.",
        allow_abbrev=False,
    )
    parser.add_argument("out", metavar="OUT.json", help="file to write")
    parser.add_argument("data", metavar="DATA", help="folder of Trifeature, with train/ and val/")
    parser.add_argument(
        "--pretrained",
        metavar="CKPT",
        default="",
        help="checkpoint of the run, beside its log.jsonl (default: the network that it starts from)",
    )
    args, others = parser.parse_known_args()
    interrupt_on_signals()

    run = options.pretraining([args.data, *others])
    if run.seed is None:
        raise UserError("give the --seed of the run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.resolve(run, device)
    found = measure(args.data, run, args.pretrained, device)
    found |= {name: value for name, value in machine(device).items() if name != "command"}
    for reading, factors in found["readout"].items():
        words = [f"{factor} {readout['accuracy']:.2f} %" for factor, readout in factors.items()]
        print(f"{reading} bits: {', '.join(words)} (chance 10 %)")
    with atomic_file(args.out) as temporary:
        temporary.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_program(main, "python -m moco.shortcuts.measure")
