"""Reads every image of a data set before a run does: `python -m moco.check DIR` names those that are bad."""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from moco.errors import UserError, run_program

EPILOG = (
    "Exit code 0: every image can be read; 1: some cannot, or a class has no image (each is named); 2: wrong "
    "use. Nothing is changed or written."
)
REMARKS = {
    "orientation": "with an orientation in EXIF, which training ignores: pixels as stored",
    "CMYK": "in CMYK, converted to RGB without their colour profile",
    "16 bits": "with 16 bits a colour, of which the high 8 are used",
    "alpha": "with transparency, which is dropped",
    "huge": "so large that Pillow warns of a decompression bomb",
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.check", description=__doc__.splitlines()[0], epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="data set with train/ and val/ (or one of them), or any folder with one sub-folder per class",
    )
    parser.add_argument(
        "-j", "--workers", type=int, metavar="N", help="processes that read (default: one per core)"
    )
    parser.add_argument(
        "--decoder",
        choices=("pillow", "simplejpeg"),
        help="of JPEG files (default: as in training, simplejpeg if installed)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be 0 (read in this process) or more, not {args.workers}")

    report = check(args.folder, args.workers, args.decoder)
    print(json.dumps(report, indent=1) if args.json else text(report))
    sys.exit(1 if report["bad"] or report["empty_classes"] else 0)


def check(folder, workers=None, name=None):
    """Read all images of a data set as training would: a dict of plain values, as --json prints it.

    folder: holds train/ and/or val/, or the folders of the classes. workers: processes, None for one per
    core; name: of the decoder (moco.decoders). Raises UserError when there is no image.
    """
    from moco.check_files import found_in, read_all  # imports numpy and torch, which --help does not need

    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} to check; name a data set or a folder of images")
    splits = {part.name: part for name in ("train", "val") if (part := Path(folder) / name).is_dir()}
    found = {split: found_in(path, bool(splits)) for split, path in (splits or {"": Path(folder)}).items()}
    paths = [path for split in found.values() for path in split.paths]
    if not paths:
        raise UserError(f"{folder} holds no image; its folders need files such as .jpg, .jpeg or .png")
    read = read_all(paths, str(folder), workers, name)

    report = {"folder": str(folder), "decoder": read.decoder, "images": len(paths), "splits": {}}
    first = 0
    for split, files in found.items():
        report["splits"][split] = files.summary() | read.sizes(first, first + len(files.paths))
        first += len(files.paths)
    report["bad"] = [{"path": paths[index], "reason": reason} for index, reason in sorted(read.bad.items())]
    report["empty_classes"] = [name for split in found.values() for name in split.empty]
    classes = {split: set(files.classes) for split, files in found.items()}
    report["classes_only_in"] = {
        split: sorted(classes[split] - classes[other])
        for split, other in (("train", "val"), ("val", "train"))
        if len(splits) == 2
    }
    report["odd"] = {remark: read.odd[remark] for remark in REMARKS if read.odd[remark]}
    return report


def text(report):
    """The dict of `check` for a person, at 80 columns except for paths."""
    return "\n".join(_lines(report))


def _lines(report):
    for split, values in report["splits"].items():
        name = str(Path(report["folder"]) / split)
        yield f"{name}: {_count(values['images'], 'image')} in {_count(values['classes'], 'class')}"
        if values["width"]:
            yield (
                f"  pixels (smallest, median, largest): width {_three(values['width'])}, "
                f"height {_three(values['height'])}"
            )
        if values["classes"] > 1:
            yield f"  images of a class (smallest, median, largest): {_three(values['images_of_a_class'])}"
        if values["ignored"]:
            yield from _wrapped(
                f"{_count(values['ignored'], 'file')} that training does not use: no image by the "
                f"name, or outside the class folders, such as {values['ignored_example']}"
            )
    if report["odd"]:
        yield "odd, but read:"
        for remark, count in report["odd"].items():
            yield from _wrapped(f"{count} {REMARKS[remark]}")
    for split, names in report["classes_only_in"].items():
        if names:
            yield from _wrapped(
                f"only in {split}/: {_count(len(names), 'class')} ({_some(names)}); linear evaluation "
                "needs the same classes in both",
                indent="",
            )
    for name in report["empty_classes"]:
        yield f"no image in the class folder {name}; training will not start"
    for bad in report["bad"]:
        yield f"bad: {bad['path']}"
        yield from _wrapped(bad["reason"], indent="     ")
    if report["bad"]:
        yield (
            f"{len(report['bad'])} of {_count(report['images'], 'image')} cannot be read: "
            "mend or remove them, or\ntrain with --on-bad-image skip (images of train/ only)"
        )
    else:
        yield f"all {_count(report['images'], 'image')} can be read, by {report['decoder']}"


def _wrapped(line, indent="  "):
    return textwrap.wrap(
        line, 79, initial_indent=indent, subsequent_indent=indent or "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _count(number, noun):
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def _three(numbers):
    return " / ".join(map(str, numbers))


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


if __name__ == "__main__":
    run_program(main)
