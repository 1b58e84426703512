"""Checkpoint files, written whole or not at all, and what is in them."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import torch

from moco.errors import UserError, first_line
from moco.files import atomic_file
from moco.seal import sealed
from moco.workers import worker_errors


def save_checkpoint(checkpoint, path, before=None):
    """Write a dict of tensors and plain values; `path` shows the old file or the whole new one, never a part.
    before: the name that the old one gets, if it is to stay.

    It is sealed (moco.seal), by which read_checkpoint finds out whether a bit has flipped. Raises UserError
    when the disk is full or the folder cannot be written to.
    """
    with (
        _writing(path, tensor_bytes(checkpoint)), atomic_file(path, before) as temporary, sealed(temporary),
        worker_errors(),  # a data worker's death is a RuntimeError too, raised wherever the program is
    ):  # fmt: skip
        torch.save(checkpoint, temporary)


def copied(value):
    """The same dicts, lists, tuples and plain values, with copies of all tensors, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


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


def tensor_bytes(value):
    """Bytes of all tensors in dicts, lists and tuples: nearly all of a checkpoint's file."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return tensor_bytes(list(value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def encoder_state(checkpoint, path):
    """The backbone's tensors by the names of the plain torchvision model, without its last layer `fc`.

    `checkpoint` is what read_checkpoint returned for `path` (named in messages): of pre-training (the
    query encoder is taken) or of linear evaluation. Raises UserError when it holds neither.
    """
    state = checkpoint["state_dict"]
    settings = checkpoint.get("settings")
    if isinstance(settings, dict) and settings.get("random_bits"):
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
        raise UserError(f"the optimizer state in {path} is of another model ({first_line(error)})") from error
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
    return os.strerror(errno.ENOSPC) if full else first_line(error)


def _momentum_as_weights(optimizer):
    """Give the momentum of each weight the weight's layout in memory, by which fused SGD pairs their values.

    The file may be of a run with another layout (--channels-last).
    """
    for weight, state in optimizer.state.items():
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            state["momentum_buffer"] = torch.empty_like(weight).copy_(buffer)


def _some(names, most=3):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
