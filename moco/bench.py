"""Measurements on your machine: `python -m moco.bench data` times ways to load data against each other."""

import argparse
import json
import signal

from moco.errors import run_program


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.bench", description="Measure, on this machine, what the program is made of."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _data_options(commands)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the workers and remove what was made

    {"data": _data}[args.command](args)


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


if __name__ == "__main__":
    run_program(main)
