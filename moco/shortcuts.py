"""Does IFM keep the features that InfoNCE suppresses? Sweeps of small runs, measured by linear readouts.

python -m moco.shortcuts trifeature --out runs/trifeature
python -m moco.shortcuts randbit --bits 0 2 4 6 8 --out runs/randbit

A sweep can be stopped (Ctrl-C) and continued by the same command, also with more values of what differs.
"""

import argparse
import itertools
import os
from pathlib import Path

from moco import trifeature
from moco.cores import available_cores
from moco.errors import UserError, run_program
from moco.measure import factors_of
from moco.shortcuts_report import write_report
from moco.sweep import Job, locked, read_results, run_jobs, settle

RECIPES = {"v2": "--aug-plus", "crops": "--crops-only"}
PER_GPU = 6  # runs side by side on one


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m moco.shortcuts",
        description="Pre-train small encoders by main_moco.py with and without IFM, and measure what a "
        "linear classifier reads from them.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="EXPERIMENT")
    for kind, text in (
        ("trifeature", "shape, texture and colour against epsilon and temperature"),
        ("randbit", "images with random bits that tell them apart, against the number of bits"),
    ):
        sub = kinds.add_parser(kind, help=text, description=f"Measures {text}.")
        _add_lists(sub, kind)
        _add_fixed(sub, kind)
        _add_running(sub)
    return parser.parse_args()


def _add_lists(parser, kind):
    of_bits = kind == "randbit"
    add = parser.add_argument_group("what differs between runs: every combination is a run").add_argument
    if of_bits:
        add("--bits", type=int, nargs="*", default=[0, 2, 4, 6, 8], metavar="B", help="(default: 0 2 4 6 8)")
    epsilons = [0, 0.1] if of_bits else [0, 0.05, 0.1, 0.2, 0.5]
    temperatures = [0.2] if of_bits else [0.07, 0.2, 0.5]
    add("--epsilon", type=float, nargs="*", default=epsilons, metavar="E",
        help=f"0 is plain MoCo-v2 (default: {_words(epsilons)})")  # fmt: skip
    add("--moco-t", type=float, nargs="*", default=temperatures, metavar="T",
        help=f"(default: {_words(temperatures)})")  # fmt: skip
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    recipes = ["v2"] if of_bits else ["v2", "crops"]
    add("--recipe", nargs="*", default=recipes, metavar="NAME",
        help=f"views: v2, MoCo v2's, or crops and flips alone (default: {_words(recipes)})")  # fmt: skip


def _add_fixed(parser, kind):
    add = parser.add_argument_group("what all runs share").add_argument
    for flag, default, metavar in (
        ("-a --arch", "resnet18", "ARCH"), ("--image-size", 32, "S"), ("--epochs", 12, "N"),
        ("-b --batch-size", 64, "N"), ("--lr", 0.03, "LR"), ("--moco-k", 1024, "K"), ("--moco-m", 0.99, "M"),
        ("--bn-splits", 8, "G"), ("--alpha", 1.0, "A"),
    ):  # fmt: skip
        add(
            *flag.split(), type=type(default), default=default, metavar=metavar, help="(default: %(default)s)"
        )
    add("--method", choices=("ifm", "ifm_only"), default="ifm", help="(default: %(default)s)")
    add("--renders", type=int, default=4, metavar="N",
        help="images of each of Trifeature's combinations (default: %(default)s)")  # fmt: skip
    if kind == "randbit":
        add("--data", metavar="DIR", help="images with train/ and val/ (default: Trifeature, drawn into OUT)")
    add("--factors", nargs="*", metavar="NAME",
        help="what to read: shape, texture, color; of other data class (default: all there are)")  # fmt: skip


def _add_running(parser):
    add = parser.add_argument_group("running").add_argument
    add(
        "--out", required=True, metavar="DIR", help="folder of the sweep: results.jsonl, table.md, figure.png"
    )
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    add("--jobs", type=int, metavar="N",
        help=f"runs side by side (default: one per core, {PER_GPU} on a GPU)")  # fmt: skip
    add("--keep-checkpoints", action="store_true", help="do not remove them once they are measured")


def main():
    args = parse_args()
    _check(args)
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


def _check(args):
    for name in ("bits", "epsilon", "moco_t", "seeds", "recipe", "factors"):
        values = getattr(args, name, None)
        if values == []:
            raise UserError(f"--{name.replace('_', '-')} needs at least one value")
        if values is not None:
            setattr(args, name, list(dict.fromkeys(values)))  # each once
    for recipe in args.recipe:
        if recipe not in RECIPES:
            raise UserError(f"there is no recipe {recipe!r}; choose of {', '.join(RECIPES)}")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    if args.renders < 1:
        raise UserError(f"--renders must be at least 1, not {args.renders}")


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
    known = factors_of(data) if getattr(args, "data", None) else list(trifeature.FACTORS)
    for factor in args.factors or ():
        if factor not in known:
            raise UserError(f"there is no factor {factor!r} to read; choose of {', '.join(known)}")


def _settings(args):
    """What must not change within a sweep."""
    apart = ("bits", "epsilon", "moco_t", "seeds", "recipe", "out", "jobs", "keep_checkpoints")
    return {name: value for name, value in vars(args).items() if name not in apart}


def _job(args, run, data, factors):
    T = "" if not run["trained"] else f"{run['recipe']}_T{run['T']:g}_eps{run['epsilon']:g}_"
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
    run = {"kind": args.kind, **run, **_settings(args), "command": ["python", *pretraining]}
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


def _words(values):
    return " ".join(map(str, values))


if __name__ == "__main__":
    run_program(main)
