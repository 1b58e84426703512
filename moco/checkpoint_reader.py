"""Reading checkpoint files, also of strangers: damage is found, and nothing in them is run."""

import zipfile
from pathlib import Path

import torch

from moco.errors import UserError, first_line
from moco.seal import check_seal

# What DistributedDataParallel and torch.compile put before or into the names of a model's tensors.
WRAPPER_PREFIX = "module."
COMPILE_MARK = "_orig_mod."

# What entries of a checkpoint are, where there are any.
KINDS = {
    "epoch": int,
    "step": int,
    "seed": int,
    "arch": str,
    "best_acc1": (int, float, torch.Tensor),
    **dict.fromkeys(("optimizer", "scaler", "settings", "data", "log", "noted"), dict),
    **dict.fromkeys(("heads", "logs", "classes"), list),
}


def read_checkpoint(path):
    """Read a checkpoint of this program, of MoCo or of IFM as a dict with at least `state_dict`, tensors
    on the CPU.

    A file that holds a bare state_dict is accepted too. Names are without the wrapper's `module.`. Only
    tensors and plain values are read (`weights_only=True`): a pickle that would call code is refused.
    Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    check_seal(path)
    _refuse_compressed(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whatever part of torch reads the damage
        raise UserError(_unreadable(path, error)) from error
    checkpoint = loaded if isinstance(loaded, dict) and "state_dict" in loaded else {"state_dict": loaded}
    state = checkpoint["state_dict"]
    named_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not (named_tensors and state):
        raise UserError(f"{path} holds no state_dict, so it is not a checkpoint of a model")
    return {**checkpoint, "state_dict": plain_names(state)}


def plain_names(state_dict):
    """The same tensors without the marks of DistributedDataParallel and torch.compile in their names."""
    return {
        name.replace(COMPILE_MARK, "").removeprefix(WRAPPER_PREFIX): tensor
        for name, tensor in state_dict.items()
    }


def check_kinds(checkpoint, path):
    """Raise UserError when an entry to go on from is not what this program, and upstream's, puts there."""
    for name, kind in KINDS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            found = type(checkpoint[name]).__name__
            raise UserError(f"{path} is no checkpoint of this program: its entry {name} is of type {found}")
    for name, plausible in CONTENTS.items():
        if checkpoint.get(name) is not None and not plausible(checkpoint[name], checkpoint):
            raise UserError(f"{path} is no checkpoint of this program: its entry {name} holds other things")


def _is_count(value, _):
    return value >= 0


def _is_number(value, _):
    return not isinstance(value, torch.Tensor) or value.numel() == 1


def _is_sums(value, _):
    """Whether it is what moco.meters.StepLog.state_dict gives."""
    return isinstance(value, dict) and all(
        isinstance(pair, tuple) and list(map(type, pair)) == [torch.Tensor, int] and pair[0].numel() == 1
        for pair in value.values()
    )


def _is_sums_of_heads(value, checkpoint):
    """Whether it has, for each process, the sums of each head; or nothing."""
    heads, processes = len(checkpoint.get("heads", ())), checkpoint.get("data", {}).get("processes")
    return len(value) in (0, processes) and all(
        isinstance(of_process, list) and len(of_process) == heads
        and all(_is_sums(sums, checkpoint) for sums in of_process)
        for of_process in value
    )  # fmt: skip


def _is_names(value, _):
    return all(isinstance(name, str) for name in value)


def _is_confusion(value, checkpoint):
    """Whether it is what moco.linear_report.confusion_of gives for the classes of the checkpoint."""
    classes = len(checkpoint.get("classes", ()))
    return isinstance(value, list) and all(
        isinstance(row, list) and list(map(type, row)) == [int] * 3
        and 0 <= row[0] < classes and 0 <= row[1] < classes and row[2] > 0
        for row in value
    )  # fmt: skip


# What must hold of an entry of that kind: functions of it and the checkpoint.
CONTENTS = {
    **dict.fromkeys(("epoch", "step"), _is_count),
    "best_acc1": _is_number,
    **dict.fromkeys(("log", "noted"), _is_sums),
    "logs": _is_sums_of_heads,
    "classes": _is_names,
    "confusion": _is_confusion,
}


def _refuse_compressed(path):
    # torch writes its zip entries uncompressed; a compressed one could unpack to any size.
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception as error:  # zipfile has one for each kind of damage
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); it is damaged") from error
    if packed:
        raise UserError(
            f"{path} is a compressed archive, which torch never writes; refused: it could be a zip bomb"
        )


def _unreadable(path, error):
    """Why torch could not read a file; its own message advises to switch the protection off."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if not head:
        return f"{path} is empty; copy or download it again"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, not a checkpoint; open it to read what the server answered"
    calls = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    if calls:
        return (
            f"{path} holds more than tensors and plain values, so reading it could run code; "
            f"refused ({calls[0][:160]})"
        )
    said = first_line(error)
    why = "" if said.startswith("Weights only load failed") else f" ({said})"  # followed by advice of torch's
    return f"{path} is damaged or not a checkpoint of torch{why}; copy or download it again"
