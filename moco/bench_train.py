"""`python -m moco.bench train`: the fast step end to end from JPEG files, against the same on images that are
on the device already; and what both measurements of the step train.
"""

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from main_moco import Run, train_epoch
from moco.bench_report import in_turns, spread
from moco.bench_step_report import described, hours, timed
from moco.builder import MoCo
from moco.data import image_folder
from moco.distributed import Process, wrap
from moco.draws import moco_v2
from moco.encoders import base_encoder, check_image_size
from moco.errors import UserError
from moco.execution import execution_of
from moco.finish import finisher
from moco.meters import StepLog
from moco.photographs import make_photographs
from moco.progress import Progress
from moco.run_settings import loading_line, loading_of
from moco.watch import Signals, Watch

EPSILON, ALPHA, T, DIM, LR, SEED = 0.1, 1.0, 0.2, 128, 0.03, 0
ON_CUDA = {"arch": "resnet50", "batch_size": 512, "size": 224, "moco_k": 65536, "bn_splits": 8}
ON_CPU = {"arch": "resnet18", "batch_size": 32, "size": 64, "moco_k": 4096, "bn_splits": 8}
MADE = 64  # photographs, when no folder is named


@dataclass(frozen=True)
class Setting:
    """What is trained. size: side of a view in pixels; moco_k: keys in the queue."""

    arch: str
    batch_size: int
    size: int
    moco_k: int
    bn_splits: int
    device: torch.device

    @property
    def process(self):
        return Process.alone(self.device)

    def images(self):
        """Two views, float32 (N, 3, size, size) each, of noise."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        shape = (self.batch_size, 3, self.size, self.size)
        return [torch.randn(shape, generator=generator, device=self.device) for _ in range(2)]

    def model(self, kind=MoCo, method="ifm"):
        """A model on the CPU whose random numbers start from SEED, so that all of one size start alike."""
        torch.manual_seed(SEED)
        epsilon = EPSILON if method else None
        encoder = base_encoder(self.arch)
        return kind(encoder, DIM, self.moco_k, T=T, mlp=True, epsilon=epsilon, bn_splits=self.bn_splits)


def setting(device, **sizes):
    """A Setting with the defaults of the device ("cuda", "cpu" or None) for each of `sizes` that is None.
    Raises UserError.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here; use --device cpu, or leave --device out")
    defaults = ON_CUDA if device.type == "cuda" else ON_CPU
    chosen = defaults | {name: value for name, value in sizes.items() if value is not None}
    check_positive(**{name: value for name, value in chosen.items() if name != "arch"})
    s = Setting(**chosen, device=device)
    if s.batch_size % s.bn_splits or s.batch_size < 2 * s.bn_splits:
        raise UserError(
            f"--batch-size {s.batch_size} does not give --bn-splits {s.bn_splits} equal groups of 2 or more"
        )
    check_image_size(s.arch, s.size, "--size")
    return s


def check_positive(**values):
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def trainer(s, execution, method="ifm"):
    """run(loader, finish), the mean loss: main_moco's epoch of a new model. method: None for MoCo v2."""
    model = s.model(method=method)
    execution.prepare(model.encoder_q, model.encoder_k)
    model = wrap(model.to(s.device), s.process)
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4, fused=True)
    args = SimpleNamespace(method=method, alpha=ALPHA, print_freq=0)
    watch = Watch(Signals(), s.process)

    def run(loader, finish):
        log = StepLog("", loader, print_freq=0)
        train_epoch(
            Run(args, s.process, SEED, {}, loader, finish, execution, model, optimizer, watch), 0, log
        )
        return log.loss.mean

    return run


def measure(folder, device, *, rounds, steps, workers, device_aug, **sizes):
    """The report, a dict that JSON can hold. folder: with train/, or None to make photographs; steps: of a
    turn, which is an epoch with its start; workers and device_aug as in training. Raises UserError.
    """
    began = time.monotonic()
    s = setting(device, **sizes)
    on_cuda = s.device.type == "cuda"
    steps = (60 if on_cuda else 8) if steps is None else steps
    check_positive(rounds=rounds, steps=steps)
    if workers is not None and workers < 0:
        raise UserError(f"--workers must be 0 or more, not {workers}")
    execution = execution_of(s.device, None, None, None, True, s.bn_splits)
    flags = {"fast": True, "device_aug": device_aug, "resize": None, "decoder": None, "cache": None}
    flags |= {"image_size": s.size, "batch_size": s.batch_size, "workers": workers}
    device_aug, loading = loading_of(SimpleNamespace(**flags), s.device)
    with _images(folder, s.batch_size, steps) as (images, distinct):
        recipe = moco_v2()
        loader = loading.training(
            images, recipe, s.process, SEED, photometric=device_aug == "off", bn_splits=s.bn_splits
        )
        try:
            finish, how = finisher(device_aug, recipe, s.device)
            train, still = trainer(s, execution), [s.images()] * steps
            watched = Watched(loader, s.device)
            runs = {
                "files": lambda: train(watched, finish),
                "resident": lambda: train(still, lambda batch: batch),
            }

            def turn(name):
                seconds = timed(runs[name], s.device)
                return seconds, *(watched.waits() if name == "files" else ())

            with Progress("end to end", rounds, "rounds") as bar:
                in_turns(runs, 1, turn, lambda: None)  # nothing is fast the first time
                taken = in_turns(runs, rounds, turn, bar.update)
            line = " ".join(loading_line(loader, loading).split())
        finally:
            loader.close()
    files, first, waited = np.array(taken["files"]).T
    resident = np.array(taken["resident"])[:, 0]
    rate = s.batch_size * steps / files
    return {
        "resident": {"images_per_s": spread(s.batch_size * steps / resident)},
        "files": {
            "images_per_s": spread(rate),
            "to_resident": spread(resident / files),
            "waited_percent": spread(100 * waited / files),
            "first_batch_s": spread(first),
        },
        "hours_200_epochs": hours(np.median(rate)) if on_cuda else None,
        "images": {"folder": folder, "distinct": distinct},
        "loader": line,
        "photometric": how,
        "execution": str(execution),
        **described(s),
        "rounds": rounds,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
    }


class Watched:
    """A loader that meters how long its batches are waited for.

    A GPU waits from the end of a step to the arrival of the next batch, however long the host, which runs
    ahead of it, has waited for that; a CPU waits as long as the host.
    """

    def __init__(self, loader, device):
        self.loader, self.on_cuda = loader, device.type == "cuda"

    def __iter__(self):
        self._marks = []
        asked = self._mark()
        for batch in self.loader:
            self._marks.append((asked, self._mark()))
            yield batch
            asked = self._mark()

    def waits(self):
        """Seconds until the newest epoch's first batch, and those that the device waited for all of them."""
        clocks = [there - asked for (asked, _), (there, _) in self._marks]
        if not self.on_cuda:
            return clocks[0], sum(clocks)
        torch.cuda.synchronize()
        return clocks[0], sum(a.elapsed_time(b) / 1000 for (_, a), (_, b) in self._marks)

    def _mark(self):
        event = None
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return time.perf_counter(), event


@contextlib.contextmanager
def _images(folder, batch_size, steps):
    """An ImageFolder of as many images as an epoch of `steps` takes, and how many of them differ.

    From all over `folder`/train; made, and removed afterwards, without one. Too few come more than once.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="moco-bench-"))
            Path(place, "train", "made").mkdir(parents=True)
            try:
                make_photographs(Path(place, "train", "made"), MADE)
            except OSError as error:
                raise UserError(
                    f"{place} cannot hold the images ({error.strerror}); set TMPDIR to a folder with room"
                ) from error
        images = image_folder(folder or place, "train")
        found, needed = images.samples, batch_size * steps
        if folder and len(found) < batch_size:
            raise UserError(
                f"{images.root} has {len(found)} images, fewer than a step's {batch_size}; lower --batch-size"
            )
        if len(found) < needed:
            images.samples = (found * math.ceil(needed / len(found)))[:needed]
        else:
            images.samples = [found[number * len(found) // needed] for number in range(needed)]
        images.targets = [target for _, target in images.samples]
        yield images, min(len(found), needed)
