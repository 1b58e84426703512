"""The flags of both programs: names, defaults, bounds, and what contradicts what.

Names and defaults are those of the published programs (MoCo, IFM), where these have the flag.
"""

import argparse
import importlib.util
import math
import os
import re
import textwrap
from pathlib import Path

import torch

from moco import losses
from moco.errors import Parser, UserError, first_line

# Flags that say where and how a run is carried out, not what it computes. All others are its settings.
NOT_SETTINGS = (
    "images",
    *("folder", "dataset_root", "dataset", "workers", "cache", "output_dir", "overwrite", "pretrained"),
    *("resume", "evaluate", "keep", "save_freq", "print_freq", "knn", "tensorboard", "start_epoch", "fast"),
    *("rank", "gpu", "multiprocessing_distributed", "world_size", "dist_url", "dist_backend"),
    "local_rank",
)
_WEIGHTS = "a checkpoint, a released model, torchvision or timm (default: untrained)"  # of --pretrained


def pretraining(arguments=None):
    """The flags of main_moco.py from `arguments` (default: the command line). Raises UserError."""
    parser = _Parser("Pre-train an encoder without labels by momentum contrast, with or without IFM.")
    add = _add_data(parser, "folder of images: those of DIR/train, or without it all below DIR")
    add(
        "--images",
        metavar="LIST",
        help="instead of DIR: a text file with the path of an image in each line, relative to its folder",
    )
    add = parser.add_argument_group("MoCo (v2 is --mlp --moco-t 0.2 --aug-plus --cos)").add_argument
    add("--moco-dim", type=_at_least(1), default=128, help="length of a feature")
    add("--moco-k", type=_at_least(1), default=65536, help="keys in the queue: fewer than images")
    add("--moco-m", type=_between(0, 1), default=0.999, help="momentum of the key encoder")
    add("--moco-t", type=_above_0, default=0.07, help="softmax temperature")
    add("--mlp", action="store_true", help="MoCo v2's head: a hidden layer before the last")
    add("--aug-plus", action="store_true", help="MoCo v2's augmentation, with blur")
    add("--crops-only", action="store_true", help="only crop and flip, where color is to be learned")
    add("--cos", action="store_true", help="cosine learning rate instead of --schedule")
    add("--bn-splits", type=_at_least(1), default=1, help="BatchNorm groups of a batch: use 8 on one GPU")
    add = parser.add_argument_group("implicit feature modification (IFM)").add_argument
    add("--method", choices=("ifm", "ifm_only"), help="InfoNCE and its perturbed form, or the latter alone")
    add("--epsilon", type=_at_least(0, float), help="by how much cosines are perturbed (default: 0.1)")
    add("--alpha", type=_at_least(0, float), help="weight of the perturbed loss of ifm (default: 1.0)")
    add = _add_training(parser, epochs=200, schedule=[120, 160], weight_decay=1e-4)
    add("--lr", "--learning-rate", type=_above_0, default=0.03, help="scale it with --batch-size")
    _add_speed(parser)
    add = _add_run(parser, "log.jsonl is always written")
    add("--pretrained", default="", metavar="X", help=f"start from the weights of X: {_WEIGHTS}")
    add("--keep", type=_at_least(1), default=1, help="keep the checkpoints of the N newest epochs")
    add("--save-freq", type=_at_least(0), default=0, help="and of every N-th epoch; 0: of none")
    add("--knn", type=_at_least(0), default=0, help="kNN accuracy on val/ every N epochs; 0: never")
    add("--tensorboard", action="store_true", help="write TensorBoard's files too")
    _add_processes(parser)
    add = parser.add_argument_group("experiments").add_argument
    add("--random-bits", type=_between(0, 63, int), default=0, help="N random bits per image as channels")
    add("--bits-per", choices=("image", "view"), default="image", help="view: drawn anew for each view")
    add(
        "--match-ifm",
        action="store_true",
        help="train InfoNCE, its loss multiplied in each step by what --method would give as ifm_factor",
    )
    add("--recolor", action=_Removed, advice="vary the data or use --crops-only")
    args = parser.parse_args(arguments)

    _take_folder(args, "--schedule", args.schedule)
    _check(args)
    if args.images is not None:
        if args.folder or args.dataset_root or args.dataset != parser.get_default("dataset"):
            raise UserError("--images takes the place of DIR, --dataset_root and --dataset; give one of them")
        if args.knn:
            raise UserError("--knn needs labels, which a list of --images does not have; leave --knn out")
    if args.method is None and (args.epsilon is not None or args.alpha is not None):
        raise UserError("--epsilon and --alpha belong to IFM; add --method ifm, or leave them out")
    if args.method == "ifm_only" and args.alpha is not None:
        raise UserError("--alpha is the weight of ifm's second loss; ifm_only has one loss: leave it out")
    if args.method:
        args.epsilon = 0.1 if args.epsilon is None else args.epsilon
        args.alpha = 1.0 if args.alpha is None else args.alpha
    if args.match_ifm and not args.method:
        raise UserError("--match-ifm needs the --method whose factor it takes; add --method ifm or ifm_only")
    if args.crops_only and args.aug_plus:
        raise UserError("--crops-only leaves out what --aug-plus adds; give one of the two")
    if args.bits_per == "view" and not args.random_bits:
        raise UserError("--bits-per view is of --random-bits N: add that, or leave --bits-per out")
    if args.random_bits and args.pretrained:
        raise UserError(
            "--random-bits adds channels of which --pretrained has no weights; leave one of them out"
        )
    if args.random_bits and args.knn:
        raise UserError("--knn evaluates images without --random-bits; leave one of them out")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")
    return args


def linear_evaluation(arguments=None):
    """The flags of main_lincls.py from `arguments` (default: the command line). Raises UserError."""
    parser = _Parser("Train a linear classifier on the frozen features of a pre-trained encoder.")
    _add_data(parser, "has train/ and val/, and in each a folder per class")
    add = parser.add_argument_group("linear evaluation").add_argument
    add("--pretrained", default="", metavar="X", help=f"evaluate the weights of X: {_WEIGHTS}")
    add("-e", "--evaluate", action="store_true", help="validate the classifier of --resume and stop")
    add(
        "--target", choices=("shape", "texture", "color"), help="factor of Trifeature (default: class folder)"
    )
    add = _add_training(parser, epochs=100, schedule=[60, 80], weight_decay=0.0)
    add(
        "--lr",
        "--learning-rate",
        type=_or_folder(_above_0),
        nargs="+",
        default=[30.0],
        metavar="X",
        help="learning rate; of several, each trains a classifier in the same pass, and the best is kept",
    )
    _add_speed(parser)
    _add_run(parser, "linear.jsonl and linear.json are always written")
    _add_processes(parser)
    args = parser.parse_args(arguments)

    _take_folder(args, "--schedule", args.schedule)
    _take_folder(args, "--lr/--learning-rate", args.lr)
    for lr in args.lr:
        if args.lr.count(lr) > 1:
            raise UserError(f"argument --lr/--learning-rate: {lr:g} is given twice; give each value once")
    _check(args)
    if args.evaluate and not args.resume:
        raise UserError("--evaluate needs the classifier to validate: --resume model_best.pth.tar")
    return args


def resolve(args, device):
    """Fill in flags whose default depends on the device. Raises UserError for what the device cannot do."""
    on_cuda = device.type == "cuda"
    if args.fast:
        args.amp = args.amp or ("bf16" if on_cuda else None)
        if args.channels_last is None:  # on a CPU BatchNorm groups are slower in this layout
            args.channels_last = on_cuda or getattr(args, "bn_splits", 1) == 1
        if args.compile is None:
            args.compile = on_cuda
    args.channels_last, args.compile = bool(args.channels_last), bool(args.compile)
    args.device_aug = args.device_aug or ("exact" if on_cuda else "off")
    args.resize = args.resize or ("pil" if args.device_aug == "off" else "torch")

    if args.amp and not on_cuda:
        raise UserError(f"--amp {args.amp} needs a GPU: on a CPU float32 is faster; leave --amp out")
    if args.amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; use --amp fp16, also with --fast")
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # of a compiler, a linker, a driver, or their absence
            raise UserError(
                f"--compile does not work here ({first_line(error)}); it needs a C++ compiler (apt install "
                "g++), on a GPU also Triton; leave it out, with --fast by --no-compile"
            ) from error


def speed(args, device):
    """A clause on precision, memory format and compilation, after `resolve`."""
    with autocast(args, device):
        clause = f"encoders in {precision(device)}"
    return clause + ", channels_last" * args.channels_last + ", compiled" * args.compile


def precision(device):
    """How encoders' products are computed, as torch is set at this moment: "float32, TF32 convolutions"."""
    if torch.is_autocast_enabled(device.type):
        return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
    tf32 = []
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        backends = {"convolutions": torch.backends.cudnn.conv, "matrices": torch.backends.cuda.matmul}
        tf32 = [name for name, backend in backends.items() if backend.fp32_precision == "tf32"]
    return "float32" + f", TF32 {' and '.join(tf32)}" * bool(tf32)


def autocast(args, device):
    """The context of a forward pass: encoders compute in --amp, and the rest asks for float32 itself."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[args.amp]
    return torch.autocast(device.type, dtype, enabled=args.amp is not None)


def prepare(args, *encoders):
    """Apply --channels-last and --compile to networks in place; names and values of their tensors stay."""
    for encoder in encoders:
        if args.channels_last:
            encoder.to(memory_format=torch.channels_last)
        if args.compile:
            encoder.compile()


def processes(args):
    """The flags on processes as the keywords of moco.run.launch.launch."""
    return {
        "nodes": args.world_size,
        "node_rank": args.rank,
        "url": args.dist_url,
        "backend": args.dist_backend,
        "spawn": args.multiprocessing_distributed,
        "gpu": args.gpu,
        "local_rank": args.local_rank,
    }


def settings(args, seed):
    """The flags that decide what is computed, as plain values by name, after `resolve`."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS} | {"seed": seed}


def trained_method(args):
    """The --method whose loss is trained: None, plain InfoNCE, with --match-ifm."""
    return None if args.match_ifm else args.method


def notes(args, images, batchnorm_groups):
    """What a user should know about this pre-training before it starts, in lines of at most 80 columns.

    batchnorm_groups: in how many the images of a step are normalized, 0 by a network without BatchNorm.
    """
    method = trained_method(args)
    with_ifm = losses.chance(args.moco_k, method, args.epsilon, args.alpha, args.moco_t)
    lines = [
        f"loss at chance: ln(1+K) = {losses.chance(args.moco_k):.4f}"
        + f", with IFM {with_ifm:.4f}" * bool(method),
        "the queue starts as noise: the loss begins below chance and Acc@1 near 100, the",
        "  loss rises and Acc@1 falls while the queue fills, then the loss falls",
    ]
    if args.method:
        ifm = args.epsilon, args.moco_t, args.alpha, args.method
        by_queue, by_epsilon = losses.weight_bounds(args.moco_k, *ifm)
        line = f"with K = {args.moco_k} and T = {args.moco_t:g} "
        line += "the factor of --match-ifm is" if args.match_ifm else "IFM weighs an image's gradient"
        line += f" at most {min(by_queue, by_epsilon):.5g} where the queue's mean is 0"
        if min(by_queue, by_epsilon) < 1.05:
            flags = "raise --epsilon" + " or --alpha" * (args.method == "ifm")
            flags = "lower --moco-t or --moco-k" if by_queue < by_epsilon else flags
            line += f": to have an effect {flags} (README)"
        lines += textwrap.wrap(line, 80, subsequent_indent="  ")
    if batchnorm_groups == 1:
        lines += [
            "note: with one BatchNorm group shuffling has no effect, and a query and its key",
            "  share statistics that give the positive away; --bn-splits 8 acts like 8 GPUs",
        ]
    if args.moco_k > images:
        lines += [
            f"warning: {args.moco_k} keys of {images} images: the queue holds every image more than",
            "  once, so an image is its own negative; lower --moco-k",
        ]
    return lines


def add_gray_range(add):
    """Add --gray-range by a parser's `add_argument`: its value is None or [low, high]."""
    add(
        "--gray-range",
        type=_bounded(float, "finite", math.isfinite),
        nargs=2,
        action=_Range,
        metavar=("LOW", "HIGH"),
        help="values that become black and white, of gray images of more than 8 bits (default: all of the "
        "file's type, for which 12 bits in 16 are nearly black)",
    )


def _add_data(parser, folder):
    add = parser.add_argument_group("data").add_argument
    add("folder", metavar="DIR", nargs="?", help=folder)
    add("--dataset-root", "--dataset_root", metavar="ROOT", help="ROOT/DATASET, by default ROOT/imagenet100")
    add("--dataset", default="imagenet100", help="trifeature needs no download: it is drawn when missing")
    add("--image-size", type=_at_least(8), default=224, help="side of a view in pixels")
    add("-j", "--workers", type=_at_least(0), help="loader processes of this node; 0: none (default: cores)")
    add(
        "--device-aug",
        type=_word("exact", "off", float="use exact, which gives PIL's pixels"),
        metavar="{exact,off}",
        help="color, blur and flip on the device, with PIL's pixels, or in workers (default: exact on CUDA)",
    )
    add(
        "--resize",
        choices=("torch", "pil"),
        help="torch is faster and within 2 gray levels of pil (default: pil with --device-aug off)",
    )
    add(
        "--cache",
        type=_word("decoded", files="the system caches files itself; leave it out", device="use decoded"),
        metavar="decoded",
        help="keep decoded images in shared memory, once per node",
    )
    add_gray_range(add)
    add("--on-bad-image", choices=("error", "skip"), default="error", help="skip: name it and take another")
    add("--decoder", action=_Removed, advice="simplejpeg is used when it is installed, Pillow otherwise")
    return add


def _add_training(parser, epochs, schedule, weight_decay):
    add = parser.add_argument_group("training").add_argument
    add("-a", "--arch", default="resnet50", help="network of torchvision, conv3, or timm:NAME")
    add("--stem", choices=("small",), help="for ResNets below 64 pixels: first convolution 3x3, no pooling")
    add("--epochs", type=_at_least(1), default=epochs, help="of the whole run")
    add("--start-epoch", type=_at_least(0), default=0, help="number of the first epoch")
    add("-b", "--batch-size", type=_at_least(1), default=256, help="images per step of this node's processes")
    add(
        "--schedule",
        type=_or_folder(_at_least(0)),
        nargs="*",
        default=schedule,
        help="epochs of learning rate x 0.1",
    )
    add("--momentum", type=_at_least(0, float), default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", type=_at_least(0, float), default=weight_decay, help="weight decay")
    add("--seed", type=_between(0, 2**63 - 1, int), help="same seed, same run (default: drawn and printed)")
    return add


def _add_speed(parser):
    add = parser.add_argument_group("speed (the default is float32, as published)").add_argument
    add("--fast", action="store_true", help="on CUDA the three below with bf16, on a CPU --channels-last")
    add("--amp", choices=("bf16", "fp16"), help="precision of the encoders; weights and loss stay float32")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format of the encoders")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the encoders; takes minutes")


def _add_run(parser, written):
    add = parser.add_argument_group(f"run ({written})").add_argument
    add("--output-dir", default=".", metavar="DIR", help="folder for all files that are written")
    add("--resume", default="", metavar="CKPT", help="continue from it; auto: from --output-dir's newest")
    add("--overwrite", action="store_true", help="new run: remove the checkpoints in --output-dir")
    add("-p", "--print-freq", type=_at_least(1), default=10, help="steps between printed lines")
    return add


def _add_processes(parser):
    add = parser.add_argument_group("processes (no flag for one process or under a launcher)").add_argument
    add("--multiprocessing-distributed", action="store_true", help="start a process per GPU of this node")
    add("--world-size", type=int, default=-1, metavar="N", help="number of nodes (default: 1)")
    add("--rank", type=int, default=-1, metavar="N", help="index of this node (default: 0)")
    add("--dist-url", metavar="URL", help="tcp://HOST:PORT of the node of --rank 0 (default: a free port)")
    add("--dist-backend", metavar="NAME", help="nccl or gloo (default: nccl on GPUs)")
    add("--gpu", type=int, metavar="N", help="use this GPU only")
    add(
        "--local-rank",
        "--local_rank",
        type=_at_least(0),
        help="as the variable LOCAL_RANK; torch.distributed.launch and deepspeed add it",
    )


def _check(args):
    """What both programs refuse."""
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if args.on_bad_image == "skip" and args.cache:
        raise UserError(
            "--cache decodes all images before training and cannot skip one: remove those that python -m "
            "moco.check names, or leave --cache out"
        )
    if args.resume not in ("", "auto") and not Path(args.resume).is_file():
        raise UserError(f"--resume: there is no file {args.resume}; for a new run leave the flag out")
    if args.overwrite and args.resume == "auto":
        raise UserError("--overwrite removes what --resume auto continues from: give one of the two")


class _Parser(Parser):
    """Raises UserError instead of printing the usage."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message):
        raise UserError(message)


class _Help(argparse.HelpFormatter):
    """Help in 79 columns that shows defaults, unless the text does so itself, and numbers as N (int) or X."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=79)

    def _get_help_string(self, action):
        default = action.default
        if default in (None, "", argparse.SUPPRESS) or default is False or "(default: " in action.help:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {shown})"

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "__name__", action.dest.upper())


class _Range(argparse.Action):
    """Two numbers, the first below the second."""

    def __call__(self, parser, namespace, values, option_string=None):
        if not values[0] < values[1]:
            parser.error(f"argument {option_string}: {values[0]:g} must be below {values[1]:g}")
        setattr(namespace, self.dest, values)


class _Removed(argparse.Action):
    """A flag of earlier versions: an error that says what replaces it."""

    def __init__(self, option_strings, dest, advice):
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is gone: {self.advice}")


def _at_least(least, kind=int):
    return _bounded(kind, f"at least {least}", lambda value: least <= value < math.inf)


def _between(least, most, kind=float):
    return _bounded(kind, f"between {least} and {most}", lambda value: least <= value <= most)


def _bounded(kind, bounds, is_inside):
    """A `type` for argparse: an int or a float (`kind`) with is_inside(value), in words `bounds`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not is_inside(value):
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    parse.__name__ = "N" if kind is int else "X"  # in the help
    return parse


_above_0 = _bounded(float, "above 0", lambda value: 0 < value < math.inf)


def _or_folder(number):
    """A `type` for argparse: the `type` number or, for what is none, the text (see `_take_folder`)."""

    def parse(text):
        try:
            float(text)
        except ValueError:
            return text
        return number(text)

    parse.__name__ = number.__name__
    return parse


def _take_folder(args, flag, values):
    """Make DIR args.folder where it is the last of the flag's numbers, as in `--schedule 30 40 DIR`."""
    last = values[-1] if values else 0
    if isinstance(last, str) and args.folder is args.dataset_root is None and _may_be_folder(last):
        args.folder = values.pop()
        if not values and flag.startswith("--lr"):
            raise UserError(f"argument {flag}: expected a number before the folder")
    for value in values:
        if isinstance(value, str):
            raise UserError(f"argument {flag}: {value!r} is not a number; separate numbers by spaces")


def _may_be_folder(text):
    """Whether a text is no mistyped number, such as 120,160 or 3O."""
    return os.path.isdir(text) or not re.match(r"[+-]?\.?\d", text)


def _word(*words, **removed):
    """A `type` for argparse: one of `words`; a `removed` one is an error with the advice given there."""

    def parse(text):
        if text in removed:
            raise argparse.ArgumentTypeError(f"{text} is gone: {removed[text]}")
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(words)}")
        return text

    return parse
