"""Does IFM keep the features that InfoNCE suppresses? Sweeps of small runs, measured by linear readouts.

python -m moco.shortcuts trifeature --out runs/trifeature
python -m moco.shortcuts randbit --bits 0 2 4 6 8 --out runs/randbit

A sweep can be stopped (Ctrl-C) and continued by the same command, also with more values of what differs.
"""

import itertools
import os
import signal
from pathlib import Path

from moco import trifeature
from moco.cores import available_cores
from moco.errors import UserError, run_program
from moco.measure import AS_FOLDERS, factors_of
from moco.shortcuts_options import PER_GPU, RECIPES, check_lists, parse_args
from moco.shortcuts_report import write_report
from moco.sweep import Job, locked, read_results, run_jobs, settle


def main():
    args = parse_args()
    check_lists(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing half-drawn then, too

    import torch

    from moco.watch import PREEMPTED, Signals

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; leave the flag out, or say --device cpu")
    data = Path(getattr(args, "data", None) or Path(args.out) / "data")
    runs = _runs(args)
    _check_runs(args, runs, data)
    with locked(args.out) as lock:
        settle(args.out, _settings(args))
        if getattr(args, "data", None) is None:
            trifeature.ensure(data, 2 * args.image_size, args.renders)
        factors = args.factors or factors_of(data)
        done = {result["name"] for result in read_results(args.out)}
        jobs = [job for job in (_job(args, run, data, factors) for run in runs) if job.name not in done]
        side_by_side = args.jobs or (PER_GPU if args.device == "cuda" else available_cores())
        print(f"{len(runs)} runs, {len(runs) - len(jobs)} of them done; {side_by_side} side by side on "
              f"{args.device}", flush=True)  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if args.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with Signals() as signals:
            failures = run_jobs(
                args.out, jobs, side_by_side, environment, lock, signals, args.keep_checkpoints
            )
        print(write_report(args.out, args.kind, read_results(args.out)))
        if signals.name:
            print(f"stopped by {signals.name}; the same command goes on")
            raise SystemExit(PREEMPTED)
        if failures:
            print(f"{len(failures)} runs failed; the same command tries them again")
            raise SystemExit(1)


def _runs(args):
    """The untrained encoders first, then seed by seed, so that what is done at any time can be compared."""
    bits, runs = getattr(args, "bits", [0]), []
    for seed, count in itertools.product(args.seeds, bits):
        runs.append({"trained": False, "seed": seed, "bits": count})
    for seed, count, recipe, T, epsilon in itertools.product(
        args.seeds, bits, args.recipe, args.moco_t, args.epsilon
    ):
        place = {"recipe": recipe, "T": T, "epsilon": epsilon}
        runs.append({"trained": True, "seed": seed, "bits": count, **place})
    return runs


def _check_runs(args, runs, data):
    """Let main_moco.py's own checks see every command before anything is drawn or started."""
    import torch

    from moco.data import Loading, labelled_folders
    from moco.distributed import Process
    from moco.encoders import base_encoder, check_image_size
    from moco.pretrain_options import check
    from moco.pretrain_options import parse_args as pretraining_args

    for epsilon in args.epsilon:
        if not epsilon >= 0:
            raise UserError(f"--epsilon must be 0 or more, not {epsilon}")
    base_encoder(args.arch)
    check_image_size(args.arch, args.image_size)
    for run in runs:
        if run["trained"]:
            check(pretraining_args(_pretraining(args, run, data, Path("runs"))[1:]))
        elif not 0 <= run["seed"] < 2**63:
            raise UserError(f"--seeds must be between 0 and 2^63 - 1, not {run['seed']}")
    given = getattr(args, "data", None) is not None
    known = factors_of(data) if given else list(trifeature.FACTORS)
    for factor in args.factors or ():
        if factor not in known:
            raise UserError(f"there is no factor {factor!r} to read; choose of {', '.join(known)}")
    images = args.renders * (len(trifeature.COMBINATIONS) - len(trifeature.held_out(0)))
    if given:
        images = len(labelled_folders(data, None if known == [AS_FOLDERS] else known[0])[0])
    elif 2 * args.image_size not in trifeature.SIZES:
        largest = trifeature.SIZES[-1] // 2
        raise UserError(f"--image-size {args.image_size} is more than Trifeature's {largest}; lower it")
    process = Process.alone(torch.device("cpu"))
    Loading(args.image_size, "pil", args.batch_size).check_batch(images, data, process, args.bn_splits)


def _settings(args):
    """What must not change within a sweep."""
    apart = ("bits", "epsilon", "moco_t", "seeds", "recipe", "out", "jobs", "keep_checkpoints")
    return {name: value for name, value in vars(args).items() if name not in apart}


def _job(args, run, data, factors):
    T = ""
    if run["trained"]:
        T = f"{run['recipe']}_T{_number(run['T'])}_eps{_number(run['epsilon'])}_"
    bits = f"bits{run['bits']}_" if args.kind == "randbit" else ""
    folder = Path(args.out).resolve() / "runs" / f"{T or 'untrained_'}{bits}seed{run['seed']}"
    measuring = ["-m", "moco.measure", str(Path(data).resolve()), str(folder / "measured.json"), "--factors"]
    measuring += factors
    if not run["trained"]:
        measuring += _flags("--untrained", a=args.arch, image_size=args.image_size, seed=run["seed"])
        measuring += ["--random-bits", str(run["bits"])]
        return Job({"kind": args.kind, **run, **_settings(args)}, [("measure", measuring)], folder)
    pretraining = _pretraining(args, run, Path(data).resolve(), folder)
    newest = folder / f"checkpoint_{args.epochs - 1:04d}.pth.tar"
    commands = [("pretrain", pretraining), ("measure", [*measuring, "--pretrained", str(newest)])]
    if newest.is_file():
        del commands[0]
    told = _pretraining(args, run, data, Path(args.out, "runs", folder.name))  # as the user named folders
    run = {"kind": args.kind, **run, **_settings(args), "command": ["python", *told]}
    return Job(run, commands, folder)


def _pretraining(args, run, data, folder):
    """The words of main_moco.py for one run."""
    words = ["main_moco.py", str(data), "--mlp", "--cos", RECIPES[run["recipe"]]]
    words += _flags(
        a=args.arch, image_size=args.image_size, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
        moco_k=args.moco_k, moco_m=args.moco_m, moco_t=run["T"], bn_splits=args.bn_splits, seed=run["seed"],
        random_bits=run["bits"], workers=0, print_freq=10**6, output_dir=folder, resume="auto",
    )  # fmt: skip
    if run["epsilon"]:
        words += _flags(method=args.method, epsilon=run["epsilon"])
        words += _flags(alpha=args.alpha) if args.method == "ifm" else []
    # Where the pixels are kept; neither changes what a view is drawn as.
    return words + (
        ["--cache", "device", "--device-aug", "exact"] if args.device == "cuda" else ["--cache", "decoded"]
    )


def _flags(*words, **values):
    for name, value in values.items():
        flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        words += (flag, str(value))
    return list(words)


def _number(value):
    """A number in a run's name: all its digits, so that two names are never the same, and 0 as 0.0."""
    return repr(float(value)).removesuffix(".0")


if __name__ == "__main__":
    run_program(main)
