"""Linear readouts of a frozen encoder, and the plain InfoNCE loss that it reached, as JSON.

python -m moco.shortcuts.measure OUT.json DATA --pretrained checkpoint_0011.pth.tar
python -m moco.shortcuts.measure OUT.json DATA -a resnet18 --image-size 32 --seed 0   (an untrained encoder)
"""

import argparse
import json
import math
import signal
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moco import options
from moco.builder import MoCo
from moco.data.augment import pretraining
from moco.data.device import normalize
from moco.data.experiments import HELD_OUT, TRAIN, RandomBits, bits_of, with_channels
from moco.data.folders import image_folder, labelled_folders, targets_of
from moco.data.loader import TrainLoader, ValidationLoader
from moco.encoders import base_encoder
from moco.errors import DivergedError, UserError, run_program
from moco.files import atomic_file
from moco.losses import rank_accuracy
from moco.run import checkpoint as checkpoints
from moco.run.log import machine
from moco.seeds import STEP, fold, shuffle_order
from moco.shortcuts.probe import read_out
from moco.trifeature import FACTORS, SETTINGS

OWN, SHARED = (
    "readout",
    "readout_shared_bits",
)  # how images are read: with their own random bits, or one image's
DIVERGED = "{} is not finite: these weights cannot be measured; train with a lower --lr"


def measure(folder, device, network, settings):
    """Linear readouts of the images in `folder`: {OWN: {factor: readout}}, with random bits also SHARED.

    A readout is `probe.read_out`'s dict with the accuracy at `chance`; factors are Trifeature's, or "class"
    of other images. Random bits that differ between images are noise to a linear classifier of anything else:
    with the bits of the first training image for all (SHARED) it reads what the network keeps of the images.
    settings: those of the run, of which image_size, seed and random_bits count. DivergedError for non-finite
    features.
    """
    found = {OWN: _readouts(folder, device, network, settings)}
    if settings["random_bits"]:
        found[SHARED] = _readouts(folder, device, network, settings, shared=True)
    return found


def _readouts(folder, device, network, settings, shared=False):
    seed, count = settings["seed"], settings["random_bits"]

    def bits(part, indices):
        if shared:
            return bits_of(seed, TRAIN, [0], count).expand(len(indices), -1)
        return bits_of(seed, part, indices.tolist(), count)

    readouts, features = {}, None
    for factor in FACTORS if (Path(folder) / SETTINGS).is_file() else ["class"]:
        train, val, classes = labelled_folders(folder, None if factor == "class" else factor)
        features = features or [
            features_of(
                network, images, settings["image_size"], device, partial(bits, part) if count else None
            )
            for images, part in ((train, TRAIN), (val, HELD_OUT))
        ]
        if not all(part.isfinite().all() for part in features):
            raise DivergedError(DIVERGED.format("a feature"))
        targets, held_out = (torch.as_tensor(targets_of(images)) for images in (train, val))
        # Renders of a combination stay together; of one class all images would, so there each is its own.
        groups = torch.arange(len(targets)) if factor == "class" else torch.tensor(train.targets)
        readout = read_out(features[0], targets, groups, features[1], held_out, len(classes))
        readouts[factor] = readout | {"chance": 100 / len(classes)}
    return readouts


def features_of(network, images, size, device, bits=None):
    """Pooled features (N, d) of central views in evaluation mode, float64 on the CPU; `fc` is left out.

    images: an ImageFolder of N; bits: callable (indices) -> their bits, for a network with random bits.
    """
    head, network.fc = network.fc, nn.Identity()
    network.eval()
    parts = []
    with torch.no_grad():
        for batch in ValidationLoader(images, size=size, batch_size=256, workers=0, device=device):
            views = normalize(batch.pixels[0])
            if bits is not None:
                views = with_channels(views, bits(batch.indices))
            parts.append(network(views).double().cpu())
    network.fc = head
    return torch.cat(parts)


def info_nce_after_training(model, folder, settings, device):
    """InfoNCE in nats, and its accuracy in percent, over an epoch of training pairs that changes no weight.

    It is the epoch that would come next, with the views that it would have, in the run's own arrangement
    (shuffled BatchNorm over groups, a queue that moves on), at a learning rate of 0 and a key momentum of 1:
    so it means the same for every epsilon, whose own training loss has the perturbation in it. New keys come
    from the key encoder as it was at the end, while in training old keys are of older weights and easier to
    tell apart: so also without IFM this is not the training loss. BatchNorm's running statistics and the
    queue of `model` (a MoCo) change. DivergedError for a non-finite loss.
    """
    seed, epoch = settings["seed"], settings["epochs"]
    loader = TrainLoader(
        image_folder(folder, "train"),
        pretraining(settings["aug_plus"], settings["crops_only"]),
        size=settings["image_size"],
        batch_size=settings["batch_size"],
        seed=seed,
        resize=settings["resize"],
        workers=0,
        device=device,
    )

    def views_of(batch):
        return [normalize(view) for view in batch.pixels]

    if settings["random_bits"]:
        views_of = RandomBits(settings["random_bits"], seed, views_of)
    model.train()
    model.m = 1.0
    total, right, images = 0.0, 0.0, 0
    for step, batch in enumerate(loader.epoch(epoch)):
        im_q, im_k = views_of(batch)
        torch.manual_seed(fold(seed, STEP, epoch, step, 0))
        with torch.no_grad():
            order = shuffle_order(seed, epoch, step, len(im_q))
            loss, ranks, *_ = model(im_q, im_k, weights=(1.0, 0.0), order=order)
        total += float(loss) * len(ranks)
        right += float(rank_accuracy(ranks)[0]) * len(ranks)
        images += len(ranks)
    if not math.isfinite(total):
        raise DivergedError(DIVERGED.format("the InfoNCE loss"))
    return total / images, right / images


def untrained_encoder(arch, moco_dim, seed, random_bits, **_):
    """The query encoder that a run with these settings starts from, but for the layers of its head."""
    torch.manual_seed(seed)
    return base_encoder(arch, random_bits)(num_classes=moco_dim)


def trained_model(checkpoint, path):
    """The MoCo of a checkpoint of main_moco.py, on the CPU."""
    settings = checkpoint["settings"]
    names = ("moco_dim", "moco_k", "moco_m", "moco_t", "mlp")
    construct = base_encoder(checkpoint["arch"], settings["random_bits"])
    model = MoCo(construct, *(settings[name] for name in names), bn_splits=settings["bn_splits"])
    checkpoints.load_strictly(model, checkpoint["state_dict"], path)
    return model


def last_epoch(path):
    """The last epoch in the log.jsonl beside a checkpoint: its training loss and accuracy, as a dict."""
    lines = (Path(path).parent / "log.jsonl").read_text().splitlines()
    entry = [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch" and "loss" in entry][-1]
    return {"training": entry["loss"], "training_acc1": entry["acc1"]}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.shortcuts.measure",
        usage="python -m moco.shortcuts.measure OUT.json DATA (--pretrained CKPT | flags of main_moco.py)",
        description="Read Trifeature's factors, or the classes of other images, from frozen features by a "
        "linear classifier, and write the result as JSON: of a checkpoint, with its InfoNCE loss, or of the "
        "untrained encoder that main_moco.py starts from with these flags.",
        allow_abbrev=False,
    )
    parser.add_argument("out", metavar="OUT.json", help="file to write")
    parser.add_argument("data", metavar="DATA", help="folder with train/ and val/")
    parser.add_argument(
        "--pretrained", metavar="CKPT", help="checkpoint of main_moco.py, beside its log.jsonl"
    )
    args, others = parser.parse_known_args()
    if args.pretrained and others:
        raise UserError(f"a checkpoint says how it was trained: leave out {' '.join(others)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind then, too

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.pretrained:
        checkpoint = checkpoints.read(args.pretrained)
        if "settings" not in checkpoint:
            raise UserError(
                f"{args.pretrained} does not say how it was trained; give a checkpoint of main_moco.py"
            )
        settings = checkpoint["settings"]
        model = trained_model(checkpoint, args.pretrained).to(device)
        found = measure(args.data, device, model.encoder_q, settings)
        loss, accuracy = info_nce_after_training(model, args.data, settings, device)
        found["losses"] = {"info_nce": loss, "info_nce_acc1": accuracy, **last_epoch(args.pretrained)}
    else:
        settings = vars(options.pretraining([args.data, *others]))
        found = measure(args.data, device, untrained_encoder(**settings).to(device), settings)
    found |= {name: value for name, value in machine(device).items() if name != "command"}
    for factor, readout in found[OWN].items():
        note = "" if readout["converged"] else "; NOT converged"
        print(f"{factor}: {readout['accuracy']:.2f} % (chance {readout['chance']:.2f}){note}")
    with atomic_file(args.out) as temporary:
        temporary.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_program(main, "python -m moco.shortcuts.measure")
