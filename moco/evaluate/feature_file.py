"""Files of features: an .npz, or an .npy with the table of its images in a .csv, and read back.

Both hold the same, as a dict of arrays that NumPy loads without pickle:

    features    float32 (N, D)
    paths       (N,) text: of the images, relative to the folder that was named, as os.fsdecode gives them
    labels      int64 (N,), numbers of classes; missing where images have none
    classes     text: their names
    checkpoint  text, JSON: which network gave the features
"""

import contextlib
import csv
import json
import tempfile
from pathlib import Path

import numpy as np

from moco.errors import UserError, first_line
from moco.files import atomic_file, check_free

SUFFIXES = (".npz", ".npy")
BYTES = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # of a .csv: names as they are


def files_of(path):
    """The Paths that `write_features(path, ...)` writes, the one that says that all are complete first.

    Raises UserError when the name has another ending.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} must end in .npz (one file), or .npy (features) for a .csv (paths) beside it"
        )
    return [path] if path.suffix == ".npz" else [path, path.with_suffix(".csv"), path.with_suffix(".json")]


def check_writable(path, force):
    """Raise UserError unless `write_features(path, ...)` can write; with `force` it may replace files."""
    for file in files_of(path):
        check_free(file, force)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{Path(path).name}.", dir=Path(path).parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error


def write_features(path, arrays):
    """Write the dict of arrays described above; every file is complete or absent. Raises UserError."""
    try:
        with contextlib.ExitStack() as opened:  # which renames in reverse order
            files = [opened.enter_context(atomic_file(file)) for file in files_of(path)]
            with open(files[0], "wb") as file:
                if len(files) == 1:
                    np.savez(file, **arrays)
                    return
                np.save(file, arrays["features"])
            with open(files[1], "w", **BYTES) as file:
                csv.writer(file).writerows(_rows(arrays))
            files[2].write_text(f"{arrays['checkpoint']}\n")
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write {path} ({reason}); free space, or choose another place") from error


def _rows(arrays):
    if "labels" not in arrays:
        return [["path"], *([name] for name in arrays["paths"])]
    classes = arrays["classes"][arrays["labels"]]
    return [["path", "label", "class"], *zip(arrays["paths"], arrays["labels"], classes, strict=True)]


def read_features(path):
    """The dict of arrays in a file that `write_features` wrote; of others what is there. Raises UserError.

    From an .npz at least `features` is needed, and beside an .npy no .csv; labels without names get their
    numbers for names.
    """
    files = files_of(path)
    try:
        loaded = np.load(files[0], allow_pickle=False)
        arrays = dict(loaded) if files[0].suffix == ".npz" else {"features": loaded}
        if len(files) > 1 and files[1].is_file():
            with open(files[1], **BYTES) as file:
                table = list(csv.DictReader(file))
            arrays["paths"] = np.array([row["path"] for row in table])
            if table and "class" in table[0]:
                names = np.array([row["class"] for row in table])
                arrays["labels"] = labels = np.array([row["label"] for row in table], np.int64)
                arrays["classes"] = np.zeros(labels.max() + 1, names.dtype)  # "" for those without images
                arrays["classes"][labels] = names
        if len(files) > 1 and files[2].is_file():
            arrays["checkpoint"] = np.array(json.dumps(json.loads(files[2].read_text())))
    except Exception as error:  # NumPy, zipfile and csv have an exception of their own for each damage
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read as features ({reason}); write it by moco.embed") from error
    features, labels = arrays.get("features"), arrays.get("labels")
    is_whole = features is not None and features.ndim == 2 and features.dtype.kind == "f"
    if is_whole and labels is not None and len(labels):
        is_whole = labels.shape == features.shape[:1] and labels.dtype.kind in "iu" and labels.min() >= 0
        if is_whole and "classes" not in arrays:
            arrays["classes"] = np.arange(labels.max() + 1).astype(str)
        is_whole = is_whole and labels.max() < len(arrays["classes"])
    if not is_whole:
        has = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise UserError(f"{path} holds no features N x D with a label each ({has}); write it by moco.embed")
    return arrays
