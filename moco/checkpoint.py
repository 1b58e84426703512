"""Checkpoint files: written whole or not at all, read without running what is in them."""

import contextlib
import errno
import os
import shutil
import zipfile
from pathlib import Path

import torch

from moco.errors import UserError
from moco.files import atomic_file
from moco.seal import check_seal, sealed
from moco.workers import worker_errors

# What DistributedDataParallel and torch.compile put before or into the names of a model's tensors.
WRAPPER_PREFIX = "module."
COMPILE_MARK = "_orig_mod."


def save_checkpoint(checkpoint, path, before=None):
    """Write a dict of tensors and plain values; `path` shows the old file or the whole new one, never a part.
    before: the name that the old one gets, if it is to stay.

    It is sealed (moco.seal), by which read_checkpoint finds out whether a bit has flipped. Raises UserError
    when the disk is full or the folder cannot be written to.
    """
    begin_saving(checkpoint, path, before)()


def begin_saving(checkpoint, path, before=None):
    """The first half of save_checkpoint, after which the tensors may change. Returns the second, a function
    that waits for the disk and gives the file its name. Both raise UserError as save_checkpoint does.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_writing(path, tensor_bytes(checkpoint)))
        temporary = stack.enter_context(atomic_file(path, before))
        stack.enter_context(sealed(temporary))
        with worker_errors():  # a data worker's death is a RuntimeError too, raised wherever the program is
            torch.save(checkpoint, temporary)
        return stack.pop_all().close


@contextlib.contextmanager
def _writing(path, size):
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write the checkpoint {path} ({_why(error, size, path)}); free space or choose another "
            "--output-dir"
        ) from error


def trained_state(model, optimizer, scaler):
    """The entries of a checkpoint of either program that hold tensors, or go with them."""
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        **({"scaler": scaler.state_dict()} if scaler.is_enabled() else {}),
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


def tensor_bytes(value):
    """Bytes of all tensors in dicts, lists and tuples: nearly all of a checkpoint's file."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return tensor_bytes(list(value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def plain_names(state_dict):
    """The same tensors without the marks of DistributedDataParallel and torch.compile in their names."""
    return {
        name.replace(COMPILE_MARK, "").removeprefix(WRAPPER_PREFIX): tensor
        for name, tensor in state_dict.items()
    }


def encoder_state(checkpoint, path):
    """The backbone's tensors by the names of the plain torchvision model, without its last layer `fc`.

    `checkpoint` is what read_checkpoint returned for `path` (named in messages): of pre-training (the
    query encoder is taken) or of linear evaluation. Raises UserError when it holds neither.
    """
    state = checkpoint["state_dict"]
    if checkpoint.get("settings", {}).get("random_bits"):
        raise UserError(
            f"{path} is of a run with --random-bits, whose encoder takes more than the three channels of an "
            "image; python -m moco.shortcuts randbit measures such encoders"
        )
    query = {name.removeprefix("encoder_q."): t for name, t in state.items() if name.startswith("encoder_q.")}
    backbone = {name: t for name, t in (query or state).items() if not name.startswith("fc.")}
    if not backbone:
        raise UserError(f"{path} holds no encoder: its tensors are {_some(state)}")
    return backbone


def check_arch(checkpoint, arch, path):
    """Raise UserError when the checkpoint read from `path` says that it is of another arch."""
    if checkpoint.get("arch", arch) != arch:
        raise UserError(f"{path} is of -a {checkpoint['arch']}, not of -a {arch}")


def continue_from(checkpoint, path, model, optimizer, epochs, scaler=None):
    """Put the state of a checkpoint of the same program into `model`, `optimizer` and a GradScaler, if it is
    in use and the checkpoint has one. Returns the next epoch.

    Raises UserError when it does not fit or has nothing left to do of `epochs`.
    """
    if not (isinstance(checkpoint.get("epoch"), int) and isinstance(checkpoint.get("optimizer"), dict)):
        raise UserError(f"{path} has no optimizer state, so no run can continue from it")
    load_strictly(model, checkpoint["state_dict"], path)
    try:
        implementation = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, (fused, foreach) in zip(optimizer.param_groups, implementation, strict=True):
            group.update(fused=fused, foreach=foreach)
        _momentum_as_weights(optimizer)
        if scaler is not None and scaler.is_enabled() and "scaler" in checkpoint:
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the optimizer state in {path} is of another model ({_first_line(error)})"
        ) from error
    if checkpoint["epoch"] >= epochs:
        raise UserError(f"{path} has finished {checkpoint['epoch']} epochs; raise --epochs to go on")
    return checkpoint["epoch"]


def load_strictly(model, state_dict, path, may_miss=()):
    """Load `state_dict` into `model`, every tensor of one to one tensor of the other, except the names
    `may_miss`.

    Raises UserError that names what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state_dict.keys() - set(may_miss))
    unexpected = sorted(state_dict.keys() - own.keys())
    other_shape = [
        f"{name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here"
        for name, tensor in state_dict.items()
        if name in own and tensor.shape != own[name].shape
    ]
    wrong = [
        f"{what} {_some(names)}"
        for what, names in (
            ("it lacks", missing),
            ("it has in addition", unexpected),
            ("shapes differ:", other_shape),
        )
        if names
    ]
    if wrong:
        raise UserError(
            f"{path} does not fit this model: {'; '.join(wrong)}. Check --arch, --moco-dim, --moco-k "
            "and --mlp against those of the checkpoint"
        )
    model.load_state_dict(state_dict, strict=not may_miss)


def _why(error, size, path):
    """What the system said; torch's zip writer makes a RuntimeError of a full disk, and does not say it."""
    full = isinstance(error, RuntimeError) and shutil.disk_usage(Path(path).parent).free < size
    return os.strerror(errno.ENOSPC) if full else _first_line(error)


def _momentum_as_weights(optimizer):
    """Give the momentum of each weight the weight's layout in memory, by which fused SGD pairs their values.

    The file may be of a run with another layout (--channels-last).
    """
    for weight, state in optimizer.state.items():
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            state["momentum_buffer"] = torch.empty_like(weight).copy_(buffer)


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
    said = _first_line(error)
    why = "" if said.startswith("Weights only load failed") else f" ({said})"  # followed by advice of torch's
    return f"{path} is damaged or not a checkpoint of torch{why}; copy or download it again"


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _some(names, most=3):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
