"""The Trifeature data (Hermann & Lampinen 2020, arXiv 2006.12433): a shape with a texture and a color.

    python -m moco.trifeature data/trifeature         all 1000 combinations, 10 renders of each, 128 pixels
    python -m moco.trifeature --sheet sheet.png       one picture of all 30 values, to look at

800 combinations are drawn in train/, the other 200 in val/, a folder each: train/triangle_solid_red/0.png.
Whoever knows the three factors can name a combination that was never shown.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from moco.cores import available_cores
from moco.errors import UserError, run_program
from moco.factors import COMBINATIONS, FACTORS, SETTINGS, hidden
from moco.files import atomic_file, atomic_folder
from moco.progress import Progress
from moco.trifeature_draw import contact_sheet, render

VERSION = 1  # of the drawing: raised when the same settings give other pixels
SIZES = range(16, 1025)  # pixels: a smaller shape is a blot; a larger image takes more than 1 GB to draw


def held_out(seed):
    """The 200 combinations for validation, as a set of (shape, texture, color); the seed chooses which.

    The values of each factor are numbered at random, and the combinations whose numbers sum to 0 or 1
    (mod 10) are held out: for any values of two factors these are two values of the third. So every value is
    held out in exactly 20 of its 100 combinations, every pair of values in exactly 2 of its 10.
    """
    rng = _rng(seed)
    numbers = [dict(zip(names, rng.permutation(10).tolist(), strict=True)) for names in FACTORS.values()]
    return {
        combination
        for combination in COMBINATIONS
        if sum(number[value] for number, value in zip(numbers, combination, strict=True)) % 10 < 2
    }


def generate(out, size=128, renders=10, seed=0, workers=None, progress=True, force=False, hide=None):
    """Draw the data set into the folder `out`, which appears when it is complete.

    Each image depends on (size, seed, combination, render number) alone, not on the number of processes,
    `workers` (default: one per core). `force` replaces an earlier Trifeature set. `hide` is "color" or
    "color=blue": all images have the first value of that factor, or the one named, whatever their folders
    say; all else is drawn as without it. UserError for settings out of range, an `out` that exists, or one
    that cannot be written.
    """
    workers = min(available_cores() if workers is None else workers, len(COMBINATIONS))
    _check_settings(size, seed, renders, workers)
    if hide is not None:
        hidden(hide)
    out = Path(out).resolve()
    try:
        _check_free(out, force)
        with atomic_folder(out, replace=force) as folder:
            total, stream = renders * len(COMBINATIONS), None if progress else io.StringIO()
            with Progress("drawing Trifeature", total, "images", stream=stream) as bar:
                _draw_in_processes(folder, size, renders, seed, workers, bar, hide)
            (folder / SETTINGS).write_text(json.dumps(settings_of(size, renders, seed, hide)) + "\n")
    except OSError as error:
        raise _unwritable(out, error) from error


def settings_of(size, renders, seed=0, hide=None):
    """What SETTINGS holds of a set that was drawn so."""
    settings = {"version": VERSION, "size": size, "renders": renders, "seed": seed}
    return settings | ({"hide": hide} if hide else {})


def ensure(out, size=128, renders=10, seed=0, progress=True, hide=None):
    """Draw the data set unless `out` holds a train/ already; True if it was drawn. Errors as in `generate`.

    Safe in several processes at once: each draws in a folder of its own, the first to finish gives it the
    name, and the others find it there.
    """
    there = Path(out) / "train"  # complete if it exists, for a set appears under its name as a whole
    if there.is_dir():
        return False
    try:
        generate(out, size, renders, seed, progress=progress, hide=hide)
    except UserError:
        if there.is_dir():
            return False
        raise
    return True


def _rng(seed, *place):
    # numbers that depend on the seed and the place alone; PCG64 by name, for numpy's default may change
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=place)))


def _check_settings(size, seed, renders=1, workers=1):
    if size not in SIZES:
        raise UserError(f"--size must be from {SIZES[0]} to {SIZES[-1]} pixels, not {size}")
    for name, value, least in (("seed", seed, 0), ("renders", renders, 1), ("workers", workers, 1)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")


def _check_free(out, force):
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"{out} exists; choose another folder, or --force to replace the data set in it")
    if not (out / SETTINGS).is_file():
        raise UserError(f"{out} is no Trifeature set (it has no {SETTINGS}): --force does not delete it")


def _unwritable(path, error):
    return UserError(f"cannot write {path}: {error.strerror or error}; make room or choose another place")


def _draw_in_processes(folder, size, renders, seed, workers, bar, hide):
    """Draw everything in `workers` processes, and count what they finish in `bar`.

    Each is a fresh Python that imports this module only: a fork would inherit the caller's threads, a spawn
    would repeat its imports. They write a byte per finished combination into one pipe, and end by themselves
    when nobody is left to read it. Ctrl-C does not reach them, for each has a session of its own; this
    process ends them.
    """
    code = "import sys, moco.trifeature as t; t._draw_share(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    command = [sys.executable, "-c", code, *map(str, (folder, hide or "", size, renders, seed, workers))]
    package = Path(__file__).resolve().parent.parent
    finished, report = os.pipe()
    pipes = {"stdout": report, "stderr": subprocess.PIPE}
    children, failed = [], None
    try:
        for share in range(workers):
            arguments = [*command, str(share)]
            child = subprocess.Popen(arguments, cwd=package, text=True, start_new_session=True, **pipes)
            children.append(child)
        os.close(report)  # so that reading ends when the last child does
        report = None
        while failed is None and (done := os.read(finished, 4096)):
            bar.update(len(done) * renders)
            failed = next((child for child in children if child.poll()), None)
        failed = failed or next((child for child in children if child.wait()), None)
        if failed:
            raise OSError(failed.stderr.read().strip() or f"a drawing process ended ({failed.returncode})")
    finally:
        for child in children:
            child.kill()
            child.communicate()
        for end in filter(None, (finished, report)):
            os.close(end)


def _draw_share(folder, hide, size, renders, seed, workers, share):
    """Draw every `workers`-th combination from `share` on: what one of the processes does."""
    validation = held_out(seed)
    factor, value = hidden(hide) if hide else (None, None)
    try:
        for number in range(share, len(COMBINATIONS), workers):
            combination = COMBINATIONS[number]
            split = "val" if combination in validation else "train"
            place = Path(folder, split, "_".join(combination))
            place.mkdir(parents=True)
            seen = [value if f == factor else v for f, v in zip(FACTORS, combination, strict=True)]
            for index in range(renders):
                png = io.BytesIO()  # Pillow forgets the reason when it fails to write to a file
                pixels = render(*seen, size, _rng(seed, number, index))
                Image.fromarray(pixels).save(png, "PNG", compress_level=1)
                (place / f"{index}.png").write_bytes(png.getvalue())
            os.write(1, b".")
    except OSError as error:
        sys.exit(error.strerror)


def _write_sheet(path, size, seed, force):
    _check_settings(size, seed)
    if Path(path).exists() and not force:
        raise UserError(f"{path} exists; choose another name, or --force to replace it")
    try:
        with atomic_file(path) as temporary:
            contact_sheet(size, _rng(seed)).save(temporary, "PNG")
    except OSError as error:
        raise _unwritable(path, error) from error


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.trifeature",
        description="Draw the Trifeature data: 10 shapes x 10 textures x 10 colors on grey; 800 combinations "
        "in OUT/train, the other 200 in OUT/val, a folder each.",
    )
    add = parser.add_argument
    add("out", nargs="?", metavar="OUT", help="folder to make")
    add("--size", type=int, metavar="PIXELS", help="side of an image (default: 128; in a sheet 64)")
    add("--renders", type=int, default=10, metavar="N", help="images per combination (default: 10)")
    add("--seed", type=int, default=0, metavar="S", help="chooses rotations, places and what is in val")
    add("--workers", type=int, metavar="W", help="processes (default: one per core)")
    add("--force", action="store_true", help="replace what was drawn under this name before")
    add("--hide", metavar="FACTOR[=VALUE]",
        help="of shape, texture, color: draw its first value, or this one, everywhere")  # fmt: skip
    add("--sheet", metavar="FILE.png", help="draw one picture of all 30 values instead")
    args = parser.parse_args()
    if (args.out is None) == (args.sheet is None):
        parser.error("name either the folder OUT or --sheet FILE.png")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind then, too

    if args.sheet and args.hide:
        parser.error("a sheet shows all values: leave --hide out")
    size = args.size if args.size is not None else 64 if args.sheet else 128
    if args.sheet:
        _write_sheet(args.sheet, size, args.seed, args.force)
        print(args.sheet)
        return
    generate(args.out, size, args.renders, args.seed, args.workers, force=args.force, hide=args.hide)
    print(f"{args.out}: {800 * args.renders} images in train, {200 * args.renders} in val")


if __name__ == "__main__":
    run_program(main)
