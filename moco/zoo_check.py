"""Whether a file is the released model that it is named for: hashes, and that it loads and is whole."""

import os
import sys
import zipfile
from pathlib import Path

from moco.errors import UserError
from moco.files import atomic_file, file_hash, sha256


def cache_folder():
    """The folder `moco` in torch.hub's of checkpoints: TORCH_HOME and XDG_CACHE_HOME are honoured.

    The rule is torch.hub.get_dir's, without the import of torch; where torch is imported already, it is
    asked, as torch.hub.set_dir may have been called.
    """
    if hub := sys.modules.get("torch.hub"):
        folder = hub.get_dir()
    else:
        caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        home = os.environ.get("TORCH_HOME", os.path.join(caches, "torch"))
        folder = os.path.join(os.path.expanduser(home), "hub")
    return Path(folder) / "checkpoints" / "moco"


def check(model, path):
    """Raise UserError unless `path` is the model's file: that of the first download, or else a sound one."""
    record = _record(model)
    if record.exists():
        digest, known = sha256(path), record.read_text(errors="replace").split()
        if digest not in known:
            raise UserError(
                f"its SHA-256 starts with {digest[:12]}, but that of the first download, as recorded in "
                f"{record}, with {known[0][:12] if known else 'nothing'}: if it is the record that is wrong, "
                f"delete {record} and run the same command again"
            )
        return
    if model.md5 and not (md5 := file_hash(path, "md5")).startswith(model.md5):
        raise UserError(f"its md5 starts with {md5[:8]}, but the published one with {model.md5}")
    _check_loads(path)


def record_hash(model, path):
    """Record the SHA-256 of a file that has passed its checks, if there is no record yet."""
    record = _record(model)
    if record.exists():
        return
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(record) as temporary:
            temporary.write_text(f"{sha256(path)}  {model.file}\n")
    except OSError as error:
        raise UserError(
            f"{path} is complete, but its SHA-256 cannot be recorded in {record} ({error.strerror}); set "
            "TORCH_HOME to a folder that you can write to"
        ) from error


def resnet50_without_fc():
    """On the meta device: shapes without memory."""
    import torch
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None)
    model.fc = torch.nn.Identity()
    return model


def _record(model):
    return cache_folder() / f"{model.file}.sha256"


def _check_loads(path):
    """Raise UserError unless `path` is whole and holds the query encoder of a MoCo with a ResNet-50."""
    import torch

    from moco.checkpoint import encoder_state, load_strictly
    from moco.checkpoint_reader import read_checkpoint

    with torch.serialization.skip_data():  # names and shapes only: the tensors' memory is never touched
        checkpoint = read_checkpoint(path)
        state = checkpoint["state_dict"]
        if not any(name.startswith("encoder_q.") for name in state):
            raise UserError(f"{path} holds no query encoder (encoder_q.*), so it is not a checkpoint of MoCo")
        encoder = {name: tensor.to("meta") for name, tensor in encoder_state(checkpoint, path).items()}
        load_strictly(resnet50_without_fc(), encoder, path)
    if zipfile.is_zipfile(path):
        _check_zip(path)
    else:
        _check_older_format(path)


def _check_zip(path):
    """A cut zip file has no directory; torch writes a CRC-32 beside each tensor, but never looks at it."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} in it is wrong")


def _check_older_format(path):
    """Raise UserError if a file of torch's format before 1.6 is shorter than its tensors need.

    It consists of pickles, which torch.load reads up to their last byte, and then of the storages, each
    with its length as 8 bytes before it; skip_data would not notice that they are missing.
    """
    import torch

    with open(path, "rb") as file, torch.serialization.skip_data():
        content = torch.load(file, map_location="cpu", weights_only=True)
        storages = {}  # by their address: one that is not empty shares it with no other while both live
        for tensor in _tensors(content):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        expected = file.tell() + sum(8 + size for size in storages.values())
    if os.path.getsize(path) < expected:
        raise UserError(f"{path} ends before its tensors do")


def _tensors(content):
    """Every tensor in nested dicts, lists and tuples."""
    import torch

    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors(part)
