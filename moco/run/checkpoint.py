"""Checkpoints of both programs: complete or absent, found again, and read without running code."""

import argparse
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from moco.encoders import is_known
from moco.errors import UserError, first_line, shell_word
from moco.files import atomic_file
from moco.lock import LOCK, Lock

NAME = re.compile(r"checkpoint_(\d{4,})(?:_(\d{6,}))?\.pth\.tar")
WRAPPER_PREFIX = "module."  # of DistributedDataParallel, in front of the names in published files
COMPILE_MARK = "_orig_mod."  # of torch.compile, in files of other programs
WRITTEN = "names in the file"  # the entry that `read` adds: a state_dict's plain names to those that it had


def save(checkpoint, path, before=None):
    """torch.save a dict of tensors and plain values to `path`, which is the old file or the complete new one.

    before: the name that the old file gets, if it is to stay. Raises UserError when it cannot be written.
    """
    path = Path(path)
    try:
        with atomic_file(path, before) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # torch's own error, when a write failed, is about the length of the file
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(
            f"cannot write the checkpoint {path} ({first_line(reason)}); the ones before it are intact: free "
            "space or choose another --output-dir"
        ) from error


def read(path):
    """A checkpoint, of this or another program: a dict with at least `state_dict`, tensors on the CPU.

    `state_dict` is what the file has under this name, or the file itself where it is a bare state_dict, with
    names without DistributedDataParallel's `module.` (the entry WRITTEN has those with it); it is empty where
    a file has its tensors under other names, from which moco.run.backbone takes the backbone. Only tensors,
    plain values, argparse.Namespace and NumPy's numbers are read (`weights_only=True`); damage is found by
    the CRC-32 that torch writes beside every tensor and does not look at. A safetensors file is read too,
    with the `arch` that its metadata may name. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on pickles of other programs
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile and torch have an exception of their own for each kind of damage
        raise UserError(_unreadable(path, error)) from error
    content = loaded if isinstance(loaded, dict) else {}
    found = state_dicts(content)
    if not found:
        raise UserError(f"{path} {_no_state_dict(loaded)}")
    if "state_dict" not in found:  # the file's own tensors, where it is a bare state_dict
        content = {name: value for name, value in content.items() if not isinstance(value, torch.Tensor)}
    state = found.get("state_dict") or found.get("") or {}
    plain = plain_names(state)
    return {**content, "state_dict": plain, WRITTEN: dict(zip(plain, state, strict=False))}


def _no_state_dict(loaded):
    """What is wrong with what torch.load gave, which has no tensors by name."""
    has = f"a {type(loaded).__name__}"
    for entry, values in _dicts(loaded if isinstance(loaded, dict) else {"": loaded}):
        for name, value in values.items():
            number = sum(isinstance(item, dict) and bool(state_dicts(item)) for item in _listed(value))
            if number:
                where = f"its {f'{entry}.' * bool(entry)}{name}" if name else "it"
                return (
                    f"holds no state_dict by name, but {where} is a list of {number}: write the one that you "
                    "want to a file of its own, by torch.save"
                )
    if isinstance(loaded, dict):
        has = some_of(map(str, loaded)) or "nothing"
    return f"holds no state_dict, so it is not a checkpoint of a model: it has {has}"


def _listed(value):
    return value if isinstance(value, (list, tuple)) else ()


def _is_safetensors(path):
    """Whether a file starts with the length of a header and a header in JSON that fits into it."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path)


def _read_safetensors(path):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(
            f"{path} is a safetensors file, which needs a package that is not installed: pip install "
            "safetensors"
        ) from error
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            metadata = file.metadata() or {}
    except Exception as error:  # it has one of its own for damage, torch others for what it cannot hold
        raise UserError(f"{path} is damaged ({first_line(error)}); copy or download it again") from error
    if not tensors:
        raise UserError(f"{path} holds no tensor, so it is not a checkpoint of a model")
    named = {"arch": metadata["arch"]} if "arch" in metadata else {}
    return {**named, "state_dict": plain_names(tensors)}


def _check_archive(path):
    """Raise UserError unless a zip archive is whole and such as torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            raise UserError(
                f"{path} is a TorchScript program, not a checkpoint; refused: it is code. Where you trust "
                f"it, {_written_alone(path, OF_TORCHSCRIPT)}"
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError(
                f"{path} is a compressed archive, which torch.save never writes; refused: it could be a zip "
                "bomb. If a checkpoint is packed in it, unpack that"
            )
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged (checksum of {damaged}); copy or download it again")
        if not any(name.endswith("/data.pkl") for name in names):
            raise UserError(
                f"{path} is an archive of another kind than torch.save writes, with {some_of(names)}"
            )


class _Dtype:
    """What a file says of a NumPy dtype. NumPy's own would be set to whatever state a file names."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, data):
    """A pickled NumPy scalar, a number or text, as Python's."""
    dtype = np.dtype(dtype.code).newbyteorder(dtype.order.replace("|", "="))
    if dtype.kind not in "biufcUS":
        raise pickle.UnpicklingError(f"GLOBAL numpy.{dtype.name} is not plain")
    return np.frombuffer(data, dtype)[0].item()


def _harmless():
    """What torch.load may construct besides tensors and plain values. NumPy 2 writes `_core`."""
    scalars = [(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, (_Dtype, "numpy.dtype"), *scalars]


def state_dicts(content):
    """{entry: {name: tensor}} of a file's dicts that hold tensors by name, "a.b" for content["a"]["b"]."""
    found = {}
    for entry, values in _dicts(content):
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        if tensors:
            found[entry] = tensors
    return found


def _dicts(content):
    """(entry, the values with a name) of a dict, whose entry is "", and of the dicts in it, at any depth."""
    waiting, seen = [("", content)], set()
    for entry, values in waiting:
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        yield entry, named
        if id(values) not in seen:  # a pickle may hold itself
            seen.add(id(values))
            dicts = ((name, value) for name, value in named.items() if isinstance(value, dict))
            waiting += [(f"{entry}.{name}" if entry else name, value) for name, value in dicts]


def plain_names(state_dict):
    """The same tensors without the marks of DistributedDataParallel and torch.compile in their names."""
    return {
        name.replace(COMPILE_MARK, "").removeprefix(WRAPPER_PREFIX): tensor
        for name, tensor in state_dict.items()
    }


def published_names(model):
    """The state_dict of a model with the names of published files, which start with `module.`."""
    return {WRAPPER_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def check_arch(checkpoint, arch, path):
    """Raise UserError when the checkpoint read from `path` names another architecture that is known here."""
    named = checkpoint.get("arch")
    if isinstance(named, str) and named != arch and is_known(named):
        raise UserError(f"{path} is of -a {named}, not of -a {arch}")


def load_strictly(model, state_dict, path, may_miss=(), advice="name a checkpoint of the same architecture"):
    """Load `state_dict` into `model`; both must have the same tensors, except for the names `may_miss`.

    Raises UserError that names what is missing, unexpected or of another shape, and ends in `advice`.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state_dict.keys() - set(may_miss))
    unexpected = sorted(state_dict.keys() - own.keys())
    other_shape = [
        f"{name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here"
        for name, tensor in state_dict.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems = (
        ("missing:", missing),
        ("unexpected:", unexpected),
        ("shapes differ:", other_shape),
    )
    wrong = [f"{what} {some_of(names)}" for what, names in problems if names]
    if wrong:
        raise UserError(f"{path} does not fit this model ({'; '.join(wrong)}); {advice}")
    model.load_state_dict(state_dict, strict=not may_miss)


def restore(checkpoint, path, model, optimizer, scaler, epochs):
    """Load model, optimizer and GradScaler from the checkpoint read from `path`. Returns (epoch, step) to
    continue from.

    Raises UserError when it does not fit or has finished all `epochs`.
    """
    epoch, step, state = checkpoint.get("epoch"), checkpoint.get("step", 0), checkpoint.get("optimizer")
    if not (isinstance(epoch, int) and isinstance(step, int) and isinstance(state, dict)):
        raise UserError(f"{path} has no optimizer state, so no run can continue from it")
    advice = "check --arch, --moco-dim, --moco-k and --mlp against those of the checkpoint"
    load_strictly(model, checkpoint["state_dict"], path, advice=advice)
    load_optimizer(optimizer, state, path)
    if scaler.is_enabled() and "scaler" in checkpoint:
        scaler.load_state_dict(checkpoint["scaler"])
    if epoch >= epochs:
        raise UserError(f"{path} has finished {epoch} epochs; raise --epochs to continue")
    return epoch, step


def load_optimizer(optimizer, state, path):
    """Load an SGD's state_dict except its choice of implementation. Raises UserError if it does not fit."""
    try:
        implementation = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, (fused, foreach) in zip(optimizer.param_groups, implementation, strict=True):
            group.update(fused=fused, foreach=foreach)
        for weight, of_weight in optimizer.state.items():
            if (momentum := of_weight.get("momentum_buffer")) is not None:
                # fused SGD pairs values by their place in memory; the file may have another memory format
                of_weight["momentum_buffer"] = torch.empty_like(weight).copy_(momentum)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the optimizer state in {path} is of another model ({first_line(error)})") from error


def check_compatible(checkpoint, path, data, settings, rank):
    """Refuse, or where it can work note on rank 0, what differs between the run of a checkpoint and this one.

    data: `images`, `global_batch` and the like of this run; settings: moco.options.settings of it. Raises
    UserError.
    """
    before, step, data_before = (checkpoint.get(name) for name in ("settings", "step", "data"))
    absent = {
        "gray_range": None,
        "stem": None,
        "bits_per": "image",
        "match_ifm": False,
    }  # in earlier versions
    before = absent | before if isinstance(before, dict) else {}
    data_before = data_before if isinstance(data_before, dict) else {}
    for name in ("moco_dim", "moco_k", "mlp", "stem"):
        if name in before and before[name] != settings[name]:
            flag = "--" + name.replace("_", "-")
            there, here = ("none" if value is None else value for value in (before[name], settings[name]))
            raise UserError(f"{path} is of a run with {flag} {there}, not {here}")
    if step and before.get("seed", settings["seed"]) != settings["seed"]:
        raise UserError(
            f"{path} is from within an epoch of --seed {before['seed']}, which --seed {settings['seed']} "
            "cannot continue: use the same, or leave the flag out"
        )
    for name, value in data.items():
        if data_before.get(name, value) != value:
            if step:
                raise UserError(
                    f"{path} is from within an epoch: {name} was {data_before[name]} there and is {value} "
                    "here; continue with the same data, --batch-size, --bn-splits and number of processes"
                )
            rank.print(f"note: {name} was {data_before[name]} in {path} and is {value} from here on")
    if step and step > (steps := data["images"] // data["global_batch"]):
        raise UserError(f"{path} is not of this program: {step} steps of an epoch of {steps} are finished")
    for name, value in before.items():
        if settings.get(name, value) != value:
            rank.print(f"note: {name} was {value} in {path} and is {settings[name]} from here on")


class Checkpoints:
    """Pre-training's files: checkpoint_0007.pth.tar after epoch 7, checkpoint_0008_000120.pth.tar after 120
    steps of epoch 8.

    keep: how many of the newest epochs stay; save_freq: every such epoch stays too (0: none). During a run
    the file before the newest stays as well, should the newest be damaged.

    A file is written by a thread while training continues: writing ResNet-50's 370 MB takes longer than 2 %
    of an epoch of ImageNet-100 on a GPU.
    """

    def __init__(self, folder, rank, keep=1, save_freq=0):
        self.folder, self.rank, self.keep, self.save_freq = Path(folder), rank, keep, save_freq
        self._writer, self._writing = ThreadPoolExecutor(1), None

    def newest_first(self):
        """The paths of the checkpoints in the folder."""
        return sorted(filter(_position, self.folder.glob("checkpoint_*")), key=_position, reverse=True)

    def load(self, resume, overwrite=False):
        """(path, what `read` gives) of the checkpoint to continue from, or (None, {}) for a new run.

        resume, overwrite: --resume and --overwrite. All ranks call it together and get the same. Raises
        UserError, before any file is touched, when the folder has checkpoints that the run would mix with.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(_lock(self.folder, self.rank))
            source = _source(self.newest_first(), resume, self.rank)
            checkpoint = read(source) if source else {}
            if source and not any(name.startswith("encoder_q.") for name in checkpoint["state_dict"]):
                raise UserError(f"{source} is not of pre-training, so main_moco.py cannot continue it")
            _check_types(checkpoint, source)
            if resume != "auto":
                others, position = self.newest_first(), (0, 0)
                if source and Path(source).resolve().parent == self.folder.resolve():
                    position = checkpoint.get("epoch", 0), checkpoint.get("step", 0)
                    others = [path for path in others if _position(path) > position]
                _refuse_or_remove(others, position > (0, 0), overwrite, self.folder, self.rank)
            _remove_partial(self.folder, self.rank)
            self._lock = held.pop_all()  # to be held until this object ends
        return source, checkpoint

    def save(self, model, optimizer, scaler, *, epoch, step, **entries):
        """Write the state after `step` steps of `epoch` (step 0: `epoch` epochs are finished), on rank 0.

        entries: plain values that stand beside it. Returns the path, at which the file is complete after the
        next call of `save` or `wait`. Raises UserError when it or the file before cannot be written.
        """
        name = f"checkpoint_{epoch:04d}_{step:06d}" if step else f"checkpoint_{epoch - 1:04d}"
        path = self.folder / f"{name}.pth.tar"
        if self.rank.is_first:
            self._finish_writing()
            scaler_state = {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
            state = {
                "state_dict": published_names(model),
                "optimizer": optimizer.state_dict(),
                **scaler_state,
            }
            checkpoint = _copied({"epoch": epoch, "step": step, **entries, **state})
            self._writing = self._writer.submit(self._write, checkpoint, path)
        return path

    def wait(self):
        """Wait on all ranks until the file of the last `save` is complete. Raises UserError."""
        self._finish_writing()
        self.rank.barrier()

    def finish(self):
        """Remove the file that stays only during a run."""
        self.wait()
        if self.rank.is_first and (paths := self.newest_first()):
            self._prune(paths[0], self.keep)

    def _write(self, checkpoint, path):
        save(checkpoint, path)
        self._prune(path, self.keep + 1)

    def _finish_writing(self):
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _prune(self, newest, keep):
        older = [path for path in self.newest_first() if _position(path) <= _position(newest)]
        epochs = [path for path in older if _position(path)[1] == 0]
        for path in older:
            milestone = self.save_freq and path in epochs and _position(path)[0] % self.save_freq == 0
            if path != newest and path not in epochs[:keep] and not milestone:
                path.unlink(missing_ok=True)


class LinearCheckpoints:
    """Linear evaluation's files: checkpoint.pth.tar (newest), model_best.pth.tar, and during the run
    checkpoint_previous.pth.tar, should the newest be damaged.
    """

    def __init__(self, folder, rank):
        self.folder, self.rank = Path(folder), rank
        self.newest, self.best = self.folder / "checkpoint.pth.tar", self.folder / "model_best.pth.tar"
        self.previous = self.folder / "checkpoint_previous.pth.tar"

    def newest_first(self):
        """The paths of the checkpoints to continue from that exist."""
        return [path for path in (self.newest, self.previous) if path.is_file()]

    def load(self, resume, overwrite=False):
        """As Checkpoints.load."""
        with contextlib.ExitStack() as held:
            held.enter_context(_lock(self.folder, self.rank))
            source = _source(self.newest_first(), resume, self.rank)
            checkpoint = read(source) if source else {}
            check_linear(checkpoint, source)
            others = [path for path in (self.newest, self.previous, self.best) if path.is_file()]
            if not source or Path(source).resolve() not in [path.resolve() for path in others]:
                _refuse_or_remove(others, False, overwrite, self.folder, self.rank)
            _remove_partial(self.folder, self.rank)
            self._lock = held.pop_all()  # to be held until this object ends
        return source, checkpoint

    def save(self, checkpoint, best=None):
        """Write `checkpoint` and, if given, `best` to model_best.pth.tar, on rank 0. Raises UserError."""
        if self.rank.is_first:
            if best is not None:  # first: a kill between the two leaves the epoch to be repeated
                save(best, self.best)
            save(checkpoint, self.newest, before=self.previous)

    def finish(self):
        """Remove the file that stays only during a run."""
        if self.rank.is_first:
            self.previous.unlink(missing_ok=True)


def _copied(value):
    """The same dicts and lists with copies of their tensors on the CPU."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _source(newest_first, resume, rank):
    """The path that --resume names, or with "auto" the newest readable of the paths, or None."""
    if resume != "auto":
        return resume or None
    found, damaged = None, []
    if rank.is_first:
        for path in newest_first:
            try:
                read(path)
                found = str(path)
                break
            except UserError as error:
                damaged.append(str(error))
    found, damaged = rank.broadcast((found, damaged))
    for sentence in damaged:
        rank.print(f"warning: {sentence}; trying the one before")
    if damaged and found is None:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in --output-dir can be read; remove them for a new run, "
            "or use --overwrite without --resume"
        )
    rank.print(f"--resume auto: {found or 'no checkpoint yet, a new run'}")
    return found


def _refuse_or_remove(others, later, overwrite, folder, rank):
    """Raise UserError when the folder has checkpoints of another course, or with `overwrite` remove them.

    later: they are later ones than the one to continue from, not of another run.
    """
    if others := rank.broadcast([str(path) for path in others]):
        if not overwrite:
            of = "later than the one to continue from" if later else "of another run"
            raise UserError(
                f"--output-dir {folder} has checkpoints {of}, such as {Path(others[0]).name}: continue from "
                "the newest with --resume auto, choose another folder, or remove them with --overwrite"
            )
        if rank.is_first:
            for path in others:
                os.unlink(path)
        rank.barrier()


def _lock(folder, rank):
    """The Lock of an output folder, on rank 0; elsewhere a context that does nothing.

    Raises UserError on all ranks when another run holds it, or it cannot be made.
    """
    lock, sentence = contextlib.nullcontext(), None
    if rank.is_first:
        try:
            lock = Lock(
                folder / LOCK,
                lambda holder: (
                    f"another run ({holder.process}) is using --output-dir {folder} "
                    f"({holder.program}): stop it, or choose another folder"
                ),
            )
        except UserError as error:
            sentence = str(error)
        except OSError as error:
            sentence = f"cannot write to --output-dir {folder} ({error.strerror}); choose another folder"
    if sentence := rank.broadcast(sentence):
        raise UserError(sentence)
    return lock


def _check_types(checkpoint, path):
    """Raise UserError when an entry from which a run continues is not of the type that is written."""
    for name, kind in {"epoch": int, "step": int, "seed": int, "log": dict, "noted": dict}.items():
        if not isinstance(checkpoint.get(name, kind()), kind):
            found = type(checkpoint[name]).__name__
            raise UserError(
                f"{path} is not a checkpoint of this program: its entry {name} is of type {found}"
            )


def check_linear(checkpoint, path):
    """Raise UserError when the checkpoint read from `path` is not one that linear evaluation can continue."""
    if any(name.startswith("encoder_q.") for name in checkpoint.get("state_dict", ())):
        raise UserError(f"{path} is of pre-training: give it as --pretrained, not as --resume")
    if not checkpoint.get("state_dict", True):
        raise UserError(f"{path} has no entry state_dict, so it is not a checkpoint of linear evaluation")
    _check_types(checkpoint, path)


def _remove_partial(folder, rank):
    """Remove what a killed run was writing (moco.files.atomic_file)."""
    if rank.is_first:
        for path in [*folder.glob(".checkpoint*.tmp"), *folder.glob(".model_best*.tmp")]:
            path.unlink(missing_ok=True)


def _position(path):
    """(finished epochs, steps of the next one) by a checkpoint's name, or None."""
    found = NAME.fullmatch(path.name)
    if found is None:
        return None
    return (int(found[1]), int(found[2])) if found[2] else (int(found[1]) + 1, 0)


def _unreadable(path, error):
    """Why torch could not read a file: its own message advises to turn the protection off."""
    with open(path, "rb") as file:
        raw = file.read(512)
    head = raw.lstrip().lower()
    if not head:
        return f"{path} is empty; copy or download it again"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page that a server sent instead of a checkpoint; download it again"
    if raw.startswith(PICKLES) and not raw[2:].startswith(OF_TORCH):
        return (
            f"{path} is a pickle, but not of torch.save, and reading it could run code; refused. Where you "
            f"trust it, {_written_alone(path, OF_PICKLE.replace(*BY_PICKLE))}"
        )
    if call := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} holds more than tensors and plain values ({call[1]}), so reading it could run code; "
            f"refused. Where you trust it, {_written_alone(path, OF_PICKLE)}, with the packages of the "
            "program that made it"
        )
    text = first_line(error)
    reason = "" if text.startswith("Weights only load failed") or text.isdigit() else f" ({text})"
    return f"{path} is damaged or not a checkpoint of torch{reason}; copy or download it again"


# How pickles start, which those of torch.save without zip go on with: its magic number.
PICKLES, OF_TORCH = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), b"\x8a\n"

# Python programs that write the weights of file 1 alone to file 2, of what is not read here.
OF_TORCHSCRIPT = 'import sys, torch; torch.save(torch.jit.load(sys.argv[1], "cpu").state_dict(), sys.argv[2])'
OF_PICKLE = (  # dicts, modules and NumPy's arrays, in each other
    'import sys, torch; w = lambda v: w(v.state_dict()) if hasattr(v, "state_dict") else '
    "{k: w(x) for k, x in v.items()} if isinstance(v, dict) else "
    "v if torch.is_tensor(v) or type(v) in (str, int, float) else "
    'torch.from_numpy(v.astype(v.dtype.newbyteorder("="))) '
    'if type(v).__name__ == "ndarray" and v.dtype.kind in "biuf" else None; '
    'torch.save(w(torch.load(sys.argv[1], "cpu", weights_only=False)), sys.argv[2])'
)
BY_PICKLE = (
    'torch.load(sys.argv[1], "cpu", weights_only=False)',
    '__import__("pickle").load(open(sys.argv[1], "rb"), encoding="latin1")',
)


def _written_alone(path, program):
    return f"`python -c '{program}' {shell_word(path)} weights.pth` writes the weights alone"


def some_of(names, most=3):
    """The first of some names, and how many there are beside them, in words."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
