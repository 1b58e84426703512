"""The files of a run, for tests to compare and to damage."""

import hashlib
import os
import zipfile

import torch

from moco.lock import LOCK


def checkpoints(folder):
    """The names of the files of a run, without its log, and its lock, which one that is killed leaves."""
    return sorted(set(os.listdir(folder)) - {"log.jsonl", LOCK})


def content(folder, name="checkpoint_0001.pth.tar"):
    """{entry: SHA-256 of its keys, types, shapes and bytes} of a checkpoint, without its settings."""
    checkpoint = torch.load(folder / name, weights_only=True)
    return {key: content_hash(value) for key, value in checkpoint.items() if key != "settings"}


def content_hash(value):
    digest = hashlib.sha256()
    _add_to(digest, value)
    return digest.hexdigest()


def _add_to(digest, value):
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy() if plain.numel() else b"")
    elif isinstance(value, (dict, list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            digest.update(f"{key!r}".encode())
            _add_to(digest, item)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())


def damage(path, how):
    """Make a checkpoint "truncated", "empty", or "flipped": one bit in the middle of its largest tensor."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = b""
    else:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        # of 30 bytes, then the name and padding, is what stands before the tensor
        start = largest.header_offset + 30 + sum(data[largest.header_offset + i] for i in (26, 28))
        data[start + largest.file_size // 2] ^= 4
    path.write_bytes(data)
