"""Measurements on this machine: `python -m moco.bench data` of loading data, `step` of the training step."""

import json
import os
import sys

from moco.errors import Parser, UserError, interrupt_on_signals, run_program
from moco.files import atomic_file, check_free


def main():
    args = parse_args()
    for name, value in vars(args).items():
        least = 0 if name == "workers" else 1
        if type(value) is int and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    interrupt_on_signals()
    if args.json:
        check_free(args.json, force=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, reports itself
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the check of deterministic algorithms
    from moco.bench import (
        data,
        report,
        step,
        traffic,
        training,
    )  # they import torch, which --help does not need

    sizes = {name: getattr(args, name, None) for name in ("arch", "batch_size", "size", "moco_k")}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if args.command == "data":
        found = data.measure(
            args.folder, images=args.images, rounds=args.rounds, workers=args.workers, **sizes
        )
    elif args.traffic:
        found = traffic.measure(**sizes)
    else:
        setting = training.setting_of(args.device, bn_splits=args.bn_splits, steps=args.steps, **sizes)
        found = step.measure(setting, args.rounds, args.only, args.data, args.workers)
    print(report.text(found), flush=True)
    if args.json:
        try:
            with atomic_file(args.json) as temporary:
                temporary.write_text(json.dumps(found))
        except OSError as error:
            raise UserError(f"cannot write {args.json} ({error.strerror}); the report is above") from error
    if any(check["verdict"] == "FAILED" for check in found.get("checks", {}).values()):
        sys.exit(1)


def parse_args():
    parser = Parser(prog="python -m moco.bench", description="Measure loading and training on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = (
        "Time the published pipeline of views, each improvement in turn, transport from workers, and both "
        "loaders end to end. Takes two minutes; close other programs."
    )
    data = commands.add_parser("data", help="the data pipeline, from JPEG files to batches", description=text)
    add = data.add_argument
    add("folder", metavar="DIR", nargs="?", help="photographs to read (default: JPEG files made for it)")
    add("--json", metavar="FILE", help="also write the report to FILE as one JSON object")
    add("--images", type=int, default=64, metavar="N", help="how many, spread over DIR (default: 64)")
    add("--rounds", type=int, default=11, metavar="N", help="turns of each pipeline (default: 11)")
    add("--size", type=int, default=224, metavar="S", help="side of a view in pixels (default: 224)")
    add("--workers", type=int, default=2, metavar="W", help="0: only what needs none (default: 2)")
    add("--batch-size", type=int, default=32, metavar="B", help="of the loaders (default: 32)")
    text = (
        "Check the device, then time the training step on noise: as published, as it is here with each flag, "
        "and the ceiling, which is the encoders' work alone. Takes two minutes on two cores, eight on a GPU; "
        "close other programs. Exit code 1: a check failed."
    )
    step = commands.add_parser("step", help="the training step against its encoders", description=text)
    add = step.add_argument
    add("--json", metavar="FILE", help="also write the report to FILE as one JSON object")
    add("--device", choices=("cuda", "cpu"), help="(default: cuda if there is a GPU)")
    add("-a", "--arch", metavar="NAME", help="(default: resnet50 on CUDA, resnet18 on a CPU)")
    add("-b", "--batch-size", type=int, metavar="N", help="images of a step (default: 512 or 32)")
    add("--size", type=int, metavar="S", help="side of a view in pixels (default: 224 or 64)")
    add("--moco-k", type=int, metavar="K", help="keys in the queue (default: 65536 or 4096)")
    add("--bn-splits", type=int, metavar="G", help="BatchNorm over G groups (default: 8)")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each (default: 5)")
    add("--steps", type=int, metavar="N", help="of a turn (default: 6 on CUDA, 2 on a CPU)")
    add("--only", nargs="+", metavar="NAME", help="only these rows and parts (a wrong one lists all)")
    text = "the --fast step from files, too: images as for pre-training, or JPEG files made for it"
    add("--data", nargs="?", const="", metavar="DIR", help=text)
    add("-j", "--workers", type=int, metavar="W", help="of --data (default: one per core)")
    add("--traffic", action="store_true", help="only compute what a step sends on many GPUs")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, "python -m moco.bench")
