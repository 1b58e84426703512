"""What a run prints and writes: upstream's console lines, log.jsonl, and TensorBoard's scalars.

log.jsonl (linear.jsonl of a linear evaluation) has a line of JSON for each start, each printed step and each
epoch. A resumed run appends; of a repeated step or epoch, the later line counts. Numbers of a step
are rank 0's; images_per_s is of all ranks; memory_mb is rank 0's peak.
"""

import json
import math
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

from moco.errors import DivergedError, UserError, printable, say
from moco.progress import duration
from moco.run.resources import peak_megabytes

PROJECT = Path(__file__).resolve().parent.parent.parent


class Meters:
    """Time, data time, loss and accuracies of the steps of one pass over a loader, and their means.

    title: such as "Epoch: [3]"; steps: of the pass; first_step: of this start; sums: of `state_dict`,
    to continue the means of a pass that was stopped. Sums stay on the device: only what is printed waits for
    it. Loss and accuracies are 0-dim. tensors, or (H,) of H classifiers, of which `shown` is printed.
    """

    def __init__(self, title, steps, rank, first_step=0, sums=None, shown=None):
        self.title, self.steps, self.rank, self.first_step, self.shown = title, steps, rank, first_step, shown
        self.sums = {name: [total.to(rank.device), count] for name, (total, count) in (sums or {}).items()}
        self.newest = {}
        self.finished = self.images = 0  # steps and images of this start
        self.data_total = 0.0

    def timed(self, batches):
        """(step, batch) of the pass; measures how long each batch is waited for."""
        self.start = self.step_start = time.perf_counter()
        self.printed = self._so_far()
        for step, batch in enumerate(batches, self.first_step):
            self.data = time.perf_counter() - self.step_start
            self.data_total += self.data
            self.finished += 1
            yield step, batch
            self.step_start = time.perf_counter()

    def update(self, loss, accuracies, n):
        """Add a step's mean loss and top-1 and top-5 accuracies (tensors as above) of n images."""
        self.images += n
        for name, value in zip(("Loss", "Acc@1", "Acc@5"), (loss, *accuracies), strict=True):
            self.newest[name] = value.detach()
            self._add(name, self.newest[name], n)

    def update_features(self, features):
        """Add a printed step's statistics of features, 0-dim. tensors by name."""
        for name, value in features.items():
            self._add(name, value, 1)

    def means(self):
        """All means by their names in log.jsonl, and `times` of the pass."""
        names = {"Loss": "loss", "Acc@1": "acc1", "Acc@5": "acc5"}
        return {names.get(name, name): self.mean(name) for name in self.sums} | self.times()

    def mean(self, name):
        """The mean of "Loss", "Acc@1", "Acc@5" or a statistic over all items so far, float or list of H."""
        total, count = self.sums[name]
        return (total.double() / max(count, 1)).tolist()

    def state_dict(self):
        """The sums, for a start that continues within the pass."""
        return {name: (total.cpu(), count) for name, (total, count) in self.sums.items()}

    def check_finite(self, epoch, step, lr):
        """Raise DivergedError on all ranks when a loss of the pass so far was not finite on any.

        Collective, and waits for the device.
        """
        total = self.sums["Loss"][0] if self.sums else torch.zeros((), device=self.rank.device)
        if self.rank.all_reduce((~torch.isfinite(total)).float()).item():
            raise DivergedError(
                f"the loss of epoch {epoch} became nan or infinite in step {step} or before, at lr {lr:g}; "
                "the checkpoints are as they were: continue from the last, or from the one before if that "
                "fails at once, or start again, with a lower --lr or a higher --moco-t"
            )

    def line(self, step):
        """Upstream's console line of a step, tab-separated."""
        now = time.perf_counter()
        seconds, _, data, _ = (total / max(self.finished, 1) for total in self._so_far())
        width = len(str(self.steps))
        fields = [
            f"{self.title}[{step:{width}d}/{self.steps}]",
            f"Time {now - self.step_start:6.3f} ({seconds:6.3f})",
            f"Data {self.data:6.3f} ({data:6.3f})",
        ]
        for name, spec in (("Loss", ".4e"), ("Acc@1", "6.2f"), ("Acc@5", "6.2f")):
            newest, mean = self.newest[name].tolist(), self.mean(name)
            if self.shown is not None:
                newest, mean = newest[self.shown], mean[self.shown]
            fields.append(f"{name} {newest:{spec}} ({mean:{spec}})")
        return "\t".join(fields)

    def times(self, since_printed=False):
        """seconds, data_seconds and images_per_s: of this start's pass, or per step since the line before."""
        total = self._so_far()
        if not since_printed:
            seconds, steps, data, images = total
            return self._times(seconds, data / max(steps, 1), images / max(seconds, 1e-9))
        seconds, steps, data, images = (a - b for a, b in zip(total, self.printed, strict=True))
        self.printed = total
        steps = max(steps, 1)
        return self._times(seconds / steps, data / steps, images / max(seconds, 1e-9))

    def _times(self, seconds, data_seconds, images_per_s):
        images_per_s *= self.rank.world_size
        return {"seconds": seconds, "data_seconds": data_seconds, "images_per_s": images_per_s}

    def _so_far(self):
        return time.perf_counter() - self.start, self.finished, self.data_total, self.images

    def _add(self, name, value, n):
        if name in self.sums:
            self.sums[name][0] = self.sums[name][0] + value * n
            self.sums[name][1] += n
        else:
            self.sums[name] = [value * n, n]


class RunLog:
    """Appends to log.jsonl and, if asked for, to TensorBoard's files, on rank 0; elsewhere it does nothing.

    folder: --output-dir; name: of the file; epoch, step: where this start begins; steps: of an epoch; start:
    further entries of its first line, which also says command, versions, git state and machine. Raises
    UserError when it cannot be written.
    """

    def __init__(self, folder, name, rank, *, epoch, step, steps, tensorboard=False, **start):
        self.rank, self.steps, self.path = rank, steps, Path(folder) / name
        self._file = self._board = None
        self._marks = [(time.monotonic(), epoch * steps + step)]  # times, and steps finished by then
        if not rank.is_first:
            return
        try:
            _drop_partial_line(self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                first = epoch * steps + step + 1  # hides what an earlier start wrote beyond
                self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=first)
        except OSError as error:
            raise self._unwritable(error) from error
        except UnicodeError as error:
            raise UserError(
                f"TensorBoard cannot write below {folder}, whose name is not UTF-8; choose another "
                "--output-dir, or leave out --tensorboard"
            ) from error
        start |= {"epoch": epoch, "step": step, "steps": steps, "processes": rank.world_size}
        self._write({"kind": "start", **machine(rank.device), **start})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def step(self, meters, epoch, step, *, lr, features=None, **numbers):
        """Print and write a step. features: statistics, 0-dim. tensors by name; meters keep their means."""
        meters.update_features(features or {})
        if len(self._marks) == 1:
            self._marks.append((time.monotonic(), epoch * self.steps + step + 1))
        if not self._file:
            return
        say(meters.line(step))
        newest = {
            "loss": meters.newest["Loss"],
            "acc1": meters.newest["Acc@1"],
            "acc5": meters.newest["Acc@5"],
        }
        if meters.shown is not None:
            newest = {name: value[meters.shown] for name, value in newest.items()}
        times = meters.times(since_printed=True)
        memory = {"memory_mb": peak_megabytes(self.rank.device)}
        entry = {
            "epoch": epoch,
            "step": step,
            **newest,
            "lr": lr,
            **times,
            **memory,
            **(features or {}),
            **numbers,
        }
        self._write({"kind": "step", **entry})

    def epoch(self, epoch, **numbers):
        """Write an epoch."""
        if self._file:
            memory = {"memory_mb": peak_megabytes(self.rank.device)}
            self._write({"kind": "epoch", "epoch": epoch, **numbers, **memory})

    def time_left(self, epoch, epochs):
        """The remaining time of a run of `epochs` after `epoch`, in words, by the steps since this start.

        Those before the first printed step's end, in which networks are compiled, count only if there are no
        others.
        """
        steps, left = (epoch + 1) * self.steps, (epochs - epoch - 1) * self.steps
        start, before = [mark for mark in self._marks if mark[1] < steps][-1]
        return duration((time.monotonic() - start) / (steps - before) * left)

    def _write(self, entry):
        entry = _plain(entry)
        try:
            self._file.write(json.dumps(entry, allow_nan=False, ensure_ascii=True) + "\n")
            self._file.flush()
            if self._board and entry["kind"] != "start":
                place = entry["epoch"] * self.steps + entry.get("step", self.steps - 1) + 1
                for name, value in _numbers(entry):
                    self._board.add_scalar(f"{entry['kind']}/{name}", value, place)
                self._board.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error):
        return UserError(
            f"cannot write {self.path} ({error.strerror}); free space or choose another --output-dir"
        )


def machine(device):
    """What is needed to repeat a measurement or a run: time, command, versions, git state, host, device."""
    modules = {"torch": torch, "torchvision": torchvision, "numpy": numpy, "pillow": PIL}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [printable(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "versions": {"python": platform.python_version()}
        | {name: str(module.__version__) for name, module in modules.items()},
        "git": git_state(PROJECT),
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_state(folder):
    """{"commit": 40 hexadecimal digits, "changed": whether a tracked file differs} of a clone, or None."""

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


def _drop_partial_line(path):
    """A run that is killed, or whose disk is full, can leave a part of a line at the end."""
    if path.is_file():
        with open(path, "rb+") as file:
            written = file.read()
            file.truncate(written.rfind(b"\n") + 1)


def _plain(value):
    """Numbers, strings, lists and dicts; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(entry):
    """(name, value) of the numbers of an entry, of dicts in it as dict/name."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, (int, float)) and name not in ("epoch", "step"):
            yield name, value
