"""Classification by the weighted vote of the nearest neighbors, also of an encoder while it is trained.

Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4
(k 200, T 0.07 there; T 0.1 in MoCo's demonstration on CIFAR): each of the k nearest images of the bank votes
for its class with weight exp(cosine / T).
"""

import contextlib
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from moco.data.folders import image_folder, use_numbers_of_train
from moco.data.loader import ValidationLoader
from moco.encoders import backbone
from moco.errors import UserError
from moco.evaluate.features import features_of, gram, rankme
from moco.shuffle import concat_all_gather
from moco.trifeature import FACTORS, factor_of, is_combination

K, T = 200, 0.1
CHUNK = 1 << 24  # similarities that are held at a time: 64 MB
BATCH_PIXELS = 1 << 19  # of a batch at least: 512 views of 32 x 32


def neighbors(queries, bank, k):
    """Cosines and indices of the k nearest rows of the bank, Q x min(k, N) each, the most similar first.

    queries: Q x C and bank: N x C, float32 unit rows.
    """
    k = min(k, len(bank))
    nearest = [(part @ bank.T).topk(k, dim=1) for part in queries.split(max(1, CHUNK // len(bank)))]
    similarity, index = zip(*nearest, strict=True)
    return torch.cat(similarity), torch.cat(index)


def vote(similarity, labels, classes, T=T):
    """The class of each query by the weighted vote of its neighbors: (Q,) int64, the lowest of a tie.

    similarity: Q x k; labels: Q x k, int64 below `classes`. All weights are divided by exp(1 / T), so that
    none overflows.
    """
    weights = ((similarity.double() - 1) / T).exp()
    scores = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
    return scores.scatter_add_(1, labels, weights).argmax(dim=1)


def labelings(train, val):
    """What the classes of the ImageFolders train and val are read as: for Trifeature, whose
    classes in val/ never occur in train/, each factor; else "class".

    {name: (labels of train's classes, of val's classes, number of labels)}, labels int64. Raises UserError
    when val/ of other data has a class that train/ lacks.
    """
    if all(map(is_combination, train.classes + val.classes)):
        return {
            factor: (
                torch.tensor([factor_of(name, factor) for name in train.classes]),
                torch.tensor([factor_of(name, factor) for name in val.classes]),
                len(values),
            )
            for factor, values in FACTORS.items()
        }
    use_numbers_of_train(train, val, "remove it from val/, or leave out --knn")
    same = torch.arange(len(train.classes))
    return {"class": (same, same, len(same))}


def labeled_val(images):
    """The ImageFolder val/ for --knn, beside the ImageFolder train/ `images`. Raises UserError."""
    folder = Path(images.root).parent
    if not images.classes or not (folder / "val").is_dir():
        lack = f"{folder} has no val/" if images.classes else f"{images.root} has no labels"
        raise UserError(f"--knn needs train/ and val/ with a folder per class each, but {lack}; leave it out")
    return image_folder(folder, "val")


class KnnMonitor:
    """The percentage of val/ that an encoder in training classifies right, by nearest neighbors in train/,
    and the effective rank of its features of train/.

    The features are those of linear evaluation: before the classifier, of central views. The training is not
    changed: a second network in eval mode borrows the encoder's weights, and no random numbers are drawn.
    """

    def __init__(
        self,
        every,
        epochs,
        base_encoder,
        images,
        rank,
        loading,
        autocast=contextlib.nullcontext,
        skip_bad=False,
    ):
        """every: epochs between two evaluations (0: never); the last of `epochs` is always evaluated.

        base_encoder: constructs networks like the encoder (moco.encoders);
        images: the ImageFolder train/, with val/ beside it; loading: how training loads them, keywords of
        ValidationLoader; autocast: makes the context of a forward pass; skip_bad: leave out images of train/
        that cannot be read. Raises UserError when labels or val/ are missing, or val/ has other classes.
        """
        self.every, self.epochs, self.rank, self.autocast = every, epochs, rank, autocast
        if not every:
            return
        self.train, self.val, self.skip_bad = images, labeled_val(images), skip_bad
        self.labels = labelings(self.train, self.val)
        batch_size = max(loading["batch_size"], BATCH_PIXELS // loading["size"] ** 2)
        self.loader = partial(ValidationLoader, **{**loading, "batch_size": batch_size})
        self.network = backbone(base_encoder).eval()

    def __call__(self, epoch, encoder):
        """After `epoch` {"knn": {labeling: percent}, "rankme": of train/}, or {} where it is not evaluated.

        To be called on all ranks.
        """
        if not self.every or ((epoch + 1) % self.every and epoch + 1 < self.epochs):
            return {}
        began = time.monotonic()
        percent, rank = self._measure(encoder)
        numbers = " ".join(f"{name} {value:.1f}" for name, value in percent.items())
        self.rank.print(f" * kNN {numbers}, RankMe {rank:.1f} ({time.monotonic() - began:.1f} s)")
        return {"knn": percent, "rankme": rank}

    @torch.no_grad()
    def _measure(self, encoder):
        """(percentages by labeling, RankMe)"""
        self._borrow_weights(encoder)
        share, share_classes = self._features(self.train, self.skip_bad)
        products = self.rank.all_reduce(gram(share[share_classes >= 0]))
        bank, bank_classes = self._in_order(F.normalize(share, dim=1)), self._in_order(share_classes)
        queries, classes = self._features(self.val)
        queries = F.normalize(queries, dim=1)
        readable = bank_classes >= 0
        bank, bank_classes = bank[readable], bank_classes[readable]
        similarity, index = neighbors(queries, bank, K)
        correct = []
        for of_bank, of_queries, count in self.labels.values():
            labels, truth = of_bank.to(index.device)[bank_classes], of_queries.to(index.device)[classes]
            correct.append((vote(similarity, labels[index], count) == truth).sum())
        correct = self.rank.all_reduce(torch.stack(correct)).tolist()
        percent = {name: 100 * n / len(self.val) for name, n in zip(self.labels, correct, strict=True)}
        return percent, rankme(products)

    def _borrow_weights(self, encoder):
        # The BatchNorm statistics are those of rank 0, which DDP sends to the others before their next step.
        buffers = self.rank.broadcast({name: buffer.cpu() for name, buffer in encoder.named_buffers()})
        state = encoder.state_dict() | {name: b.to(self.rank.device) for name, b in buffers.items()}
        state = {name: state[name] for name in self.network.state_dict()}  # all but the head
        self.network.load_state_dict(state, assign=True)  # the same memory, not a copy
        self.network.to(self.rank.device)  # tensors that no state_dict has

    def _features(self, images, skip_bad=False):
        """Features and classes (-1: not readable) of this process's share of the images."""
        with contextlib.closing(
            self.loader(images, skip_bad=skip_bad)
        ) as loader:  # no idle workers in between
            return features_of(self.network, loader, self.rank.device, self.autocast)

    def _in_order(self, share):
        """The rows of all train/ images from each process's share of them: rank, rank + world_size, ..."""
        n, world = len(self.train), self.rank.world_size
        most = -(-n // world)
        padded = torch.cat([share, share.new_zeros(most - len(share), *share.shape[1:])])
        everyone = concat_all_gather(padded).unflatten(0, (world, most))
        return everyone.transpose(0, 1).flatten(0, 1)[:n]
