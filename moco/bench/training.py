"""The training steps that are compared: the published one, this program's, and its encoders alone."""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from moco import losses
from moco.builder import MoCo
from moco.data.augment import draw, moco_v2
from moco.data.loader import batch_per_process
from moco.data.ring import Batch
from moco.encoders import base_encoder, check_image_size, has_batchnorm, on_meta_device
from moco.errors import UserError
from moco.options import precision
from moco.seeds import shuffle_order

EPSILON, ALPHA, T, DIM, LR, SEED = 0.1, 1.0, 0.2, 128, 0.03, 0
DEFAULTS = {
    "cuda": {"arch": "resnet50", "batch_size": 512, "size": 224, "moco_k": 65536, "bn_splits": 8, "steps": 6},
    "cpu": {"arch": "resnet18", "batch_size": 32, "size": 64, "moco_k": 4096, "bn_splits": 8, "steps": 2},
}


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

    def batch(self):
        """Noise as a loader's Batch on the device, with what moco_v2 draws for its views."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        shape = (2, self.batch_size, self.size, self.size, 3)
        pixels = torch.randint(256, shape, generator=generator, device=self.device, dtype=torch.uint8)
        indices = np.arange(self.batch_size)
        drawn = [draw(moco_v2(), self.size, self.size, SEED, 0, index) for index in indices.tolist()]
        return Batch(pixels.permute(0, 1, 4, 2, 3), torch.from_numpy(indices), np.stack(drawn, 1), indices)

    def model(self, kind=MoCo, channels_last=False, compile=False):
        """A model with weights drawn from SEED: the same for all of one size."""
        torch.manual_seed(SEED)
        encoder = base_encoder(self.arch, image_size=self.size)
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
    network = on_meta_device(partial(base_encoder(s.arch, image_size=s.size), num_classes=DIM))
    return s if has_batchnorm(network) else replace(s, bn_splits=1)


class Training:
    """A model, its optimizer and its step. Called with a number of steps, it trains and returns their mean
    loss, a 0-dim. tensor that it does not wait for.

    s: a Setting. images: two views on the device, for every step; batches(steps): an iterable of other ones.
    steps, bn_splits: in place of those of `s`. precision: that of the encoders in the newest step.
    """

    kind = MoCo

    def __init__(
        self,
        s,
        images,
        *,
        batches=None,
        steps=None,
        bn_splits=None,
        amp=None,
        channels_last=False,
        compile=False,
        method="ifm",
    ):
        self.s = s = replace(s, bn_splits=bn_splits or s.bn_splits, steps=steps or s.steps)
        self.batches = batches or (lambda steps: [images] * steps)
        self.model = s.model(self.kind, channels_last, compile)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LR, 0.9, weight_decay=1e-4, fused=self.kind is MoCo
        )
        self.autocast = partial(torch.autocast, s.device.type, amp, enabled=amp is not None)
        self.weights = losses.weights(method, ALPHA)

    def __call__(self, steps):
        total = 0.0
        for number, (im_q, im_k) in enumerate(self.batches(steps)):
            total = total + self.step(im_q, im_k, shuffle_order(SEED, 0, number, len(im_q)))
        return total / steps

    def step(self, im_q, im_k, order):
        with self.autocast():
            self.precision = precision(self.s.device)
            loss, ranks, *_ = self.model(im_q, im_k, weights=self.weights, order=order)
        losses.rank_accuracy(ranks)
        self.learn(loss)
        return loss.detach()

    def learn(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


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


class PublishedTraining(Training):
    """The published arrangement, which waits for the loss in each step."""

    kind = Published

    def step(self, im_q, im_k, order):
        self.precision = precision(self.s.device)
        logits, logits_ifm, labels = self.model(im_q, im_k, order=order)
        loss = losses.ifm(logits, logits_ifm, labels, ALPHA)
        losses.accuracy(logits, labels)
        waited_for = loss.item()
        self.learn(loss)
        return waited_for


class Encoders(Training):
    """What no step can do without: forward and backward of one encoder, forward of the other, on tensors like
    those of a step. The loss is nan.
    """

    def __init__(self, s, images, *, amp=None, **options):
        im_q, im_k = images
        images = im_q, im_k.to(amp or im_k.dtype)  # as moco.shuffle hands it on
        super().__init__(replace(s, moco_k=1), images, amp=amp, **options)
        self.gradient = torch.randn(s.batch_size, DIM, device=s.device) / s.batch_size

    def step(self, im_q, im_k, order):
        with self.autocast():
            self.precision = precision(self.s.device)
            features = self.model.encoder_q(im_q)
            with torch.no_grad():
                self.model.encoder_k(im_k)
        self.model.zero_grad()
        features.backward(self.gradient.to(features.dtype))
        return math.nan
