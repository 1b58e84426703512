"""log.jsonl in a run's folder, linear.jsonl of a linear evaluation: a line of JSON for each start, each
printed step and each epoch, and the same for TensorBoard.

Numbers of a step are those of the run's first process; images_per_s is of all processes, memory_mb the first
one's peak. A run that goes on appends; a step or an epoch that is done again stands there twice, and the
later line counts.
"""

import contextlib
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from moco.errors import UserError
from moco.log_reader import LINEAR_NAME, NAME
from moco.versions import versions

PROJECT = Path(__file__).resolve().parent.parent
OF_BOTH = ("loss", "acc1", "acc5", "lr", "seconds", "data_seconds", "images_per_s", "memory_mb")
NUMBERS = (*OF_BOTH, "queue_fill", "pos_similarity", "neg_similarity", "alignment", "uniformity")
KEYS = {"start": [], "step": ["epoch", "step"], "epoch": ["epoch"]}


class RunLog:
    """Hands each entry to its sinks, such as JsonLines and TensorBoard. Without any it does nothing.

    numbers: the names that each step and each epoch has.
    """

    def __init__(self, *sinks, numbers=NUMBERS):
        self.sinks, self.numbers = sinks, numbers

    def write(self, kind, **entry):
        """Write an entry of a kind of KEYS; 0-dim. tensors become numbers, what is missing or infinite null.

        Raises UserError when the disk is full.
        """
        if self.sinks:
            numbers = self.numbers if kind != "start" else ()
            plain = _plain({"kind": kind, **dict.fromkeys((*KEYS[kind], *numbers)), **entry})
            for sink in self.sinks:
                sink.write(plain)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sink in self.sinks:
            sink.close()


def start_log(folder, process, tensorboard, program, *, linear=False, **start):
    """The RunLog of a run in `folder`: in its first process log.jsonl and, if wanted, TensorBoard's files.

    program: its name; linear: whether it is a linear evaluation, whose folder can be that of the
    pre-training: its log is linear.jsonl; start: what its first line says besides `surroundings`.
    """
    if not process.is_first:
        return RunLog()
    name, numbers = (LINEAR_NAME, OF_BOTH) if linear else (NAME, NUMBERS)
    sinks = JsonLines(Path(folder) / name), *([TensorBoard(folder)] if tensorboard else [])
    log = RunLog(*sinks, numbers=numbers)
    start |= {"processes": process.world_size}
    log.write("start", **surroundings(program, process.device), **start)
    return log


class JsonLines:
    """A file of JSON objects, a line each, to which lines are added at once."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self._drop_half_a_line()
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise self._full(error) from error

    def write(self, entry):
        try:
            self._file.write(json.dumps(entry, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error

    def close(self):
        with contextlib.suppress(OSError):  # what could not be written was told when it was tried
            self._file.close()

    def _drop_half_a_line(self):
        """A run that is killed, or whose disk is full, can leave half a line at the end."""
        if not self.path.is_file():
            return
        with open(self.path, "rb+") as file:
            written = file.read()
            whole = written.rfind(b"\n") + 1
            if whole < len(written):
                file.truncate(whole)

    def _full(self, error):
        return UserError(
            f"cannot write {self.path} ({error.strerror}); free space or choose another --output-dir"
        )


class TensorBoard:
    """The numbers of steps and epochs as scalars such as step/loss, in event files of `folder`/tensorboard.

    They stand over the number of the step in the whole run; a start that goes on in the middle hides what the
    one before wrote beyond there.
    """

    def __init__(self, folder):
        self.folder, self._writer, self._steps = Path(folder) / "tensorboard", None, 1

    def write(self, entry):
        try:
            if entry["kind"] == "start":
                self._steps = entry["steps"]
                first = entry["epoch"] * self._steps + entry["step"] + 1  # the place that is written next
                self._writer = summary_writer()(str(self.folder), purge_step=first)
                return
            done = entry.get("step", self._steps - 1) + 1
            place = entry["epoch"] * self._steps + done
            if "knn" in entry:  # the epoch's numbers came before its evaluation
                values = {f"knn/{name}": percent for name, percent in entry["knn"].items()}
            else:
                values = {f"{entry['kind']}/{name}": entry[name] for name in NUMBERS}
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, place)
            if entry["kind"] == "epoch":
                self._writer.flush()
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}); free space or choose another --output-dir"
            ) from error

    def close(self):
        if self._writer is not None:
            self._writer.close()


def summary_writer():
    """torch's SummaryWriter. Raises UserError when the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard needs a package that is not installed: pip install tensorboard"
        ) from error
    return SummaryWriter


def surroundings(program, device):
    """What a start should be repeatable by: time, command line, versions, git state, machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "program": program,
        "command": [program, *sys.argv[1:]],
        "versions": versions(),
        "git": git_state(PROJECT),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def git_state(folder):
    """{"commit": 40 hexadecimal digits, "changed": whether a tracked file differs} of a clone, or None.

    None when `folder` is not the top of a git repository, or git is missing or takes too long.
    """

    def git(*words):
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(folder).resolve():
            return None  # an installation inside somebody else's repository
        changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value):
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
