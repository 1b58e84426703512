"""Random bits as a shortcut (RandBit; Chen, Luo & Li 2021, section 4): runs and their linear readouts.

    python -m moco.shortcuts randbit --bits 0 4 8 12 --moco-t 0.07 0.2 --out runs/randbit
    python -m moco.shortcuts randbit --bits 8 --method infonce ifm match_ifm --epsilon 0.5 --out runs/randbit

Every combination of bits, temperature, keys, method, epsilon and seed is a run. A sweep can be stopped
(Ctrl-C) and continued by the same command, also with other values: results stay.
"""

import itertools
import os
from pathlib import Path

import torch

from moco import options, trifeature
from moco.encoders import check_image_size
from moco.errors import Parser, UserError, interrupt_on_signals, printable, run_program
from moco.files import atomic_file
from moco.plot import save_picture
from moco.run.launch import Rank
from moco.run.resources import available_cores
from moco.run.signals import EXIT_CODE, StopRequest
from moco.shortcuts import sweep
from moco.shortcuts.figure import course_figure, figure_of
from moco.shortcuts.report import INFONCE, MATCH, limits, number, settings_of, table

PROJECT = Path(__file__).resolve().parents[2]
MOST_JOBS = 12  # by default: each keeps a core busy, also on a GPU
RENDERS = 4  # of each of Trifeature's combinations: 3,200 images in train/

# How runs train unless flags of main_moco.py say otherwise.
DEFAULTS = "-a conv3 --image-size 32 --epochs 30 -b 128 --lr 0.1 --moco-m 0.99 --bn-splits 4"
FIXED = "--mlp --cos --resize pil --device-aug off --workers 0 --cache decoded --print-freq 5"
# Flags of main_moco.py that a sweep sets itself, and what to give instead, or nothing.
SET = {"--seed": "--seeds", "--random-bits": "--bits", "--output-dir": "--out", "--resume": None}
SET |= {"--match-ifm": "--method match_ifm", "--alpha": None, "--dataset": None, "--images": None}
SET |= dict.fromkeys(["--pretrained", "--start-epoch", "--dataset-root", "--dataset_root", "--schedule"])
SET |= dict.fromkeys(["-j", "-p", *(word for word in FIXED.split() if word.startswith("--"))])
EPSILON = [0.1, 0.5]
# Settings that differ between runs
SWEPT = ("moco_t", "moco_k", "random_bits", "bits_per", "method", "match_ifm", "epsilon", "alpha", "seed")


def parse_args():
    """(the sweep's own flags, the others, which are main_moco.py's)."""
    parser = Parser(
        prog="python -m moco.shortcuts",
        usage="python -m moco.shortcuts randbit --out DIR [flags, also main_moco.py's]",
        description="Pre-train encoders by main_moco.py on images with random bits, which both views share, "
        "and measure what a linear classifier reads from them.",
        epilog=f"All other flags are given to main_moco.py. Its defaults are here {DEFAULTS} --crops-only "
        f"(unless --aug-plus is given), and always {FIXED}.",
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=["randbit"], help="the only one so far")
    add = parser.add_argument_group("what differs between runs (every combination is one)").add_argument
    for flag, kind, default, text in (
        ("--bits", int, [0, 2, 4, 6, 8, 10, 12], "random bits"),
        ("--moco-t", float, [0.07, 0.1, 0.2], "temperatures"),
        ("--moco-k", int, [1024], "sizes of the queue"),
        ("--epsilon", float, EPSILON, "of all methods but infonce"),
        ("--seeds", int, [0, 1, 2], "a run each"),
    ):
        words = " ".join(map(str, default))
        add(flag, type=kind, nargs="+", default=default, metavar="X", help=f"{text} (default: {words})")
    parser.set_defaults(epsilon=None)  # to see whether it is given
    add(
        "--method",
        nargs="+",
        default=[INFONCE],
        choices=[INFONCE, "ifm", "ifm_only", f"{MATCH}ifm", f"{MATCH}ifm_only"],
        metavar="X",
        help="infonce, ifm, ifm_only, and the controls match_ifm, match_ifm_only: InfoNCE times the factor "
        "by which IFM would lengthen the gradient (default: infonce)",
    )
    add(
        "--bits-per",
        nargs="+",
        default=["image"],
        choices=["image", "view"],
        metavar="X",
        help="image, or the control view: drawn anew for each view (default: image)",
    )
    add = parser.add_argument_group("running").add_argument
    add("--out", required=True, metavar="DIR", help="folder of the sweep, continued when it exists")
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    add("--jobs", type=int, metavar="N", help=f"runs in parallel (default: the cores, at most {MOST_JOBS})")
    add("--keep-checkpoints", action="store_true", help="do not remove them once they are measured")
    args, others = parser.parse_known_args()
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    for word in others:
        flag = word.partition("=")[0] if word.startswith("--") else word[:2]  # -j4 is -j 4
        if flag in SET:
            advice = f"give {SET[flag]}" if SET[flag] else "leave it out"
            raise UserError(f"{flag} is set for each run by the sweep itself: {advice}")
    if args.epsilon and set(args.method) == {INFONCE}:
        raise UserError("--epsilon has no effect on InfoNCE: give a --method too, as --method infonce ifm")
    args.epsilon = args.epsilon or EPSILON
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: there is no GPU here; leave the flag out, or use --device cpu")
    return args, others


def runs_of(args):
    """{name: what identifies the run, a dict}: the untrained encoders first, then seed by seed.

    Names as untrained_bits4_seed0, T0.2_K1024_bits4_infonce_seed0, T0.2_K64_bits4_per_view_ifm_eps0.1_seed0.
    """
    runs = {}
    for seed, bits in itertools.product(args.seeds, args.bits):
        runs[f"untrained_bits{bits}_seed{seed}"] = {"trained": False, "seed": seed, "bits": bits}
    values = itertools.product(
        args.seeds, args.bits, args.bits_per, args.moco_t, args.moco_k, args.method, args.epsilon
    )
    for seed, bits, per, T, K, method, epsilon in values:
        if per == "view" and not bits:
            continue
        run = {"trained": True, "seed": seed, "bits": bits, "bits_per": per, "T": T, "K": K, "method": method}
        run["epsilon"] = 0.0 if method == INFONCE else epsilon
        loss = method if method == INFONCE else f"{method}_eps{number(epsilon)}"
        place = f"bits{bits}{'_per_view' * (per == 'view')}"
        runs[f"T{number(T)}_K{K}_{place}_{loss}_seed{seed}"] = run
    return runs


def words_of(run, data, folder, others):
    """The words of main_moco.py's command line after its name; of an untrained encoder, those that decide how
    such a run starts.
    """
    recipe = [] if "--aug-plus" in others else ["--crops-only"]
    words = [str(data), *DEFAULTS.split(), *recipe, *others, *FIXED.split()]
    own = {"random-bits": run["bits"], "seed": run["seed"]}
    if run["trained"]:
        own |= {"moco-t": run["T"], "moco-k": run["K"], "bits-per": run["bits_per"]}
        own |= {"output-dir": folder, "resume": "auto"}
        if run["method"] != INFONCE:
            own |= {"method": run["method"].removeprefix(MATCH), "epsilon": run["epsilon"]}
            words += ["--match-ifm"] * run["method"].startswith(MATCH)
    return words + [str(word) for name, value in own.items() for word in (f"--{name}", value)]


def device_names(device):
    """What CUDA_VISIBLE_DEVICES is to be for each of the devices: all GPUs visible here, or no GPU."""
    if device == "cpu":
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def job_of(name, run, data, out, others, epochs):
    """The sweep.Job of a run: training, unless its last checkpoint is there, and its measurement."""
    folder = Path(out, "runs", name)
    newest = folder / f"checkpoint_{epochs - 1:04d}.pth.tar"
    words = words_of(run, data, folder, others)
    measure = ["-m", "moco.shortcuts.measure", str(folder / sweep.MEASURED), *words]
    if not run["trained"]:
        return sweep.Job(run | {"command": ["python", *measure]}, folder, [measure])
    train, measure = [str(PROJECT / "main_moco.py"), *words], [*measure, "--pretrained", str(newest)]
    commands = [measure] if newest.is_file() else [train, measure]
    lowest = limits(run["T"], run["K"], run["bits"], run["bits_per"])
    return sweep.Job(run | lowest | {"command": ["python", "main_moco.py", *words]}, folder, commands)


def write_report(out, results):
    """Write table.md and, with matplotlib, figure.png and course.png into the folder `out`. Returns what to
    print.
    """
    if not any("readout" in run for run in results):
        return "nothing to show yet"
    text, paths = table(results), [Path(out, name) for name in ("table.md", "figure.png", "course.png")]
    with atomic_file(paths[0]) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if not settings_of(results):
        return f"{text}\n{printable(paths[0])}"
    try:
        for draw, path in zip((figure_of, course_figure), paths[1:], strict=True):
            save_picture(draw(results), path)
    except UserError as error:
        return f"{text}\n{printable(paths[0])}; no figure: {error}"
    return f"{text}\n{', '.join(map(printable, paths))}"


def main():
    args, others = parse_args()
    if not (PROJECT / "main_moco.py").is_file():
        raise UserError("this trains by main_moco.py, which is not installed with moco: start it in a clone")
    interrupt_on_signals()
    data, runs = Path(args.out, "data"), runs_of(args)
    # main_moco.py's own checks of every command, before anything is written
    *_, training = (options.pretraining(words_of(run, data, "runs", others)) for run in runs.values())
    check_image_size(training.arch, training.image_size, stem=training.stem)
    shared = options.settings(training, seed=None)
    settings = {name: value for name, value in shared.items() if name not in SWEPT}
    settings["device"] = args.device
    with sweep.opened(args.out, settings):
        trifeature.generate(data, 2 * training.image_size, RENDERS)
        finished = {result["name"] for result in sweep.read_results(args.out)}
        unfinished = {name: run for name, run in runs.items() if name not in finished}
        jobs = [job_of(*run, data, args.out, others, training.epochs) for run in unfinished.items()]
        parallel = args.jobs or min(available_cores(), MOST_JOBS)
        print(f"{len(runs)} runs ({len(runs) - len(jobs)} finished), {parallel} in parallel on {args.device}")
        path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        environments = [environment | {"CUDA_VISIBLE_DEVICES": name} for name in device_names(args.device)]
        with StopRequest(Rank.alone()) as stop:
            failures = sweep.run_jobs(args.out, jobs, parallel, environments, stop, args.keep_checkpoints)
            results = sweep.read_results(args.out)
            print(write_report(args.out, results))
            if stop.name and len(results) < len(finished) + len(jobs):
                print(f"stopped by {stop.name}; continue with the same command")
                raise SystemExit(EXIT_CODE)
    if failures:
        print(f"runs that failed: {len(failures)}; the same command tries them again")
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main, "python -m moco.shortcuts")
