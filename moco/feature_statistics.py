"""How the features of a step lie on the sphere: numbers that tell a healthy run from a collapsed one.

All take unit rows (float32 or float64, without gradient) and return a scalar on their device. Nothing here
waits for the device, and no N x K product is made.
"""

import torch


def similarities(q, k, mean_key):
    """The four numbers below by name. q, k: N x C, positive pairs; mean_key: (C,), the mean of the queue."""
    return {
        "pos_similarity": pos_similarity(q, k),
        "neg_similarity": neg_similarity(q, mean_key),
        "alignment": alignment(q, k),
        "uniformity": uniformity(q),
    }


def pos_similarity(q, k):
    """Mean cosine of the rows of q and k, N x C each."""
    return (q * k).sum(dim=1).mean()


def neg_similarity(q, mean_key):
    """Mean cosine of the N rows of q and a queue's keys, by the mean of these (C,): cosines are linear."""
    return q.mean(dim=0) @ mean_key


def alignment(q, k):
    """Mean squared distance of positive pairs, the rows of q and k (Wang & Isola 2020, with alpha 2)."""
    return (q - k).square().sum(dim=1).mean()


def uniformity(q):
    """log of the mean of exp(-2 |q_i - q_j|^2) over pairs i < j (Wang & Isola 2020, t 2); nan for one row."""
    return torch.pdist(q).square().mul(-2).exp().mean().log()
