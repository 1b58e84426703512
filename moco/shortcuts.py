"""Does IFM keep the features that InfoNCE suppresses? Sweeps of small runs, measured by linear readouts.

python -m moco.shortcuts trifeature --out runs/trifeature
python -m moco.shortcuts randbit --bits 0 2 4 6 8 --out runs/randbit

A sweep can be stopped (Ctrl-C) and continued by the same command, also with more values of what differs.
"""

import itertools
import json
import math
import os
import signal
from pathlib import Path

from moco import trifeature
from moco.cores import available_cores
from moco.errors import UserError, run_program
from moco.factors import AS_FOLDERS, COMBINATIONS, FACTORS, SETTINGS, factors_of, hidden
from moco.shortcuts_options import MOST_ON_GPU, RECIPES, check_lists, parse_args
from moco.shortcuts_report import write_report
from moco.shortcuts_results import number
from moco.sweep import Job, locked, read_results, run_jobs, settle


def main():
    args = parse_args()
    check_lists(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing half-drawn then, too

    import torch

    from moco.readout import WEIGHT_DECAYS
    from moco.watch import PREEMPTED, Signals

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; leave the flag out, or say --device cpu")
    given = getattr(args, "data", None)
    data = Path(given or Path(args.out) / "data")
    runs = _runs(args)
    images = _images_of(args, data)
    notes = _check_runs(args, runs, data, images)
    settings = _settings(args) | {"weight_decays": list(WEIGHT_DECAYS)}
    settings |= {"data": str(data.resolve()), "images": images} if given else {}
    with locked(args.out) as lock:
        settle(args.out, settings)
        done = {result["name"] for result in read_results(args.out)}
        print(*notes, sep="\n", end="\n" if notes else "", flush=True)
        if not given:
            _draw(data, 2 * args.image_size, args.renders, args.hide)
            if args.read_without:
                _draw(_read_data(args), 2 * args.image_size, args.renders, args.read_without)
        factors = args.factors or _known_factors(args, data)
        jobs = [job for job in (_job(args, run, data, factors, settings) for run in runs)
                if job.name not in done]  # fmt: skip
        most = MOST_ON_GPU if args.device == "cuda" else len(runs)
        side_by_side = args.jobs or min(available_cores(), most)
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
        if signals.name and not all(job.outcome for job in jobs):
            print(f"stopped by {signals.name}; the same command goes on")
            raise SystemExit(PREEMPTED)
        if failures:
            print(f"runs that failed: {len(failures)}; the same command tries them again")
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


def _known_factors(args, data):
    """All that can be read of the images."""
    if getattr(args, "data", None) is not None:
        return factors_of(data)
    trained = hidden(args.hide) if args.hide is not None else None
    given = args.read_without is not None
    read = hidden(args.read_without, "read-without") if given else trained
    if trained and given and (trained[0] != read[0] or trained == read):
        raise UserError(
            "--read-without beside --hide reads from pictures with another value of the same factor, as in "
            "--hide color=red --read-without color=blue; name such a value, or leave one of the flags out"
        )
    return [factor for factor in FACTORS if not read or factor != read[0]]


def _read_data(args):
    """The folder of the pictures to read from where they are others than to train on."""
    return Path(args.out) / "data_to_read"


def _images_of(args, data):
    """The number of training images. Leaves `args.factors` None where it names all that there are."""
    from moco.data import labelled_folders

    given = getattr(args, "data", None) is not None
    known = _known_factors(args, data)
    for factor in args.factors or ():
        if factor not in known:
            raise UserError(f"there is no factor {factor!r} to read; choose of {', '.join(known)}")
    if args.factors:
        args.factors = [factor for factor in known if factor in args.factors]
    if args.factors == known:
        args.factors = None
    if given:
        return len(labelled_folders(data, None if known == [AS_FOLDERS] else known[0])[0])
    if 2 * args.image_size > trifeature.SIZES[-1]:  # the least is main_moco.py's to check
        largest = trifeature.SIZES[-1] // 2
        raise UserError(f"--image-size {args.image_size} is more than Trifeature's {largest}; lower it")
    return args.renders * (len(COMBINATIONS) - len(trifeature.held_out(0)))


def _check_runs(args, runs, data, images):
    """Let main_moco.py's own checks see every command before anything is drawn or started.

    Returns what it would tell the user of each run.
    """
    import torch

    from moco.data import Loading
    from moco.distributed import Process
    from moco.encoders import base_encoder, check_image_size
    from moco.pretrain_options import check, notes
    from moco.pretrain_options import parse_args as pretraining_args
    from moco.random_bits import MOST

    for epsilon in args.epsilon:
        if not epsilon >= 0:
            raise UserError(f"--epsilon must be 0 or more, not {epsilon}")
    for count in getattr(args, "bits", ()):
        if not 0 <= count <= MOST:
            raise UserError(f"--bits must be between 0 and {MOST}, not {count}")
    base_encoder(args.arch)
    check_image_size(args.arch, args.image_size)
    told = []
    for run in runs:
        if run["trained"]:
            pretraining = pretraining_args(_pretraining(args, run, data, Path("runs"))[1:])
            check(pretraining)
            told = list(notes(pretraining, math.nan, images, args.bn_splits))[1:]  # the first is of its loss
        elif not 0 <= run["seed"] < 2**63:
            raise UserError(f"--seeds must be between 0 and 2^63 - 1, not {run['seed']}")
    process = Process.alone(torch.device("cpu"))
    Loading(args.image_size, "pil", args.batch_size).check_batch(images, data, process, args.bn_splits)
    return told


def _draw(data, size, renders, hide=None):
    """Draw Trifeature into the folder `data`, or check that it was drawn so. UserError."""
    settings = trifeature.settings_of(size, renders, hide=hide)
    trifeature.ensure(data, size, renders, hide=hide)
    try:
        before = json.loads((data / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{data} is no Trifeature set ({error}); choose another --out") from error
    if before != settings:
        raise UserError(f"{data} was drawn with {before}, not {settings}; choose another --out")


def _settings(args):
    """What must not change within a sweep."""
    apart = ("bits", "epsilon", "moco_t", "seeds", "recipe", "out", "jobs", "keep_checkpoints")
    return {name: value for name, value in vars(args).items() if name not in apart}


def _job(args, run, data, factors, settings):
    T = ""
    if run["trained"]:
        T = f"{run['recipe']}_T{number(run['T'])}_eps{number(run['epsilon'])}_"
    bits = f"bits{run['bits']}_" if args.kind == "randbit" else ""
    name = f"{T or 'untrained_'}{bits}seed{run['seed']}"
    places = Path(data), Path(args.out, "runs", name)  # as the user named folders
    commands = _commands(args, run, factors, *(place.resolve() for place in places))
    told = ["python", *_commands(args, run, factors, *places)[0][1]]
    folder = places[1].resolve()
    if run["trained"] and (folder / _newest(args)).is_file():
        del commands[0]
    return Job({"kind": args.kind, **run, **settings, "command": told}, commands, folder)


def _commands(args, run, factors, data, folder):
    """What a run consists of: [(what it is, its words after `python`), ...]."""
    measuring = ["-m", "moco.measure", str(data), str(folder / "measured.json"), "--factors", *factors]
    if args.read_without:
        measuring += ["--read", str(data.parent / _read_data(args).name)]
    if getattr(args, "renew_statistics", None):
        measuring += ["--renew-statistics"]
    if not run["trained"]:
        flags = _flags("--untrained", a=args.arch, image_size=args.image_size, seed=run["seed"],
                       random_bits=run["bits"])  # fmt: skip
        return [("measure", [*measuring, *flags])]
    pretraining = _pretraining(args, run, data, folder)
    return [("pretrain", pretraining), ("measure", [*measuring, "--pretrained", str(folder / _newest(args))])]


def _newest(args):
    """The name of the checkpoint that a finished run leaves."""
    return f"checkpoint_{args.epochs - 1:04d}.pth.tar"


def _pretraining(args, run, data, folder):
    """The words of main_moco.py for one run."""
    words = ["main_moco.py", str(data), "--mlp", "--cos", RECIPES[run["recipe"]]]
    words += _flags(
        a=args.arch, image_size=args.image_size, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
        moco_k=args.moco_k, moco_m=args.moco_m, moco_t=run["T"], bn_splits=args.bn_splits, seed=run["seed"],
        random_bits=run["bits"], workers=0, print_freq=10**6, output_dir=folder, resume="auto",
    )  # fmt: skip
    words += ["--recolor"] if getattr(args, "recolor", None) else []
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


if __name__ == "__main__":
    run_program(main)
