"""`python -m moco.bench step`: the rate of the published training step, of this program's with each flag, and
of its encoders alone, in turns on images that are on the device already; with --data also from files.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, count

import torch
import torch.nn.functional as F
from torch.profiler import profile

from moco import losses
from moco.bench.report import about, in_turns, spread, timed
from moco.builder import MoCo
from moco.data.augment import moco_v2
from moco.data.device import DeviceAugment
from moco.data.folders import image_folder
from moco.data.loader import TrainLoader, batch_per_process
from moco.encoders import base_encoder, check_image_size
from moco.errors import UserError, first_line
from moco.run.resources import available_cores
from moco.seeds import shuffle_order

EPSILON, ALPHA, T, DIM, LR, SEED = 0.1, 1.0, 0.2, 128, 0.03, 0
DEFAULTS = {
    "cuda": {"arch": "resnet50", "batch_size": 512, "size": 224, "moco_k": 65536, "bn_splits": 8, "steps": 8},
    "cpu": {"arch": "resnet18", "batch_size": 32, "size": 64, "moco_k": 4096, "bn_splits": 8, "steps": 2},
}
BASES = {"of the ceiling": "ceiling", "of published": "published", "of --fast": "fast"}


@dataclass(frozen=True)
class Setting:
    """What is trained. size: side of a view in pixels; moco_k: keys in the queue; steps: of a turn."""

    device: torch.device
    arch: str
    batch_size: int
    size: int
    moco_k: int
    bn_splits: int
    steps: int

    def images(self):
        """Two views, float32 (N, 3, size, size) each, of noise on the device."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        shape = (self.batch_size, 3, self.size, self.size)
        return [torch.randn(shape, generator=generator, device=self.device) for _ in range(2)]

    def model(self, kind=MoCo, channels_last=False, compile=False):
        """A model with weights drawn from SEED: the same for all of one size."""
        torch.manual_seed(SEED)
        encoder = base_encoder(self.arch)
        model = kind(encoder, DIM, self.moco_k, T=T, mlp=True, epsilon=EPSILON, bn_splits=self.bn_splits)
        for encoder in (model.encoder_q, model.encoder_k):
            if channels_last:
                encoder.to(memory_format=torch.channels_last)
            if compile:
                encoder.compile()
        return model.to(self.device).train()


def setting_of(device=None, **sizes):
    """The Setting for "cuda", "cpu" or None (a GPU if there is one), with the device's defaults for each of
    `sizes` that is None. Raises UserError.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here; use --device cpu, or leave --device out")
    given = {name: value for name, value in sizes.items() if value is not None}
    s = Setting(device, **DEFAULTS[device.type] | given)
    batch_per_process(s.batch_size, 1, s.bn_splits)
    check_image_size(s.arch, s.size, "--size")
    return s


def rows_of(device, bn_splits):
    """{name: (title, function, options)} of the ways to run a step on a device; function(s, images,
    **options) gives run(steps) -> mean loss. float32 is as torch computes it by default, on a GPU with TF32
    in convolutions.
    """
    on_cuda = device.type == "cuda"
    fast = {"amp": torch.bfloat16, "compile": True} if on_cuda else {}
    unsplit = {"channels_last": True, "bn_splits": 1} | fast
    fast = {"channels_last": on_cuda or bn_splits == 1} | fast  # as --fast
    rows = {
        "published": ("published, float32", training_run, {"published": True}),
        "here": ("here, float32", training_run, {}),
        "channels_last": ("here, --channels-last", training_run, {"channels_last": True}),
        "amp": ("here, --channels-last --amp", training_run, {"channels_last": True, "amp": torch.bfloat16}),
        "fast": ("here, --fast", training_run, fast),
        "fast_v2": ("here, --fast, MoCo v2", training_run, fast | {"method": None}),
        "fast_unsplit": ("here, --fast --bn-splits 1", training_run, unsplit),
        "ceiling": ("ceiling: the encoders alone", encoders_run, unsplit),
    }
    if not on_cuda:
        del rows["amp"]
    return rows


def measure(s, rounds, only=None, folder=None, workers=None):
    """The report (moco.bench.report). s: a Setting; rounds: turns of each row; only: names of rows, None for
    all; folder: a data set with train/, to measure the --fast step from files too; workers: of its loader,
    None for one per core. Raises UserError.
    """
    known = rows_of(s.device, s.bn_splits)
    only = only or [*known, "loss"]
    if unknown := [name for name in only if name not in (*known, "loss")]:
        raise UserError(f"--only {unknown[0]}: on {s.device.type} the rows are {', '.join(known)}, loss")
    rows = {name: row for name, row in known.items() if name in only}
    if folder is not None:
        workers = available_cores() if workers is None else workers
        rows |= {"fast": known["fast"], "files": from_files(s, known["fast"][2], folder, workers)}
    tables = {"a step on noise": measure_steps(s, rounds, rows)} if rows else {}
    if "loss" in only:
        title = "losses, their gradient, the accuracy: N 256, K 65536"
        tables[title] = measure_loss(s.device, rounds, s.steps)
    setting = {name: value for name, value in asdict(s).items() if name != "device"}
    return {"about": about(s.device, **setting, rounds=rounds), "tables": tables}


def measure_steps(s, rounds, rows):
    """Rows of a table: training steps on images that are on the device already."""
    torch._dynamo.config.recompile_limit = 64  # 8 would leave the last rows' encoders uncompiled
    images, turns, cells = s.images(), {}, {}
    for name, (_, function, options) in rows.items():
        try:
            run = function(s, images, **options)
            cells[name] = {"first loss": run(1)}
            turns[name] = lambda _, run=run: timed(partial(run, s.steps), s.device)
        except RuntimeError as error:  # too little memory, no compiler
            cells[name] = {"first loss": f"left out: {first_line(error)}"}
    seconds = in_turns(turns, rounds, "steps") if turns else {}
    for name in seconds:
        cells[name]["pairs/s"] = spread(s.batch_size * s.steps / seconds[name])
        for column, base in BASES.items():
            if base in seconds:
                cells[name][column] = spread(seconds[base] / seconds[name])
    return {title: cells[name] for name, (title, *_) in rows.items()}


class Published(MoCo):
    """MoCo in the published arrangement of the same operations (facebookresearch/moco; joshr17/IFM)."""

    @torch.no_grad()
    def _momentum_update_key_encoder(self):
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data = k.data * self.m + q.data * (1.0 - self.m)

    def _logits(self, q, k, epsilon):
        return published_logits(q, k, self.queue, epsilon, self.T)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        start = int(self.queue_ptr)  # waits for the device
        self.queue[:, start : start + len(keys)] = keys.T
        self.queue_ptr[0] = (start + len(keys)) % self.K


def published_logits(q, k, queue, epsilon, T):
    """Logits, perturbed logits (N x (1+K) each), and labels (N,)."""
    l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)  # N x 1
    l_neg = torch.einsum("nc,ck->nk", q, queue.clone().detach())  # N x K
    logits = torch.cat([l_pos, l_neg], dim=1)
    logits_ifm = torch.cat([l_pos - epsilon, l_neg + epsilon], dim=1)
    logits /= T
    logits_ifm /= T
    return logits, logits_ifm, torch.zeros(len(q), dtype=torch.long).to(q.device)


def training_run(
    s,
    images,
    published=False,
    amp=None,
    channels_last=False,
    compile=False,
    method="ifm",
    bn_splits=None,
    batches=None,
):
    """run(steps), the mean loss of this program's step, or of the published one, which waits for the loss in
    each step. batches(steps): views, instead of `images`.
    """
    s = replace(s, bn_splits=bn_splits or s.bn_splits)
    model = s.model(Published if published else MoCo, channels_last, compile)
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4, fused=not published)
    weights = losses.weights(method, ALPHA)

    def run(steps):
        total = correct = 0.0
        for step, (im_q, im_k) in enumerate(batches(steps) if batches else [images] * steps):
            order = shuffle_order(SEED, 0, step, len(im_q))
            with torch.autocast(s.device.type, amp, enabled=amp is not None):
                if published:
                    logits, logits_ifm, labels = model(im_q, im_k, order=order)
                    loss = losses.ifm(logits, logits_ifm, labels, ALPHA)
                    correct += losses.accuracy(logits, labels)[0]
                else:
                    loss, ranks, *_ = model(im_q, im_k, weights=weights, order=order)
                    correct += losses.rank_accuracy(ranks)[0]
            total += loss.item() if published else loss.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(total) / steps

    return run


def from_files(s, fast, folder, workers):
    """The row of --fast, whose options are `fast`, on the images of `folder`/train. Raises UserError."""
    images, recipe, on_cuda = image_folder(folder, "train"), moco_v2(), s.device.type == "cuda"
    settings = {"size": s.size, "batch_size": s.batch_size, "workers": workers, "device": s.device}
    settings |= {"resize": "torch" if on_cuda else "pil", "photometric": not on_cuda}
    loader = TrainLoader(images, recipe, seed=SEED, **settings)
    if len(loader) < s.steps:
        raise UserError(f"{images.root} has images for {len(loader)} steps, not {s.steps}; lower --steps")
    augment = DeviceAugment(recipe, s.device, photometric=on_cuda, batch_shape=(2 * s.batch_size, s.size))
    epochs = count()

    def batches(steps):  # the last of an epoch, so that workers rest when other rows take their turns
        return map(augment, loader.epoch(next(epochs), first_step=len(loader) - steps))

    title = f"here, --fast, from {folder} with {workers} workers"
    return title, training_run, fast | {"batches": batches}


def encoders_run(s, images, amp=None, channels_last=False, compile=False, bn_splits=1):
    """The work that no step can do without: forward and backward of one encoder, forward of another."""
    encoder = replace(s, moco_k=1, bn_splits=bn_splits).model(MoCo, channels_last, compile).encoder_q
    layout = torch.channels_last if channels_last else torch.contiguous_format
    im_q, im_k = (view.to(memory_format=layout) for view in images)
    gradient = torch.randn(s.batch_size, DIM, device=s.device) / s.batch_size

    def run(steps):
        for _ in range(steps):
            with torch.autocast(s.device.type, amp, enabled=amp is not None):
                features = encoder(im_q)
                with torch.no_grad():
                    encoder(im_k)
            encoder.zero_grad()
            features.backward(gradient.to(features.dtype))

    return run


def measure_loss(device, rounds, steps, batch_size=256, moco_k=65536):
    """Rows of a table: both losses, their gradient and the accuracy alone, as published and as here."""
    generator = torch.Generator(device).manual_seed(SEED)
    q, k, queue = (
        F.normalize(torch.randn(shape, generator=generator, device=device), dim=axis)
        for shape, axis in (((batch_size, DIM), 1), ((batch_size, DIM), 1), ((DIM, moco_k), 0))
    )
    q.requires_grad_()

    def two_cross_entropies():
        logits, logits_ifm, labels = published_logits(q, k, queue, EPSILON, T)
        loss = losses.ifm(logits, logits_ifm, labels, ALPHA)
        return loss, losses.accuracy(logits, labels), torch.autograd.grad(loss, q)

    def one_pass():
        loss, ranks = losses.contrast(q, k, queue, T, losses.weights("ifm", ALPHA), 2 * EPSILON / T)
        return loss, losses.rank_accuracy(ranks), torch.autograd.grad(loss, q)

    def seconds(work, _):
        return timed(lambda: [work() and None for _ in range(steps)], device) / steps

    works = {"two cross-entropies": two_cross_entropies, "one pass (losses.contrast)": one_pass}
    taken = in_turns({name: partial(seconds, work) for name, work in works.items()}, rounds, "loss")
    memory = {name: peak_bytes(work, device) for name, work in works.items()}
    first, _ = works
    return {
        name: {
            "loss": work()[0].item(),
            "MB": memory[name] / 1e6,
            "ms": spread(1000 * taken[name]),
            "of the first's memory": memory[name] / memory[first],
            "of the first's time": spread(taken[name] / taken[first]),
        }
        for name, work in works.items()
    }


def peak_bytes(work, device):
    """The peak of the bytes that `work` allocates with torch, on top of those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))  # negative: given back
