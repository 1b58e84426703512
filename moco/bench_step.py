"""`python -m moco.bench step`: the training step as published, as it is here, with each flag, and what its
encoders alone take, in turns on images that are on the device already.
"""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from moco import losses
from moco.bench import STEP_ROWS
from moco.bench_report import in_turns, spread
from moco.bench_step_report import Row, described, hours, peak_bytes, timed
from moco.bench_train import ALPHA, DIM, EPSILON, LR, SEED, T, check_positive, setting, trainer
from moco.builder import MoCo
from moco.contrast import contrast
from moco.errors import UserError
from moco.execution import Execution, execution_of
from moco.meters import accuracy, rank_accuracy
from moco.progress import Progress
from moco.seeds import shuffle_order

LOSS = {"batch_size": 256, "moco_k": 65536}
OFF_CPU = {
    "bf16": "it is slow on most CPUs; --only bf16 measures it",
    "compile": "it takes minutes to start on a CPU; --only compile measures it",
}


def measure(device, *, rounds, steps, only=(), without=(), **sizes):
    """The report, a dict that JSON can hold. rounds: turns of each row; steps: of a turn; for this and
    for `sizes` None is the device's default. only, without: of moco.bench.STEP_ROWS. Raises UserError.
    """
    began = time.monotonic()
    s = setting(device, **sizes)
    steps = (8 if s.device.type == "cuda" else 2) if steps is None else steps
    check_positive(rounds=rounds, steps=steps)
    names = [name for name in STEP_ROWS if (name in only or not only) and name not in without]
    if not names:
        raise UserError("no row is left to measure; name fewer after --without, or others after --only")
    report = {}
    if names != ["loss"]:
        report.update(_steps(s, rounds, steps, names, only))
    if "loss" in names:
        shape = {name: sizes.get(name) or default for name, default in LOSS.items()}
        report["loss"] = measure_loss(**shape, device=s.device, rounds=rounds, steps=steps)
    report.update(described(s), rounds=rounds, steps=steps)
    return {**report, "seconds": round(time.monotonic() - began, 1)}


def _steps(s, rounds, steps, names, asked):
    """The part of the report on whole steps: the rows `names`, of which `asked` are named by the user."""
    images, rows, left_out, on_cuda = s.images(), {}, {}, s.device.type == "cuda"
    if not on_cuda:
        left_out = {name: OFF_CPU[name] for name in names if name in OFF_CPU and name not in asked}
    names = [name for name in names if name not in left_out]
    if on_cuda or "compile" in names:
        torch._dynamo.config.recompile_limit = 64  # 8 would leave the last rows' encoders uncompiled
    for name, tf32, execution, build in rows_of(s, names):
        if isinstance(execution, UserError):
            left_out[name] = execution.sentence
        elif name.startswith("published") and s.moco_k % s.batch_size:
            left_out[name] = "its queue takes whole batches: --moco-k must be a multiple of --batch-size"
        else:
            try:
                rows[name] = Row(s.device, tf32, execution, partial(build, s, images, execution))
            except torch.OutOfMemoryError:
                left_out[name] = "the device's memory is too small for it; lower --batch-size"
    if not rows:
        reasons = "; ".join(left_out.values()) or "TF32 is a mode of GPUs"
        raise UserError(f"none of the rows can be measured here: {reasons}")

    with Progress("steps", rounds, "rounds") as bar:
        taken = in_turns(rows, rounds, lambda name: rows[name].turn(steps), bar.update)
    rates = {name: s.batch_size * steps / np.array(taken[name])[:, 0] for name in rows}

    def ratio(name, other):
        return spread(rates[name] / rates[other]) if name in rates and other in rates else None

    return {
        "rows": {
            name: {
                "execution": str(row.execution).removeprefix("execution: "),
                "images_per_s": spread(rates[name]),
                "to_ceiling": ratio(name, "ceiling"),
                "to_faithful": ratio(name, "faithful"),
                "to_published": ratio(name, "published"),
                "peak_bytes": max(peak for _, peak in taken[name]) if on_cuda else None,
                "first_loss": row.first_loss,
            }
            for name, row in rows.items()
        },
        "left_out": left_out,
        "ifm_to_v2": ratio("fast", "fast_v2"),
        "split_to_unsplit": ratio("fast", "fast_unsplit"),
        "hours_200_epochs": hours(np.median(rates["fast"])) if on_cuda and "fast" in rates else None,
    }


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


def published_run(s, images, execution):
    """run(steps), the mean loss: float32, whatever `execution`, and a wait for the loss in each step."""
    model = s.model(Published).to(s.device).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4)

    def run(steps):
        total, correct = 0.0, [0.0, 0.0]
        for step in range(steps):
            order = shuffle_order(SEED, 0, step, s.batch_size)  # as the other rows, to have the same loss
            logits, logits_ifm, labels = model(*images, order=order)
            loss = losses.ifm(logits, logits_ifm, labels, ALPHA)
            correct = [sum(pair) for pair in zip(correct, accuracy(logits, labels), strict=True)]
            total += loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return total / steps

    return run


def training_run(s, images, execution, method="ifm"):
    train = trainer(s, execution, method)
    return lambda steps: train([images] * steps, lambda batch: batch)


def bare_run(s, images, execution):
    """The work that no step can do without: forward and backward of one encoder, forward of another."""
    encoder = replace(s, bn_splits=1, moco_k=1).model().encoder_q
    execution.prepare(encoder)
    encoder.to(s.device).train()
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    im_q, im_k = (view.to(memory_format=layout) for view in images)
    gradient = torch.randn(s.batch_size, DIM, device=s.device) / s.batch_size

    def run(steps):
        for _ in range(steps):
            with execution.autocast():
                features = encoder(im_q)
                with torch.no_grad():
                    encoder(im_k)
            encoder.zero_grad()
            features.backward(gradient.to(features.dtype))

    return run


def rows_of(s, names):
    """Of each row in `names` that this device has: name, TF32 (None: torch's settings), an Execution or the
    UserError that refuses it, and what makes run(steps) from (Setting, images, Execution).
    """
    plain, on_cuda = Execution(s.device), s.device.type == "cuda"
    rows = []
    for suffix, tf32 in (("", False), ("_tf32", True))[: 1 + on_cuda]:
        rows.append((f"published{suffix}", tf32, plain, published_run))
        rows.append((f"faithful{suffix}", tf32, plain, training_run))
    flags = {"channels_last": {"channels_last": True}, "bf16": {"amp": "bf16"}, "compile": {"compile": True}}
    chosen = {}  # each flag is added to those before it that this device can do
    for name in ("channels_last", "bf16", "compile") if on_cuda else ("channels_last", "compile", "bf16"):
        if on_cuda or name in names or name not in OFF_CPU:
            execution = _tried(Execution, s.device, **chosen, **flags[name])
            chosen |= {} if isinstance(execution, UserError) else flags[name]
            rows.append((name, False, execution, training_run))
    fast, unsplit = (_tried(execution_of, s.device, None, None, None, True, g) for g in (s.bn_splits, 1))
    rows += [
        ("fast", None, fast, training_run),
        ("fast_v2", None, fast, partial(training_run, method=None)),
        ("fast_unsplit", None, unsplit, lambda s, *rest: training_run(replace(s, bn_splits=1), *rest)),
        ("ceiling", None, fast, bare_run),
    ]
    return [row for row in rows if row[0] in names]


def _tried(make, *arguments, **flags):
    """The Execution that `make` gives, or the UserError that refuses it."""
    try:
        execution = make(*arguments, **flags)
        execution.check()
    except UserError as error:
        return error
    return execution


def measure_loss(batch_size, moco_k, device, rounds, steps):
    """Both losses, their gradient and the accuracy alone, as two cross-entropies and by moco.contrast."""
    generator = torch.Generator(device).manual_seed(SEED)
    q, k, queue = (
        F.normalize(torch.randn(shape, generator=generator, device=device), dim=axis)
        for shape, axis in (((batch_size, DIM), 1), ((batch_size, DIM), 1), ((DIM, moco_k), 0))
    )
    q.requires_grad_()

    def two_cross_entropies():
        logits, logits_ifm, labels = published_logits(q, k, queue, EPSILON, T)
        loss = losses.ifm(logits, logits_ifm, labels, ALPHA)
        return loss, accuracy(logits, labels), torch.autograd.grad(loss, q)

    def one_pass():
        loss, ranks = contrast(q, k, queue, T, losses.weights("ifm", ALPHA), 2 * EPSILON / T)
        return loss, rank_accuracy(ranks), torch.autograd.grad(loss, q)

    works = {"two_cross_entropies": two_cross_entropies, "contrast": one_pass}
    report = {
        name: {"loss": work()[0].item(), "peak_bytes": peak_bytes(work, device)}
        for name, work in works.items()
    }

    def turn(name):
        return timed(lambda: [works[name]() and None for _ in range(steps)], device)

    with Progress("loss", rounds, "rounds") as bar:
        taken = in_turns(works, rounds, turn, bar.update)
    for name, row in report.items():
        row["ms"] = spread(1000 * np.array(taken[name]) / steps)
    ratio = np.divide(taken["contrast"], taken["two_cross_entropies"])
    peaks = [report[name]["peak_bytes"] for name in ("contrast", "two_cross_entropies")]
    report |= {"time_ratio": spread(ratio), "memory_ratio": round(peaks[0] / peaks[1], 4)}
    return {**report, "batch_size": batch_size, "moco_k": moco_k}
