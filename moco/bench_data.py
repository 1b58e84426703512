"""`python -m moco.bench data`: the published pipeline against this program's, measured in turns."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.bench_pipelines import NAMES, pipelines, stage_shares, turn_of
from moco.bench_report import in_turns, machine, spread
from moco.bench_workers import check_shared_memory, end_to_end, transports
from moco.decoders import decode_simplejpeg, decoder, read_pixels
from moco.draws import draw, moco_v2
from moco.errors import UserError
from moco.photographs import make_photographs
from moco.photometric import fastest_finish, seconds, to_device
from moco.progress import Progress
from moco.versions import versions
from moco.workers import worker_errors

DEVICE_PAIRS = 512  # for the time of the device half


def measure(folder, *, images, rounds, size, workers, batch_size, device_aug):
    """The report, a dict that JSON can hold: pairs per second, their ratios, and costs, over rounds.

    folder: of photographs, or None to make some. images: how many. rounds: turns of each pipeline. size:
    side of a view. workers: of the loaders; 0 leaves them out. device_aug: "both", "exact", "float" or
    "off", which device half is timed on a GPU. Raises UserError.
    """
    began = time.monotonic()
    _check(images=images, rounds=rounds, size=size, batch_size=batch_size)
    if workers < 0:
        raise UserError(f"--workers must be 0 or more, not {workers}")
    if workers:
        check_shared_memory(size, batch_size, workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decode, decoder_name = decoder()
    with _photographs(folder, images) as paths, _one_thread():
        report = {
            "images": {"folder": folder, **_described(paths, decode)},
            **_one_core(paths, size, batch_size, rounds, decode is decode_simplejpeg),
        }
        if workers:
            report["transport"] = _transport(size, batch_size, workers, rounds)
            modes = {"off": None, "both": "exact"}
            mode = modes.get(device_aug, device_aug) if device.type == "cuda" else None
            with end_to_end(paths, decode, size, batch_size, workers, device, mode) as epochs:
                report["end_to_end"] = _end_to_end(epochs, rounds)
        report["device_half"] = _device_half(size, device, device_aug)
    return {
        **report,
        "decoder": decoder_name,
        "size": size,
        "rounds": rounds,
        "workers": workers,
        "batch_size": batch_size,
        "hardware": machine(device),
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
    }


def _check(**values):
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@contextlib.contextmanager
def _photographs(folder, count):
    """The paths of `count` images: spread over `folder`, or made in a folder that is removed afterwards."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="moco-bench-") as place:
            try:
                paths = make_photographs(place, count)
            except OSError as error:
                raise UserError(
                    f"{place} cannot hold the images ({error.strerror}); set TMPDIR to a folder with room"
                ) from error
            yield paths
        return
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; leave it out to measure with images made for it")
    found = sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not found:
        raise UserError(f"{folder} holds no image; name a folder of photographs, or leave it out")
    count = min(count, len(found))
    yield [found[number * len(found) // count] for number in range(count)]


def _described(paths, decode):
    """What the images are like. Raises UserError that names one which cannot be read."""
    shapes = np.array([read_pixels(path, decode).shape for path in paths])
    return {
        "count": len(paths),
        "mean_width": round(float(shapes[:, 1].mean()), 1),
        "mean_height": round(float(shapes[:, 0].mean()), 1),
        "mean_kilobytes": round(float(np.mean([os.path.getsize(path) for path in paths])) / 1000, 1),
    }


def _one_core(paths, size, batch_size, rounds, simplejpeg):
    """The part of the report that no other process takes part in."""
    with _pinned() as core:
        runs = pipelines(paths, size, batch_size, simplejpeg)
        turn = turn_of(runs)
        in_turns(runs, 1, turn, lambda: None)  # nothing is fast the first time
        with Progress("one core", rounds, "rounds") as bar:
            taken = in_turns(runs, rounds, turn, bar.update)
        shares = stage_shares(paths, size, batch_size)
    rates = {name: len(paths) / np.array(values) for name, values in taken.items()}
    rows = {
        name: {
            "what": NAMES[name],
            "pairs_per_s": spread(rate),
            "to_published": spread(rate / rates["published"]),
            "to_limit": spread(rate / rates["limit"]),
        }
        for name, rate in rates.items()
    }
    fast = rows["simplejpeg" if simplejpeg else "torch_resize"]
    return {
        "published_pairs_per_s": rows["published"]["pairs_per_s"]["median"],
        "fast_pairs_per_s": fast["pairs_per_s"]["median"],
        "limit_pairs_per_s": rows["limit"]["pairs_per_s"]["median"],
        "fast_to_published": fast["to_published"]["median"],
        "fast_to_limit": fast["to_limit"]["median"],
        "pipelines": rows,
        "published_stages_percent": {name: round(share, 1) for name, share in shares.items()},
        "pinned_to_core": core,
    }


def _transport(size, batch_size, workers, rounds):
    with transports(size, batch_size, workers) as epochs:
        first_starts, taken = _epochs_in_turns(epochs, rounds, "transport")
        rows = {}
        for name, (start, clock, cpu) in taken.items():
            pairs = epochs[name].pairs
            rows[name] = {
                "cpu_ms_per_pair": spread(1000 * cpu / pairs),  # of all processes together
                "clock_ms_per_pair": spread(1000 * (clock - start) / (pairs - batch_size)),
                "first_start_s": round(first_starts[name], 4),
                "later_starts_s": spread(start),
            }
    return rows


def _end_to_end(epochs, rounds):
    first_starts, taken = _epochs_in_turns(epochs, rounds, "end to end")
    rates = {name: epochs[name].pairs / clock for name, (_, clock, _) in taken.items()}
    cpu_rates = {name: epochs[name].pairs / cpu for name, (_, _, cpu) in taken.items()}
    return {
        **{
            name: {
                "pairs_per_s": spread(rates[name]),
                "pairs_per_cpu_s": spread(cpu_rates[name]),
                "first_start_s": round(first_starts[name], 4),
                "later_starts_s": spread(taken[name][0]),
            }
            for name in epochs
        },
        "fast_to_published": spread(rates["fast"] / rates["published"]),
        "fast_to_published_cpu": spread(cpu_rates["fast"] / cpu_rates["published"]),
    }


def _epochs_in_turns(epochs, rounds, label):
    """Seconds until the first batch of the first epoch, and of `rounds` later ones what Epochs.run gives."""
    with worker_errors(), Progress(label, rounds, "rounds") as bar:
        first_starts = {name: each.run()[0] for name, each in epochs.items()}
        taken = {name: [] for name in epochs}
        for _ in range(rounds):
            for name, each in epochs.items():
                taken[name].append(each.run())
            bar.update()
    return first_starts, {name: np.array(values).T for name, values in taken.items()}


def _device_half(size, device, device_aug):
    if device_aug == "off":
        return {"not_run": "--device-aug off"}
    if device.type != "cuda":
        return {"not_run": "torch finds no GPU here, and on a CPU it gains nothing"}
    modes = ("exact", "float") if device_aug == "both" else (device_aug,)
    return {"views": 2 * DEVICE_PAIRS, **device_times(modes, DEVICE_PAIRS, size, device)}


def device_times(modes, pairs, size, device):
    """Milliseconds of the device half for the views of `pairs` pairs, and how it works, by mode."""
    views = np.concatenate([draw(moco_v2(), size, size, 0, 0, index) for index in range(pairs)])
    pixels = torch.randint(0, 256, (len(views), 3, size, size), dtype=torch.uint8, device=device)
    parameters = to_device(views, device)
    times = {}
    for mode in modes:
        finish, how = fastest_finish(moco_v2(), mode, device)
        times[mode] = {"ms": round(1000 * seconds(finish, pixels, parameters), 3), "how": how}
    return times


@contextlib.contextmanager
def _pinned():
    """Stay on one core, whose number it gives, or None where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield max(cores)
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
