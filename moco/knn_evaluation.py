"""How well an encoder's features tell the classes of val/ apart while it is trained: --knn of pre-training.

Its features are those that linear evaluation reads: the pooled ones before `fc`, of central views. Nothing of
the training changes: a network of its own in evaluation mode reads the encoder's weights, and no random
number is drawn from torch's generators.
"""

import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from moco.data import check_same_classes, image_folder
from moco.distributed import from_first, sum_over_processes
from moco.encoders import base_encoder, without_memory
from moco.factors import AS_FOLDERS, FACTORS, factor_of, factors_of, is_combination
from moco.folded_batchnorm import fold_batchnorm
from moco.knn import neighbours, unit_rows, vote
from moco.shuffle import concat_all_gather
from moco.small_maps import small_maps
from moco.views import normalise

K, T = 200, 0.1
KEEP = 256 << 20  # bytes of central views that stay in memory, on all processes of a node together
PIXELS = 1 << 19  # of a batch, at least: 512 views of 32 x 32


def labellings(folder, train):
    """The ImageFolder val/ of `folder`, and what its classes and those of `train` stand for.

    The latter by name: (labels of train's classes, of val's, each int64, and how many there are); for
    Trifeature, whose combinations in val/ never occur in train/, its factors. Raises UserError when
    other folders have not the same classes.
    """
    val = image_folder(folder, "val")
    shown = factors_of(folder)  # not what pictures hide, whatever the names of their folders say
    if all(map(is_combination, train.classes + val.classes)):
        return val, {
            factor: (
                *(torch.tensor([factor_of(name, factor) for name in images.classes])
                  for images in (train, val)),
                len(values),
            )
            for factor, values in FACTORS.items() if factor in shown or shown == [AS_FOLDERS]
        }  # fmt: skip
    check_same_classes(folder, train, val, "leave out --knn")
    numbers = torch.arange(len(train.classes))
    return val, {"class": (numbers, numbers, len(numbers))}


class KnnEvaluation:
    """Called after an epoch in all processes of the run: the percentage of val/ that is right, by labelling.

    every: the epochs between two evaluations, 0 for never; the last of `epochs` is always evaluated.
    arch, process, execution: as in training.
    """

    def __init__(self, every, epochs, arch, process, execution):
        self.every, self.epochs, self.arch = every, epochs, arch
        self.process, self.execution = process, execution

    def load(self, folder, train, loading, may_skip=False):
        """Prepare what evaluations need, of the ImageFolder `train` of `folder` and val/ beside it.

        loading: that of training; may_skip: leave out images of train/ that cannot be read. Raises
        UserError.
        """
        if not self.every:
            return
        process = self.process
        val, self.labels = labellings(folder, train)
        self.bank = len(train)  # in the order of the images the bank stands first, then the queries
        self.size = loading.size
        local = process.local_world_size
        loading = replace(
            loading, batch_size=max(loading.batch_size, local * PIXELS // self.size**2), cache=None
        )
        images = SimpleNamespace(
            samples=train.samples + val.samples, targets=train.targets + val.targets, target_transform=None
        )
        self.loader = loading.validation(images, process, optional=self.bank if may_skip else 0)
        views = len(images.samples) / process.world_size * local * 3 * self.size**2
        self.kept = [] if views <= KEEP else None
        self.network = without_memory(partial(base_encoder(self.arch), num_classes=1)).eval()
        self.network.fc = nn.Identity()
        self.fold = fold_batchnorm(self.network)
        self.small = small_maps(self.network)

    def __call__(self, epoch, encoder):
        """{"knn": {labelling: percent}} after `epoch`, {} when it is not evaluated. encoder: ends in `fc`."""
        if not self.every or ((epoch + 1) % self.every and epoch + 1 < self.epochs):
            return {}
        began = time.monotonic()
        with torch.inference_mode():
            features, targets = self._features(encoder)
            percent = self._percent(features, targets)
        seconds = time.monotonic() - began
        found = " ".join(f"{name} {value:.1f}" for name, value in percent.items())
        self.process.say(f" * kNN {found} ({seconds:.1f} s)")
        return {"knn": percent}

    def _features(self, encoder):
        """Of this process's share of the images: unit rows (n x C) and classes (n,)."""
        # BatchNorm's statistics are those of the first process, which the others get before their next step.
        buffers = from_first({name: buffer.cpu() for name, buffer in encoder.named_buffers()})
        state = encoder.state_dict() | {
            name: buffer.to(self.process.device) for name, buffer in buffers.items()
        }
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        self.network.load_state_dict(self.fold(state), assign=True)  # the encoder's tensors stay as they are
        if self.process.device.type == "cpu" or self.execution.channels_last:
            self.network.to(memory_format=torch.channels_last)  # copies
        for convolution in self.small:
            convolution.matrix = None
        features, targets = [], []
        for pixels, target in self._views():
            with self.execution.autocast():
                features.append(unit_rows(self.network(normalise(pixels))))
            targets.append(target)
        return torch.cat(features), torch.cat(targets)

    def _views(self):
        """Batches of central views, uint8 (N, 3, S, S), and their classes; from memory the next time."""
        if self.kept:
            yield from self.kept
            return
        for batch in self.loader:
            pixels, targets = batch.pixels[0], batch.targets
            if self.kept is not None:
                pixels = pixels.clone()
                self.kept.append((pixels, targets))
            yield pixels, targets
        if self.kept:
            self.loader.close()

    def _percent(self, features, targets):
        rank, world = self.process.rank, self.process.world_size
        mine = len(range(rank, self.bank, world))
        bank, classes = (_in_order(part[:mine], self.bank, world) for part in (features, targets))
        readable = classes >= 0
        bank, classes = bank[readable], classes[readable]
        similarity, index = neighbours(features[mine:], bank, K)
        right = []
        for of_bank, of_queries, count in self.labels.values():
            labels, truth = of_bank.to(classes.device)[classes], of_queries.to(classes.device)[targets[mine:]]
            right.append((vote(similarity, labels[index], count, T).argmax(dim=1) == truth).sum())
        sums = torch.stack([*right, torch.tensor(len(targets) - mine, device=classes.device)])
        *right, total = sum_over_processes(sums).tolist()
        return {name: 100 * count / total for name, count in zip(self.labels, right, strict=True)}


def _in_order(share, total, world):
    """All rows of a tensor whose rows r, r + world, r + 2 world ... process r has; on every process."""
    most = -(-total // world)
    padded = torch.cat([share, share.new_zeros(most - len(share), *share.shape[1:])])
    everyone = concat_all_gather(padded).unflatten(0, (world, most))
    return everyone.transpose(0, 1).flatten(0, 1)[:total]
