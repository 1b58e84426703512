"""MoCo: two encoders, a queue of keys, and logits that implicit feature modification (IFM) can perturb.

He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020 (algorithm 1);
Chen et al., "Improved baselines with momentum contrastive learning", 2020 (MoCo v2);
Robinson et al., "Can contrastive learning avoid shortcut solutions?", NeurIPS 2021 (IFM).
"""

import torch
import torch.nn.functional as F
from torch import nn

from moco.batchnorm import deinterleave, interleave, split_batchnorm
from moco.encoders import last_linear, replace_layer
from moco.errors import UserError
from moco.losses import contrast
from moco.shuffle import batch_shuffle, concat_all_gather, rank, world_size


class MoCo(nn.Module):
    """The query encoder, its momentum copy the key encoder, and the queue of the K newest keys.

    base_encoder: a callable that takes `num_classes` and returns a network whose classifier is one Linear, of
        any name (moco.encoders.last_linear)
    dim: C, the length of a feature
    K: number of keys in the queue
    m: momentum of the key encoder
    T: temperature
    mlp: give each encoder MoCo v2's hidden layer, Linear(d, d) and ReLU, before the classifier
    epsilon: length of IFM's step; None for plain InfoNCE
    bn_splits: compute BatchNorm over this many groups of the batch, as that many processes would

    Random numbers are drawn at construction in the published order: query encoder, key encoder, hidden layer
    of the query's head, of the key's, queue. Buffers: `queue` (dim x K, unit columns) and `queue_ptr` ((1,)
    int64, the next column to be replaced). `head`: the name of the classifier, in whose place the head is.
    Raises UserError when the network has no such classifier, or no BatchNorm to split.
    """

    def __init__(self, base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False, epsilon=None, bn_splits=1):
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.epsilon, self.bn_splits = epsilon, bn_splits
        self.head = last_linear(base_encoder)

        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        _redraw_zeros(self.encoder_q.get_submodule(self.head))
        if mlp:
            _add_hidden_layer(self.encoder_q, self.head)
            _add_hidden_layer(self.encoder_k, self.head)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        if bn_splits > 1 and not split_batchnorm(self, bn_splits):
            raise UserError(
                f"{type(self.encoder_q).__name__} has no BatchNorm that --bn-splits could split: leave it out"
            )

        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k, epsilon=None, *, weights=None, order=None):
        """Contrast two views of N images (N x 3 x H x W each) and put the keys into the queue.

        Returns (logits, labels), or (logits, logits_ifm, labels) with an epsilon here or at construction:
        logits N x (1+K) divided by T, the positive's in column 0, and labels (N,) int64, all 0.

        weights: those of the plain and of the perturbed loss (moco.losses.weights). With them it returns
        (loss, ranks, image_losses, q, k) instead: what moco.losses.contrast returns, the same numbers in
        less time and memory, and the features (N x C each, unit rows, without gradient) for statistics.
        order: in which the key encoder gets the images of all processes, a permutation (N*world,) int64 on
        the CPU, equal on all; None: drawn on rank 0.
        """
        q = self._encode(self.encoder_q, im_q)  # N x C

        with torch.no_grad():
            self._momentum_update_key_encoder()
            im_k, idx_unshuffle = batch_shuffle(im_k, order)  # N x 3 x H x W of any process; (N*world,)
            k = self._encode(self.encoder_k, im_k)  # N x C
            keys = concat_all_gather(k)[idx_unshuffle]  # N*world x C, in rank order
            k = keys.chunk(world_size())[rank()]  # N x C, of this process's own images

        epsilon = self.epsilon if epsilon is None else epsilon
        with torch.autocast(q.device.type, enabled=False):  # similarities keep their full precision
            if weights is None:
                outputs = self._logits(q, k, epsilon)
            else:
                margin = 2 * (epsilon or 0.0) / self.T
                outputs = *contrast(q, k, self.queue, self.T, weights, margin), q.detach(), k
        self._dequeue_and_enqueue(keys)
        return outputs

    def _logits(self, q, k, epsilon):
        l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)  # N x 1
        l_neg = q @ self.queue.clone()  # N x K; the queue changes before the backward pass reads it
        outputs = [torch.cat([l_pos, l_neg], dim=1) / self.T]  # N x (1+K)
        if epsilon is not None:
            outputs.append(ifm_logits(l_pos, l_neg, epsilon, self.T))  # N x (1+K)
        return *outputs, torch.zeros(len(q), dtype=torch.long, device=q.device)

    def _encode(self, encoder, images):
        features = deinterleave(encoder(interleave(images, self.bn_splits)), self.bn_splits)  # N x C
        return F.normalize(_at_least_float32(features), dim=1)

    @torch.no_grad()
    def _momentum_update_key_encoder(self):
        # k*m + q*(1-m), rounded three times as published; mul_().add_(q, alpha=1-m) would round twice.
        keys, queries = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_mul_(keys, self.m)
        torch._foreach_add_(keys, torch._foreach_mul(queries, 1.0 - self.m))

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        """Replace the oldest keys, wrapping around the end of the queue, by n x C ones; n may exceed K."""
        n = len(keys)
        newest = keys[-self.K :].T.to(self.queue.dtype)  # C x min(n, K)
        columns = (self.queue_ptr + torch.arange(n - newest.shape[1], n, device=keys.device)) % self.K
        # A non-finite key would make every later loss non-finite. All processes have the same keys.
        is_finite = torch.isfinite(newest).all()
        self.queue.index_copy_(1, columns, torch.where(is_finite, newest, self.queue[:, columns]))
        self.queue_ptr.copy_((self.queue_ptr + n) % self.K)


def ifm_logits(l_pos, l_neg, epsilon, T):
    """InfoNCE logits of features that were moved by epsilon to make the instance task harder, in closed form.

    The loss grows along -q for the positive and along q for a negative, so with |q| = 1 a step of length
    epsilon lowers the positive's cosine by epsilon and raises every negative's (Robinson et al. 2021,
    section 4). l_pos N x 1 and l_neg N x K are cosines, not yet divided by T. Returns N x (1+K).
    """
    return torch.cat([l_pos - epsilon, l_neg + epsilon], dim=1) / T


def _redraw_zeros(classifier):
    """Draw a Linear's weights where a network has it start at zero, or nearly, as vision transformers do:
    features of length 0 have no direction.
    """
    if not classifier.weight.is_meta and classifier.weight.abs().max() < 1e-3:
        classifier.reset_parameters()


def _add_hidden_layer(encoder, head):
    last = encoder.get_submodule(head)
    hidden = nn.Linear(last.in_features, last.in_features)
    replace_layer(encoder, head, nn.Sequential(hidden, nn.ReLU(), last))


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()
