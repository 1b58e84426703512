"""What an encoder is worth: linear readouts of its frozen features, and the plain InfoNCE loss it reached.

python -m moco.measure DATA OUT.json --pretrained checkpoint_0011.pth.tar
python -m moco.measure DATA OUT.json --untrained -a resnet18 --image-size 32 --seed 0
"""

import argparse
import json
import math
import signal
from dataclasses import asdict

from moco.errors import UserError, run_program
from moco.factors import AS_FOLDERS, factors_of
from moco.files import atomic_file
from moco.sweep import DIVERGED

SHARED = "readout_shared_bits"  # the second reading of an encoder with random bits
RENEWED = "readout_renewed"  # the second reading of one whose BatchNorm got statistics of what is read
NAMES = {SHARED: "shared bits", RENEWED: "renewed statistics"}


def measure(folder, factors, device, checkpoint=None, path=None, read=None, renew=False, **untrained):
    """A dict of the `readout` of each factor (moco.readout.Readout's fields) and, of a checkpoint, `losses`.

    Losses are those of the images in `folder`; readouts too, unless there is a folder `read` of others.

    An encoder with random bits is read twice: with each image's own, and with those of the first training
    image for all (SHARED), since bits that differ between images are noise to a linear classifier. renew:
    read once more (RENEWED) after `renew_statistics`.

    checkpoint: what read_checkpoint gave for `path`, of main_moco.py in one process; without one the encoder
    is what a run with arch, image_size, moco_dim, seed and random_bits in `untrained` starts from.
    Everything is a function of these, the number of threads and the machine.
    """
    from moco.bench_report import machine
    from moco.plain_loss import plain_loss
    from moco.recolor import check_white
    from moco.versions import versions

    settings = checkpoint["settings"] if checkpoint else untrained
    if renew and settings.get("random_bits", 0):
        raise UserError("--renew-statistics does not go with random bits; leave it out")
    if settings.get("recolor"):
        check_white(folder)
    model = _model(checkpoint, path, settings)
    model.to(device)
    encoder = model.encoder_q if checkpoint else model
    read = read or folder
    result = {"readout": _readouts(read, factors, encoder, settings, device)}
    if settings.get("random_bits", 0):
        result[SHARED] = _readouts(read, factors, encoder, settings, device, shared=True)
    if renew:
        _renew(encoder, read, factors[0], settings, device)
        result[RENEWED] = _readouts(read, factors, encoder, settings, device)
    if checkpoint:
        log = checkpoint["log"]
        means = {name: float(total) / count for name, (total, count) in log.items()}
        loss, accuracy = plain_loss(model, folder, settings, device)
        _check_finite(math.isfinite(loss), "the plain loss")
        result["losses"] = {
            "training": means["Loss"],
            "training_acc1": means["Acc@1"],
            "info_nce": loss,
            "info_nce_acc1": accuracy,
        }
    result |= {"versions": versions(), "hardware": machine(device)}
    return result


def features(encoder, images, size, device, bits=None):
    """Pooled features (N, d) of central views, float64 on the CPU, in evaluation mode; `fc` is left out.

    images: an ImageFolder of N; bits: (N, B), of each image, for an encoder with random bits.
    """
    import torch
    from torch import nn

    from moco.data import Loading
    from moco.distributed import Process
    from moco.random_bits import with_channels
    from moco.views import normalise

    head, encoder.fc = encoder.fc, nn.Identity()
    encoder.eval()
    parts, done = [], 0
    with torch.no_grad():
        for batch in Loading(size, "pil", 256, 0).validation(images, Process.alone(device)):
            views = normalise(batch.pixels[0])
            if bits is not None:
                views = with_channels(views, bits[done : done + len(views)])
            parts.append(encoder(views).double().cpu())
            done += len(views)
    encoder.fc = head
    return torch.cat(parts)


def _renew(encoder, folder, factor, settings, device):
    """`renew_statistics` of the training images that are read."""
    from moco.data import labelled_folders
    from moco.renewal import renew_statistics

    train, _, _ = labelled_folders(folder, None if factor == AS_FOLDERS else factor)
    renew_statistics(encoder, train, settings["image_size"], device)


def _model(checkpoint, path, settings):
    """The MoCo of a checkpoint, or an untrained encoder, on the CPU."""
    import torch

    from moco.builder import MoCo
    from moco.checkpoint import load_strictly
    from moco.encoders import base_encoder
    from moco.random_bits import with_input_channels

    arch = checkpoint["arch"] if checkpoint else settings["arch"]
    construct = with_input_channels(base_encoder(arch), settings.get("random_bits", 0))
    torch.manual_seed(settings["seed"])
    if not checkpoint:
        return construct(num_classes=settings["moco_dim"])  # torchvision draws convolutions after the head
    names = ("moco_dim", "moco_k", "moco_m", "moco_t", "mlp")
    model = MoCo(construct, *(settings[name] for name in names), bn_splits=settings["bn_splits"])
    load_strictly(model, checkpoint["state_dict"], path)
    return model


def both_readings(result):
    """{factor: readout} of what `measure` gave, of a second reading with its name after the factor's."""
    return result.get("readout", {}) | {
        f"{factor} ({NAMES[reading]})": readout
        for reading in NAMES
        for factor, readout in result.get(reading, {}).items()
    }


def _readouts(folder, factors, encoder, settings, device, shared=False):
    import torch

    from moco.data import labelled_folders
    from moco.random_bits import HELD_OUT, TRAIN, bits_of
    from moco.readout import read_out

    size, count, seed = settings["image_size"], settings.get("random_bits", 0), settings["seed"]

    def known_of(images, part):
        bits = None
        if count and shared:
            bits = bits_of(seed, TRAIN, [0], count).expand(len(images), -1)
        elif count:
            bits = bits_of(seed, part, range(len(images)), count)
        return features(encoder, images, size, device, bits)

    readouts, known = {}, None
    for factor in factors:
        factor_name = None if factor == AS_FOLDERS else factor
        train, val, classes = labelled_folders(folder, factor_name)
        if known is None:
            known = known_of(train, TRAIN), known_of(val, HELD_OUT)
            _check_finite(all(part.isfinite().all() for part in known), "a feature")
        targets, held_out = map(_labels, (train, val))  # each numbers its combinations by itself
        # Renders of a combination stay together; of one class all images would, so there each is its own.
        groups = torch.tensor(train.targets) if factor_name else torch.arange(len(targets))
        readout = read_out(known[0], targets, groups, known[1], held_out, classes)
        readouts[factor] = asdict(readout) | {"chance": 100 / classes}
    return readouts


def _check_finite(fine, what):
    if not fine:  # the loss of the last step was, but its update was not
        raise UserError(f"{what} {DIVERGED}: these weights cannot be measured; train with a lower --lr")


def _labels(images):
    import torch

    return torch.tensor([(images.target_transform or int)(target) for target in images.targets])


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.measure",
        description="Read the classes of images, or Trifeature's factors, from frozen features by a linear "
        "classifier, and write the result as JSON; of a checkpoint of main_moco.py with its InfoNCE loss.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with train/ and val/")
    add("out", metavar="OUT.json", help="file to write")
    add("--read", metavar="DIR", help="read from these images instead; losses are of those in DATA")
    add("--renew-statistics", action="store_true",
        help="also read with BatchNorm's statistics of the training images that are read")  # fmt: skip
    add("--pretrained", metavar="CKPT", help="checkpoint of main_moco.py")
    add("--untrained", action="store_true", help="instead: what a run starts from, by the flags below")
    add("-a", "--arch", default="resnet18", help="(default: %(default)s)")
    add("--image-size", type=int, default=32, metavar="S", help="(default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--moco-dim", type=int, default=128, metavar="C", help="(default: %(default)s)")
    add("--random-bits", type=int, default=0, metavar="B", help="(default: %(default)s)")
    add("--factors", nargs="+", metavar="NAME", help="of Trifeature, or class (default: all there are)")
    args = parser.parse_args()
    if bool(args.pretrained) == args.untrained:
        raise UserError("give either --pretrained CKPT or --untrained")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind then, too

    import torch

    from moco.checkpoint_reader import read_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = read_checkpoint(args.pretrained) if args.pretrained else None
    if checkpoint and not {"settings", "log"} <= checkpoint.keys():
        raise UserError(f"{args.pretrained} does not say how it was trained; main_moco.py's checkpoints do")
    untrained = {n: getattr(args, n) for n in ("arch", "image_size", "moco_dim", "seed", "random_bits")}
    factors = args.factors or factors_of(args.read or args.data)
    found = measure(
        args.data, factors, device, checkpoint, args.pretrained, args.read, args.renew_statistics, **untrained
    )
    for name, readout in both_readings(found).items():
        note = "" if readout["converged"] else "; NOT converged"
        print(f"{name}: {readout['accuracy']:.2f} % (chance {readout['chance']:.2f}), weight decay "
              f"{readout['weight_decay']:g}{note}")  # fmt: skip
    if "losses" in found:
        print(f"InfoNCE {found['losses']['info_nce']:.4f}, {found['losses']['info_nce_acc1']:.2f} % first")
    with atomic_file(args.out) as temporary:
        temporary.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_program(main)
