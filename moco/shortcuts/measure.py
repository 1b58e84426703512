"""Linear readouts of a frozen encoder, as JSON: of a checkpoint of main_moco.py, or of the untrained network.

python -m moco.shortcuts.measure OUT.json DATA [--pretrained CKPT] [flags of main_moco.py, as of the run]
"""

import json
from pathlib import Path

import torch

from moco import options
from moco.data.device import normalize
from moco.data.experiments import HELD_OUT, TRAIN, bits_of, with_channels
from moco.data.folders import labeled_folders, targets_of
from moco.data.loader import ValidationLoader
from moco.encoders import backbone, base_encoder
from moco.errors import DivergedError, Parser, UserError, interrupt_on_signals, run_program
from moco.files import atomic_file
from moco.run.backbone import load_encoder
from moco.run.checkpoint import read
from moco.run.log import machine
from moco.shortcuts.probe import read_out
from moco.trifeature import FACTORS, SETTINGS

OWN, SHARED = "readout", "readout_shared_bits"  # each image with its own random bits; all with those of one
BATCH = 256


def readouts(folder, device, network, size, seed, random_bits, gray_range=None):
    """Linear readouts of the images in `folder`: {OWN: {factor: readout}}, with random bits also SHARED.

    A readout is `probe.read_out`'s dict with the accuracy at `chance`; factors are Trifeature's, or "class"
    of other images. network: images with `random_bits` channels of the run `seed`, to features, N x d.
    Random bits that differ between images are noise to a linear classifier of anything else: with the bits of
    the first training image for all (SHARED) it reads what the network keeps of the images. DivergedError for
    non-finite features.
    """
    is_trifeature = (Path(folder) / SETTINGS).is_file()
    factors = FACTORS if is_trifeature else [None]
    labeled = {factor or "class": labeled_folders(folder, factor) for factor in factors}
    images_of = next(iter(labeled.values()))[:2]  # the same images for all factors
    found = {}
    for reading in (OWN, SHARED) if random_bits else (OWN,):
        features = []
        for images, part in zip(images_of, (TRAIN, HELD_OUT), strict=True):
            bits = bits_of(seed, part, range(len(images)), random_bits)
            if reading == SHARED:
                bits = bits_of(seed, TRAIN, [0], random_bits).expand_as(bits)
            features.append(features_of(network, images, size, device, bits, gray_range))
        found[reading] = {}
        for name, (train, val, classes) in labeled.items():
            targets, held_out = (torch.as_tensor(targets_of(images)) for images in (train, val))
            # Renders of a combination stay together; of one class all images would, so there each is its own.
            groups = torch.tensor(train.targets) if is_trifeature else torch.arange(len(targets))
            readout = read_out(features[0], targets, groups, features[1], held_out, len(classes))
            found[reading][name] = readout | {"chance": 100 / len(classes)}
    return found


@torch.no_grad()
def features_of(network, images, size, device, bits, gray_range=None):
    """Features (N, d) of the central views of an ImageFolder's N images, float32 on the CPU.

    network: in evaluation mode; bits: (N, B), its further channels. DivergedError for non-finite features.
    """
    parts = []
    settings = {"size": size, "batch_size": BATCH, "device": device, "gray_range": gray_range}
    for batch in ValidationLoader(images, **settings):
        views = with_channels(normalize(batch.pixels[0]), bits[batch.indices])
        parts.append(network(views).float().cpu())
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise DivergedError(
            "a feature is not finite: these weights cannot be measured; train with a lower --lr"
        )
    return features


def untrained_encoder(encoder, moco_dim, seed):
    """What a run with this base_encoder and seed starts from: images to features, in evaluation mode."""
    torch.manual_seed(seed)
    return backbone(encoder, num_classes=moco_dim).eval()


def last_epoch(path):
    """The training loss and accuracy of the last epoch in the log.jsonl beside a checkpoint, as a dict."""
    entries = map(json.loads, (Path(path).parent / "log.jsonl").read_text().splitlines())
    last = [entry for entry in entries if entry["kind"] == "epoch"][-1]
    return {"training": last["loss"], "training_acc1": last["acc1"]}


def main():
    parser = Parser(
        prog="python -m moco.shortcuts.measure",
        usage="python -m moco.shortcuts.measure OUT.json DATA [--pretrained CKPT] [flags of main_moco.py]",
        description="Read Trifeature's factors, or the classes of other images, from frozen features by a "
        "linear classifier, and write the result as JSON. The flags of main_moco.py are those of the run.",
        allow_abbrev=False,
    )
    parser.add_argument("out", metavar="OUT.json", help="file to write")
    parser.add_argument("data", metavar="DATA", help="folder with train/ and val/")
    parser.add_argument(
        "--pretrained",
        metavar="CKPT",
        help="checkpoint of the run, beside its log.jsonl (default: the encoder that it starts from)",
    )
    args, others = parser.parse_known_args()
    interrupt_on_signals()

    run = options.pretraining([args.data, *others])
    if run.seed is None:
        raise UserError("give the --seed of the run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = base_encoder(run.arch, run.random_bits, run.stem, run.image_size)
    network, found = untrained_encoder(encoder, run.moco_dim, run.seed), {}
    if args.pretrained:
        load_encoder(network, read(args.pretrained), args.pretrained, run.arch)
        found["losses"] = last_epoch(args.pretrained)
    own = run.image_size, run.seed, run.random_bits, run.gray_range
    found |= readouts(args.data, device, network.to(device), *own)
    found |= {name: value for name, value in machine(device).items() if name != "command"}
    for factor, readout in found[OWN].items():
        note = "" if readout["converged"] else "; NOT converged"
        print(f"{factor}: {readout['accuracy']:.2f} % (chance {readout['chance']:.2f}){note}")
    with atomic_file(args.out) as temporary:
        temporary.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_program(main, "python -m moco.shortcuts.measure")
