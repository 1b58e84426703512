"""`python -m moco.bench step`: checks of the device; rates of the published training step, of this program's
with each flag and of its encoders alone, in turns on images that are on the device; and parts of a step.
"""

import contextlib
import gc
import math
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, count

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import profile

from moco import losses
from moco.bench import checks
from moco.bench.data import Images, photographs
from moco.bench.report import about, in_turns, spread, timed
from moco.bench.training import (
    ALPHA,
    DIM,
    EPSILON,
    SEED,
    Encoders,
    PublishedTraining,
    T,
    Training,
    published_logits,
)
from moco.data.augment import moco_v2
from moco.data.device import DeviceAugment
from moco.data.folders import pretraining_images
from moco.data.loader import TrainLoader
from moco.errors import UserError, first_line
from moco.progress import Progress
from moco.run.resources import available_cores

PARTS = ("checks", "loss", "augmentation")  # what --only may name besides rows
BASES = {"of the ceiling": "ceiling", "of published": "published"}
IMAGENET100 = 126_689 * 200  # pairs of 200 epochs


def rows_of(device, bn_splits, augmented=None):
    """{name: (title, kind of Training, its options)} of the ways to run a step on a device. augmented(steps):
    views that the device makes of pixels which are there.
    """
    on_cuda, bf16 = device.type == "cuda", {"amp": torch.bfloat16}
    fast = bf16 | {"compile": True} if on_cuda else {}
    unsplit = {"channels_last": True, "bn_splits": 1} | fast
    fast = {"channels_last": on_cuda or bn_splits == 1} | fast  # as --fast
    rows = {
        "published": ("published", PublishedTraining, {}),
        "here": ("here", Training, {}),
        "channels_last": ("here, --channels-last", Training, {"channels_last": True}),
        "amp": ("here, --channels-last, --amp", Training, {"channels_last": True} | bf16),
        "fast": ("here, --fast", Training, fast),
        "fast_v2": ("here, --fast, MoCo v2", Training, fast | {"method": None}),
        "augmented": ("here, --fast, augmented", Training, fast | {"batches": augmented}),
        "fast_unsplit": ("here, --fast --bn-splits 1", Training, unsplit),
        "ceiling": ("ceiling: the encoders alone", Encoders, unsplit),
    }
    if not on_cuda:
        del rows["amp"], rows["augmented"]
    return rows


def measure(s, rounds, only=None, folder=None, workers=None):
    """The report (moco.bench.report). s: a Setting; rounds: turns of each row; only: names of rows and PARTS,
    None for all; folder: a data set with train/, to measure the --fast step from files too, or "" to make
    images; workers: of its loader, None for one per core. Raises UserError.
    """
    known = [*rows_of(s.device, s.bn_splits), *PARTS]
    only = only or known
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]}: on {s.device.type} there are {', '.join(known)}")
    report = {"about": {}, "checks": {}, "tables": {}, "notes": []}
    with contextlib.ExitStack() as stack:
        loader = None
        if folder is not None:
            workers = available_cores() if workers is None else workers
            loader = stack.enter_context(loader_of(s, folder, workers))
        augment = batch = None
        if loader or {"checks", "augmentation", "augmented"} & {*only}:
            augment = DeviceAugment(moco_v2(), s.device, True, (2 * s.batch_size, s.size))
            batch = s.batch()
        rows = rows_of(s.device, s.bn_splits, lambda steps: map(augment, [batch] * steps))
        fast = rows["fast"]
        rows = {name: row for name, row in rows.items() if name in only}
        if loader:
            title = f"here, --fast, from files, {workers} workers"
            rows |= {"fast": fast, "files": (title, Training, fast[2] | from_files(s, loader, augment))}

        if "checks" in only:
            report["checks"] = checks.measure(checks_of(s, augment, batch))
        if rows:
            report["tables"] |= measure_steps(s, rounds, rows, report["notes"])
        parts = {
            "losses: N 256, K 65536": ("loss", measure_loss, ()),
            f"augmentation of {s.batch_size} pairs of {s.size} px": (
                "augmentation",
                measure_augmentation,
                (augment, batch),
            ),
        }
        for title, (name, function, arguments) in parts.items():
            if name in only:
                work = partial(function, s.device, rounds, s.steps, *arguments)
                report["tables"][title] = attempt(title, work, s.device, report["notes"]) or {}
    setting = {name: value for name, value in asdict(s).items() if name != "device"}
    return report | {"about": about(s.device, **setting, rounds=rounds)}


def checks_of(s, augment, batch):
    """The checks (moco.bench.checks) by name. The resumed run is a small one, and not compiled: a compiler
    for CUDA chooses by time between programs that round differently.
    """
    size, n, k = min(s.size, 64), min(s.batch_size, 4 * s.bn_splits), min(s.moco_k, 1024)
    small = replace(s, size=size, batch_size=n, moco_k=k)
    options = {"channels_last": True, "amp": torch.bfloat16} if s.device.type == "cuda" else {}
    return {
        "exact pixels": partial(checks.pixels, augment, batch),
        "resume": partial(checks.resume, partial(Training, small, small.images(), **options)),
        "BatchNorm over groups": partial(checks.batchnorm, s.bn_splits, s.device),
    }


def attempt(title, work, device, notes):
    """What work() returns, or None when it fails, and a note says why. Memory is given back before."""
    if device.type == "cuda":
        gc.collect()  # a compiled network refers to itself
        torch.cuda.empty_cache()
    try:
        return work()
    except RuntimeError as error:  # too little memory, no bf16, no compiler
        notes.append(f"left out: {title} ({type(error).__name__}: {first_line(error)})")
    return None


def measure_steps(s, rounds, rows, notes):
    """Tables of training steps, {title: rows}. A row that fails is empty, and a note says why."""
    images, runs, needs = s.images(), {}, {}

    def start(name):
        _, kind, options = rows[name]
        runs[name], needs[name] = first_steps(s, images, kind, options)

    def turn(name, _):
        if name not in runs:
            return math.nan
        taken = attempt(rows[name][0], partial(seconds_of_pair, runs[name]), s.device, notes)
        if taken is None:
            del runs[name]
        return taken or math.nan

    with Progress("first steps, with compilation", len(rows), "rows") as progress:
        for name, (title, *_) in rows.items():
            attempt(title, partial(start, name), s.device, notes)
            progress.update()
    seconds = in_turns({name: partial(turn, name) for name in runs}, rounds, "steps") if runs else {}
    seconds = {name: seconds[name] for name in runs}  # those without a turn that failed

    rates, ratios = {title: {} for title, *_ in rows.values()}, {}
    for name, taken in seconds.items():
        rates[rows[name][0]] = {
            "pairs/s": spread(1 / taken),
            **{column: spread(seconds[base] / taken) for column, base in BASES.items() if base in seconds},
        }
        needs[name]["ImageNet-100, h"] = IMAGENET100 * float(np.median(taken)) / 3600
    resident = "augmented" if s.device.type == "cuda" else "fast"
    for title, (numerator, denominator) in {
        "IFM / plain": ("fast", "fast_v2"),
        "augmented / not": ("augmented", "fast"),
        "from files / from memory": ("files", resident),
    }.items():
        if numerator in seconds and denominator in seconds:
            ratios[title] = seconds[denominator] / seconds[numerator]
    if "files" in seconds and resident in seconds:
        ratios["share of waiting for files"] = 1 - ratios["from files / from memory"]
    return {
        "a step": rates,
        "what it takes": {title: needs.get(name, {}) for name, (title, *_) in rows.items()},
        **({"rates of --fast": {t: {"ratio": spread(r)} for t, r in ratios.items()}} if ratios else {}),
    }


def first_steps(s, images, kind, options):
    """A Training that has compiled, and {column: number or text} on what its steps take."""
    on_cuda = s.device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_cuda else 0
    run = kind(s, images, **options)
    loss = float(run(1))
    needs = {"precision": run.precision, "first loss": loss if math.isfinite(loss) else None}
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run(1)
        needs["host ms"] = 1000 * (time.perf_counter() - start)
        needs["GB"] = (torch.cuda.max_memory_allocated() - held) / 1e9
    return run, needs


def seconds_of_pair(run):
    """The time of a turn divided by its pairs."""
    s = run.s
    if s.device.type == "cuda":
        run(1)  # takes the memory that other rows have given back
    return timed(partial(run, s.steps), s.device) / (s.steps * s.batch_size)


@contextlib.contextmanager
def loader_of(s, folder, workers):
    """A TrainLoader as --fast has it, for what pre-training takes from `folder` or, of "", made images.
    Raises UserError.
    """
    on_cuda, steps = s.device.type == "cuda", steps_from_files(s)
    settings = {"size": s.size, "batch_size": s.batch_size, "workers": workers, "device": s.device}
    settings |= {"resize": "torch" if on_cuda else "pil", "photometric": not on_cuda}
    with contextlib.ExitStack() as stack:
        if folder:
            images = pretraining_images(folder)
        else:
            paths = stack.enter_context(photographs(None, 64))
            images = Images(paths * math.ceil(steps * s.batch_size / len(paths)), s.size)
        loader = TrainLoader(images, moco_v2(), seed=SEED, **settings)
        stack.callback(loader.close)
        if len(loader) < steps:
            raise UserError(f"{images.root} has images for {len(loader)} steps, not {steps}; lower --steps")
        yield loader


def from_files(s, loader, augment):
    """The options of a Training on the loader's images; augment: a DeviceAugment for CUDA."""
    if s.device.type != "cuda":
        augment = DeviceAugment(moco_v2(), s.device, photometric=False)
    epochs = count()

    def batches(steps):  # the last of an epoch, so that workers rest when other rows take their turns
        return map(augment, loader.epoch(next(epochs), first_step=len(loader) - steps))

    return {"batches": batches, "steps": steps_from_files(s)}


def steps_from_files(s):
    """Steps of a turn: on CUDA many, so that the wait for the first is a small part."""
    return 4 * s.steps if s.device.type == "cuda" else s.steps


def measure_loss(device, rounds, steps, batch_size=256, moco_k=65536):
    """Rows of a table: both losses, their gradient and the accuracy alone, as published and as here."""
    generator = torch.Generator(device).manual_seed(SEED)
    q, k, queue = (
        F.normalize(torch.randn(shape, generator=generator, device=device), dim=axis)
        for shape, axis in (((batch_size, DIM), 1), ((batch_size, DIM), 1), ((DIM, moco_k), 0))
    )
    q.requires_grad_()

    def two_cross_entropies():
        logits, logits_ifm, labels = published_logits(q, k, queue, EPSILON, T)
        loss = losses.ifm(logits, logits_ifm, labels, ALPHA)
        return loss, losses.accuracy(logits, labels), torch.autograd.grad(loss, q)

    def one_pass():
        loss, ranks, _ = losses.contrast(q, k, queue, T, losses.weights("ifm", ALPHA), 2 * EPSILON / T)
        return loss, losses.rank_accuracy(ranks), torch.autograd.grad(loss, q)

    def seconds(work, _):
        return timed(lambda: [work() and None for _ in range(steps)], device) / steps

    works = {"two cross-entropies": two_cross_entropies, "one pass (losses.contrast)": one_pass}
    taken = in_turns({name: partial(seconds, work) for name, work in works.items()}, rounds, "loss")
    memory = {name: peak_bytes(work, device) for name, work in works.items()}
    first, _ = works
    return {
        name: {
            "loss": work()[0].item(),
            "MB": memory[name] / 1e6,
            "ms": spread(1000 * taken[name]),
            "of the first's memory": memory[name] / memory[first],
            "of the first's time": spread(taken[name] / taken[first]),
        }
        for name, work in works.items()
    }


def measure_augmentation(device, rounds, steps, augment, batch):
    """Rows of a table: the operations on a Batch of uint8 pixels, alone."""

    def seconds(_):
        return timed(lambda: [augment(batch) and None for _ in range(steps)], device) / steps

    taken = in_turns({"ms": seconds}, rounds, "augmentation")
    memory = peak_bytes(partial(augment, batch), device)
    return {f"on {device.type}": {"ms": spread(1000 * taken["ms"]), "MB": memory / 1e6}}


def peak_bytes(work, device):
    """The peak of the bytes that `work` allocates with torch, on top of those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))  # negative: given back
