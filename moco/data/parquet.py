"""Class folders from parquet files of images and labels, as the Hugging Face hub serves data sets.

Such a file has a column of images, a struct of each one's `bytes` (those of its file) and `path`, and a
column of labels, numbers whose names stand in the JSON that the hub's `datasets` writes into the Arrow
schema: {"info": {"features": {"label": {"names": [...], "_type": "ClassLabel"}}}} under "huggingface".
"""

import contextlib
import io
import json
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from moco.data.decode import TIFF
from moco.errors import UserError, first_line, say
from moco.files import atomic_folder
from moco.progress import Progress

# Words in the names of files, or of the folders that hold them: train-00000-of-00017.parquet, and
# default/train/0000.parquet in the branch with the hub's own conversions.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "val")
ENDINGS = {  # of the images that are read, by how their bytes begin
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"BM": ".bmp",
    b"RIFF": ".webp",
    **dict.fromkeys(TIFF, ".tif"),
    b"P5": ".pgm",
    b"P6": ".ppm",
}
UNLABELED = {None, -1}  # -1: of test images whose labels are secret
CLASSES = "classes.txt"
ROWS = 64  # of images that are in memory together
SAMPLE = 1000  # images, about, whose sizes are read
UNSAFE = frozenset('/\\:*?"<>|')  # in names of files, here or on Windows


@dataclass
class Unpacked:
    """What `unpack` has made.

    images: {"train" and "val": number of images}; names: of the classes, in the order of their labels, as
    the files have them, or None; folders: those of the classes, in the same order; side: the median of the
    short sides, in pixels, of `sampled` images, or None; left_out: {reason: rows}.
    """

    images: dict
    names: list | None
    folders: list
    side: int | None
    sampled: int
    left_out: dict


@dataclass
class _Table:
    """A parquet file: its split, the names of its columns, its class names or None, and {label: rows}.

    text: whether the labels are names themselves.
    """

    path: Path
    split: str
    image: str
    label: str
    text: bool
    names: list | None
    labels: Counter

    def goes_with(self, other):
        """Whether their images and labels can be of one data set."""
        mine, its = ((t.image, t.label, t.text, t.names) for t in (self, other))
        return mine == its


def unpack(paths, out, label=None):
    """Make the folder `out` with train/ and val/ and a folder per class in each from parquet files.

    paths: of the files; their names say the split, and test files are val/ where none is for validation;
    label: the column of labels (default: "label", or the only one with class names). Files of images keep
    their bytes, and their names where they have any. `out`/classes.txt has the names of the class folders,
    a line each, in the order of the labels. A few images are in memory at a time. Returns an Unpacked.
    Raises UserError, or OSError when `out` exists or cannot be written; nothing is at `out` then.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("pyarrow, which reads parquet, is not installed: pip install pyarrow") from error
    tables = _tables(paths, label)
    folders = _class_folders(tables)
    total = sum(table.labels.total() for table in tables)
    every = max(1, total // SAMPLE)
    images, left_out, numbers, sides = Counter(), Counter(), Counter(), []
    with atomic_folder(out) as temporary, Progress("images", total) as progress:
        for table in tables:
            taken, reasons = 0, Counter()
            for image, value in _rows(table, progress):
                number = numbers[table.split]
                numbers[table.split] += 1
                data = image and image["bytes"]
                if value in UNLABELED:
                    reasons["rows without a label"] += 1
                elif not data:
                    reasons["rows without the bytes of an image"] += 1
                elif (ending := _ending(data)) is None:
                    reasons["rows in a format that is not read"] += 1
                else:
                    folder = temporary / table.split / folders[value]
                    _write(folder, image.get("path"), number, ending, data)
                    taken += 1
                    sides += _short_side(data) if number % every == 0 else []
            if reasons and not taken:
                why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
                raise UserError(f"{table.path} has no image that can be read ({why}): choose other files")
            images[table.split] += taken
            left_out += reasons
        if not images.total():
            raise UserError("the parquet files have no rows: choose other files")
        lines = "".join(f"{folder}\n" for folder in folders.values())
        (temporary / CLASSES).write_text(lines, encoding="utf-8")
    side = int(statistics.median(sides)) if sides else None
    return Unpacked(dict(images), tables[0].names, list(folders.values()), side, len(sides), dict(left_out))


def _tables(paths, label):
    """The _Table of each file, train/ first, in the order of their names. Raises UserError."""
    paths = sorted((Path(path).resolve() for path in paths), key=lambda path: (path.name, path))
    for path in paths:
        _check_whole(path)
    tables = [_table(path, label) for path in paths]
    first, parts = tables[0], {}
    if {"val", "test"} <= {table.split for table in tables}:
        raise UserError("files for validation and for testing would both become val/: name only one kind")
    for table in tables:
        table.split = "val" if table.split == "test" else table.split
        if not table.goes_with(first):
            raise UserError(
                f"{table.path} has other columns or class names than {first.path}: name the files of one "
                "data set"
            )
        part = re.search(r"(\d+)-of-(\d+)", table.path.name)
        key = (table.split, *map(int, part.groups())) if part else (table.path, 0, 1)
        if key in parts:
            raise UserError(f"{parts[key]} and {table.path} are the same part of the data: leave one out")
        parts[key] = table.path
    for (split, count), given in Counter((split, count) for split, _, count in parts).items():
        if given < count:
            say(f"note: only {given} of the {count} files of {split}/ are named: not all images", sys.stderr)
    return sorted(tables, key=lambda table: table.split)


def _check_whole(path):
    """Raise UserError unless `path` begins and ends as a parquet file does."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the files in it, as in {path.name}/*.parquet")
    if not path.is_file():
        raise UserError(f"there is no file {path}: download it first, or correct its name")
    with open(path, "rb") as file:
        start = file.read(34)
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read()
    if start == b"version https://git-lfs.github.com":
        raise UserError(f"{path} is what git clone leaves in place of the file: run git lfs pull there")
    if start[:4] != b"PAR1":
        raise UserError(f"{path} is not a parquet file: choose other files")
    if end != b"PAR1":
        raise UserError(f"{path} is not complete: download it again")


def _table(path, label):
    """The _Table of a file; label: the name of its column of labels, or None. Raises UserError."""
    from pyarrow import binary, large_binary, types
    from pyarrow.parquet import ParquetFile

    with _reading(path), ParquetFile(path) as file:
        schema = file.schema_arrow
    found = f"{path} has the columns {', '.join(f'{column.name} ({column.type})' for column in schema)}"
    images = [
        column.name
        for column in schema
        if types.is_struct(column.type)
        and any(part.name == "bytes" and part.type in (binary(), large_binary()) for part in column.type)
    ]
    if not images:
        raise UserError(f"{found}, and none has images with their bytes: choose other files")
    if len(images) > 1 and "image" not in images:
        raise UserError(f"{found}, and several have images, none of them called image: choose other files")

    names = _class_names(schema)
    if label is None:
        candidates = ["label"] if "label" in schema.names else list(names)
        if len(candidates) != 1:
            which = f"labels are in {', '.join(candidates)}" if candidates else "none is called label"
            raise UserError(f"{found}, and {which}: name the one with the classes by --label NAME")
        label = candidates[0]
    elif label not in schema.names:
        raise UserError(f"{found}, and none is --label {label}: name one of them")
    kind = schema.field(label).type
    text = types.is_string(kind) or types.is_large_string(kind)
    if not (text or types.is_integer(kind)):
        raise UserError(f"{found}, and {label} has no numbers or names: name another --label")

    labels = Counter()
    for batch in _batches(path, [label], 1 << 16):
        labels.update(batch.column(0).to_pylist())
    if labels and labels.keys() <= UNLABELED:
        raise UserError(f"{path} has no label in its {labels.total():,} rows: leave it out")
    image = "image" if "image" in images else images[0]
    return _Table(path, _split(path), image, label, text, names.get(label), labels)


def _class_names(schema):
    """{column: class names in the order of the labels} of an Arrow schema, for those with names."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        labels = {name: of for name, of in features.items() if of.get("_type") == "ClassLabel"}
        return {name: [str(text) for text in of["names"]] for name, of in labels.items()}
    except (TypeError, KeyError, ValueError, AttributeError):  # from elsewhere than the hub
        return {}


def _split(path):
    for text in (path.stem, path.parent.name):
        splits = {SPLITS[word] for word in re.split("[^a-z]+", text.lower()) if word in SPLITS}
        if len(splits) == 1:
            return splits.pop()
        if splits:
            break
    raise UserError(
        f"the name of {path} does not say if it is for training or validation: rename it to "
        f"train-{path.name} or validation-{path.name}"
    )


def _class_folders(tables):
    """{label: name of its folder}, in the order of the labels. Raises UserError for labels without a name."""
    rows = {value: table.path for table in tables for value in table.labels if value not in UNLABELED}
    if tables[0].names is not None:
        names = dict(enumerate(tables[0].names))
    elif tables[0].text:
        names = {value: value for value in sorted(rows)}
    else:
        width = len(str(max(rows, default=0)))  # so that 2 comes before 10
        names = {value: f"{value:0{width}d}" for value in sorted(rows) if value >= 0}
    unnamed = [value for value in rows if value not in names]
    if unnamed:
        raise UserError(
            f"{rows[unnamed[0]]} has the label {unnamed[0]}, and there are {len(names)} classes, from 0 on: "
            "download it again, or name another --label"
        )
    folders, used = {}, set()
    for number, (value, name) in enumerate(names.items()):
        folder = _safe(name) or "class"
        while folder.casefold() in used:  # as some file systems compare
            folder += f"_{number}"
        used.add(folder.casefold())
        folders[value] = folder
    return folders


def _safe(text):
    """A text as the name of a visible file in one folder, at most 200 bytes long; "" if nothing is left."""
    text = "".join("_" if letter in UNSAFE or not letter.isprintable() else letter for letter in text)
    text = text.encode()[:200].decode(errors="ignore").rstrip(" .").lstrip(" ")
    return f"_{text[1:]}" if text.startswith(".") else text


def _ending(data):
    return next((ending for start, ending in ENDINGS.items() if data.startswith(start)), None)


def _write(folder, path, number, ending, data):
    """Write an image below the name that it had (path, or None), if that is new, else with its number."""
    name = _safe(PurePosixPath((path or "").replace("\\", "/")).name)
    name = re.sub(r"\.(jpe?g|png|bmp|webp|tiff?|p[gp]m)$", "", name, flags=re.IGNORECASE) or f"{number:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with open(folder / f"{name}{ending}", "xb") as file:
                file.write(data)
            return
        except FileExistsError:
            name += f"-{number}"


def _short_side(data):
    """[short side of an image in pixels], or [] when it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return [min(image.size)]
    except Exception:  # Pillow raises many kinds; moco.check names such images
        return []


def _rows(table, progress):
    """(image, label) of each row of a _Table; counts them in a Progress."""
    for batch in _batches(table.path, [table.image, table.label], ROWS):
        yield from zip(
            batch.column(table.image).to_pylist(), batch.column(table.label).to_pylist(), strict=True
        )
        progress.update(len(batch))


def _batches(path, columns, rows):
    """The columns of a parquet file as record batches of at most `rows`, read as they are asked for."""
    from pyarrow.parquet import ParquetFile

    with _reading(path):  # by default all of a file would be in memory
        file = ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    with file:
        batches = file.iter_batches(rows, columns=columns)
        while True:
            with _reading(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@contextlib.contextmanager
def _reading(path):
    """Raise UserError when a parquet file cannot be read."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): download it again") from error
