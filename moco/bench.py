"""Measurements on your machine, in turns: `python -m moco.bench data` of ways to load data, `step` of the
training step, `train` of both together, `save` of a checkpoint; `scale` computes what a step sends.
"""

import argparse
import json
import os
import signal

from moco.errors import run_program

STEP_ROWS = ["published", "published_tf32", "faithful", "faithful_tf32", "channels_last", "bf16", "compile"]
STEP_ROWS += ["fast", "fast_v2", "fast_unsplit", "ceiling", "loss"]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.bench", description="Measure, on this machine, what the program is made of."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _data_options(commands)
    _step_options(commands)
    _train_options(commands)
    _save_options(commands)
    _scale_options(commands)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the workers and remove what was made

    {"data": _data, "step": _step, "train": _train, "save": _save, "scale": _scale}[args.command](args)


def _data_options(commands):
    text = (
        "Time the published pipeline of views, each improvement in turn, and decoding alone; then how "
        "batches travel from workers, and both loaders end to end. Takes two minutes; close other programs."
    )
    data = commands.add_parser("data", help="the data pipeline, from JPEG files to batches", description=text)
    add = data.add_argument
    add("folder", metavar="DIR", nargs="?", help="photographs to read (default: JPEG files made for it)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--images", type=int, default=64, metavar="N", help="how many, spread over DIR (default: 64)")
    add("--rounds", type=int, default=11, metavar="N", help="turns of each pipeline (default: 11)")
    add("--size", type=int, default=224, metavar="S", help="side of a view in pixels (default: 224)")
    add("--workers", type=int, default=2, metavar="W", help="0: only what needs none (default: 2)")
    add("--batch-size", type=int, default=32, metavar="B", help="of the loaders (default: 32)")
    add(
        "--device-aug",
        default="both",
        choices=("both", "exact", "float", "off"),
        help="which device half to time where there is a GPU (default: both)",
    )


def _step_options(commands):
    text = (
        "Time the training step on images that are on the device already: as published, as it is here in "
        "float32, with each flag in turn, with --fast, and the ceiling, which is the encoders' work alone. "
        "Takes two minutes on two cores, ten on a GPU; close other programs."
    )
    step = commands.add_parser("step", help="the training step against its encoders alone", description=text)
    _size_options(step, 7, "(default: 8 on CUDA, 2 on a CPU)")
    rows = step.add_mutually_exclusive_group()
    add = rows.add_argument
    add("--only", nargs="+", default=[], metavar="ROW", choices=STEP_ROWS, help=", ".join(STEP_ROWS))
    add("--without", nargs="+", default=[], metavar="ROW", choices=STEP_ROWS, help="leave these rows out")
    add("--loss-only", action="store_const", const=["loss"], dest="only", help="the same as --only loss")


def _train_options(commands):
    text = (
        "Time the --fast step end to end, from JPEG files, against the same step on images that are on the "
        "device already, in turns."
    )
    train = commands.add_parser("train", help="the fast step from JPEG files", description=text)
    add = train.add_argument
    add("folder", metavar="DIR", nargs="?", help="data set with train/ (default: photographs made for it)")
    _size_options(train, 3, "and an epoch (default: 60 on CUDA, 8 on a CPU)")
    add("-j", "--workers", type=int, metavar="W", help="loader processes (default: one per core)")
    add("--device-aug", choices=("exact", "float", "off"), help="as in training (default: that of --fast)")


def _save_options(commands):
    text = (
        "Time the saving of a run's checkpoint, until it is on the disk under its name and with its SHA-256, "
        "against torch.save in place, in turns."
    )
    save = commands.add_parser("save", help="the saving of a checkpoint", description=text)
    add = save.add_argument
    add(
        "folder",
        metavar="DIR",
        nargs="?",
        help="on the disk to try (default: that of temporary files)",
    )
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("-a", "--arch", default="resnet18", metavar="NAME", help="(default: %(default)s)")
    add("--moco-k", type=int, default=65536, metavar="K", help="keys in the queue (default: %(default)s)")
    add("--rounds", type=int, default=11, metavar="N", help="turns of each (default: %(default)s)")


def _scale_options(commands):
    text = (
        "Compute what leaves a GPU in a training step, for 8, 64 and 512 of them, beside the published form."
    )
    scale = commands.add_parser("scale", help="what a step sends, by the number of GPUs", description=text)
    add = scale.add_argument
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("-a", "--arch", default="resnet50", metavar="NAME", help="(default: %(default)s)")
    add(
        "-b", "--batch-size", type=int, default=32, metavar="N", help="images of a GPU (default: %(default)s)"
    )
    add("--size", type=int, default=224, metavar="S", help="side of a view (default: %(default)s)")
    add("--moco-k", type=int, default=65536, metavar="K", help="keys in the queue (default: %(default)s)")


def _size_options(parser, rounds, steps):
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--device", choices=("cuda", "cpu"), help="(default: cuda if there is a GPU)")
    add("-a", "--arch", metavar="NAME", help="(default: resnet50 on CUDA, resnet18 on a CPU)")
    add("-b", "--batch-size", type=int, metavar="N", help="images of a step (default: 512 or 32)")
    add("--size", type=int, metavar="S", help="side of a view in pixels (default: 224 or 64)")
    add("--moco-k", type=int, metavar="K", help="keys in the queue (default: 65536 or 4096)")
    add("--bn-splits", type=int, metavar="G", help="BatchNorm over G groups (default: 8)")
    add("--rounds", type=int, default=rounds, metavar="N", help="turns of each (default: %(default)s)")
    add("--steps", type=int, metavar="N", help=f"of a turn {steps}")


def _data(args):
    from moco import bench_data, bench_report  # import torch

    report = bench_data.measure(
        args.folder,
        images=args.images,
        rounds=args.rounds,
        size=args.size,
        workers=args.workers,
        batch_size=args.batch_size,
        device_aug=args.device_aug,
    )
    print(json.dumps(report) if args.json else bench_report.data_tables(report))


def _step(args):
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, reports itself
    from moco import bench_step, bench_step_report  # import torch

    report = bench_step.measure(**_sizes(args), only=args.only, without=args.without)
    print(json.dumps(report) if args.json else bench_step_report.step_tables(report))


def _train(args):
    from moco import bench_step_report, bench_train  # import torch

    report = bench_train.measure(
        args.folder, workers=args.workers, device_aug=args.device_aug, **_sizes(args)
    )
    print(json.dumps(report) if args.json else bench_step_report.train_table(report))


def _save(args):
    from moco import bench_save  # imports torch

    report = bench_save.measure(args.arch, args.moco_k, args.rounds, args.folder)
    print(json.dumps(report) if args.json else bench_save.table(report))


def _scale(args):
    from moco import bench_scale  # imports torch

    report = bench_scale.measure(args.arch, args.batch_size, args.size, K=args.moco_k)
    print(json.dumps(report) if args.json else bench_scale.table(report))


def _sizes(args):
    names = ("device", "arch", "batch_size", "size", "moco_k", "bn_splits", "rounds", "steps")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    run_program(main)
