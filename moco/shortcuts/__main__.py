"""Random bits as a shortcut (RandBit; Chen, Luo & Li 2021, section 4): runs and their linear readouts.

    python -m moco.shortcuts randbit --bits 0 4 8 --epsilon 0 0.1 --moco-t 0.2 --out runs/randbit

Every combination of bits, temperature, method, epsilon and seed is a run. A sweep can be stopped (Ctrl-C) and
continued by the same command, also with more values.
"""

import argparse
import itertools
import os
import signal
from pathlib import Path

import torch

from moco import options, trifeature
from moco.data.folders import image_folder
from moco.encoders import check_image_size
from moco.errors import UserError, run_program
from moco.files import atomic_file
from moco.run.launch import Rank
from moco.run.resources import available_cores
from moco.run.signals import EXIT_CODE, StopRequest
from moco.shortcuts import sweep
from moco.shortcuts.figures import draw
from moco.shortcuts.report import number, rows, table

PROJECT = Path(__file__).resolve().parents[2]
MOST_JOBS = 12  # by default: each keeps a core busy, also on a GPU
RENDERS = 4  # of each of Trifeature's combinations: 3,200 images in train/

# How runs train unless flags of main_moco.py say otherwise.
DEFAULTS = "-a resnet18 --image-size 32 --epochs 12 -b 64 --lr 0.03 --moco-k 1024 --moco-m 0.99 --bn-splits 8"
FIXED = "--mlp --cos --resize pil --device-aug off --workers 0 --cache decoded --print-freq 1000000"
SWEPT = ("moco_t", "random_bits", "method", "epsilon", "alpha", "seed")  # settings that differ between runs


def parse_args():
    """(the sweep's own flags, the others, which are main_moco.py's)."""
    parser = argparse.ArgumentParser(
        prog="python -m moco.shortcuts",
        usage="python -m moco.shortcuts randbit --out DIR [flags, also main_moco.py's]",
        description="Pre-train encoders by main_moco.py on images with random bits, which both views share, "
        "and measure what a linear classifier reads from them.",
        epilog=f"All other flags are given to main_moco.py. Its defaults are here {DEFAULTS} --mlp --cos "
        "--crops-only (unless --aug-plus is given).",
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=["randbit"], help="the only one so far")
    add = parser.add_argument_group("what differs between runs (every combination is one)").add_argument
    for flag, kind, default, text in (
        ("--bits", int, [0, 2, 4, 6, 8], "random bits of each image"),
        ("--moco-t", float, [0.2], "temperatures"),
        ("--epsilon", float, [0.0, 0.1], "0 is plain InfoNCE"),
        ("--method", str, ["ifm"], "ifm, ifm_only: of epsilons above 0"),
        ("--seeds", int, [0, 1, 2], "a run each"),
    ):
        words = " ".join(map(str, default))
        add(flag, type=kind, nargs="+", default=default, metavar="X", help=f"{text} (default: {words})")
    add = parser.add_argument_group("running").add_argument
    add(
        "--out", required=True, metavar="DIR", help="folder of the sweep: results.jsonl, table.md, figure.png"
    )
    add(
        "--data", metavar="DIR", help="images with train/ and val/ (default: Trifeature, drawn into OUT/data)"
    )
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    add(
        "--jobs", type=int, metavar="N", help=f"runs in parallel (default: one per core, at most {MOST_JOBS})"
    )
    add("--keep-checkpoints", action="store_true", help="do not remove them once they are measured")
    args, others = parser.parse_known_args()
    for name in ("bits", "moco_t", "epsilon", "method", "seeds"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # each once; 0.0 is -0.0
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    if not all(0 <= count <= 63 for count in args.bits):
        raise UserError(f"--bits must be from 0 to 63, not {args.bits}")
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: there is no GPU here; leave the flag out, or use --device cpu")
    return args, others


def runs_of(args):
    """What identifies each run, as dicts: the untrained encoders first, then seed by seed."""
    runs = [
        {"trained": False, "seed": seed, "bits": bits}
        for seed, bits in itertools.product(args.seeds, args.bits)
    ]
    losses = [(method if epsilon else None, epsilon) for epsilon in args.epsilon for method in args.method]
    places = itertools.product(args.seeds, args.bits, args.moco_t, dict.fromkeys(losses))
    for seed, bits, T, (method, epsilon) in places:
        run = {"trained": True, "seed": seed, "bits": bits, "T": T, "method": method, "epsilon": epsilon}
        runs.append(run)
    return runs


def name_of(run):
    """The name of a run's folder: untrained_bits4_seed0, T0.2_bits4_ifm_eps0.1_seed0."""
    place = f"bits{run['bits']}"
    if not run["trained"]:
        return f"untrained_{place}_seed{run['seed']}"
    loss = f"{run['method']}_eps{number(run['epsilon'])}" if run["method"] else "infonce"
    return f"T{number(run['T'])}_{place}_{loss}_seed{run['seed']}"


def words_of(run, data, folder, others):
    """The words of main_moco.py's command line after its name; of the untrained encoder of such a run, those
    that decide how it starts.
    """
    recipe = [] if "--aug-plus" in others else ["--crops-only"]
    words = [str(data), *DEFAULTS.split(), *recipe, *others, *FIXED.split()]
    own = {"random-bits": run["bits"], "seed": run["seed"]}
    if run["trained"]:
        own |= {"moco-t": run["T"], "output-dir": folder, "resume": "auto"}
        own |= {"method": run["method"], "epsilon": run["epsilon"]} if run["method"] else {}
    return words + [str(word) for name, value in own.items() for word in (f"--{name}", value)]


def job_of(run, data, out, others, epochs):
    """The sweep.Job of a run."""
    folder = Path(out, "runs", name_of(run))
    newest = folder / f"checkpoint_{epochs - 1:04d}.pth.tar"
    words, measure = words_of(run, data, folder, others), ["-m", "moco.shortcuts.measure"]
    measure.append(str(folder / sweep.MEASURED))
    if not run["trained"]:
        told, commands = [*measure, *words], [[*measure, *words]]
    else:
        told = ["main_moco.py", *words]
        commands = [
            [str(PROJECT / "main_moco.py"), *words],
            [*measure, str(data), "--pretrained", str(newest)],
        ]
        if newest.is_file():
            del commands[0]
    return sweep.Job({**run, "command": ["python", *told]}, folder, commands)


def write_report(out, results):
    """Write table.md and, with matplotlib, figure.png into the folder `out`. Returns what to print."""
    if not any("readout" in run for run in results):
        return "nothing to show yet"
    text, written = table(results), f"{Path(out, 'table.md')}"
    with atomic_file(Path(out, "table.md")) as temporary:
        temporary.write_text(text)
    try:
        if rows(results):
            draw(results, Path(out, "figure.png"))
            written += f", {Path(out, 'figure.png')}"
    except UserError as error:
        written += f"; no figure: {error.sentence}"
    return f"{text}\n{written}"


def main():
    args, others = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing half-drawn then, too
    data, runs = Path(args.data or Path(args.out, "data")), runs_of(args)
    # main_moco.py's own checks of every command, before anything is written
    *_, training = (
        options.pretraining(words_of(run, data, "runs", others)) for run in runs if run["trained"]
    )
    check_image_size(training.arch, training.image_size)
    if args.data:
        image_folder(data, "train")
    shared = options.settings(training, seed=None)
    settings = {name: value for name, value in shared.items() if name not in SWEPT}
    settings |= {"data": str(data.resolve()) if args.data else None, "device": args.device}
    with sweep.opened(args.out, settings):
        if not args.data:
            trifeature.generate(data, 2 * training.image_size, RENDERS)
        finished = {result["name"] for result in sweep.read_results(args.out)}
        jobs = [
            job_of(run, data, args.out, others, training.epochs)
            for run in runs
            if name_of(run) not in finished
        ]
        parallel = args.jobs or min(available_cores(), MOST_JOBS)
        print(f"{len(runs)} runs ({len(runs) - len(jobs)} finished), {parallel} in parallel on {args.device}")
        path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if args.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with StopRequest(Rank.alone()) as stop:
            failures = sweep.run_jobs(args.out, jobs, parallel, environment, stop, args.keep_checkpoints)
            results = sweep.read_results(args.out)
            print(write_report(args.out, results))
            if stop.name and len({result["name"] for result in results}) < len(finished) + len(jobs):
                print(f"stopped by {stop.name}; continue with the same command")
                raise SystemExit(EXIT_CODE)
        if failures:
            print(f"runs that failed: {len(failures)}; the same command tries them again")
            raise SystemExit(1)


if __name__ == "__main__":
    run_program(main, "python -m moco.shortcuts")
