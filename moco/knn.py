"""Classification by the nearest neighbours' weighted vote, as pure functions.

Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4
(k 200, T 0.07 there; T 0.1 in MoCo's demonstration on CIFAR): each of the k nearest images of the bank votes
for its class with weight exp(cosine / T).
"""

import torch
import torch.nn.functional as F

PART = 1 << 24  # similarities that are held at a time: 64 MB


def weighted_knn(queries, bank, labels, classes, k=200, T=0.1):
    """The classes (Q,), int64, that the k nearest of a bank give to queries; the lowest of those that tie.

    queries: Q x C and bank: N x C, float32 unit rows; labels: (N,) int64 below `classes`. k is at most N.
    """
    similarity, index = neighbours(queries, bank, k)
    return vote(similarity, labels[index], classes, T).argmax(dim=1)


def neighbours(queries, bank, k):
    """The k nearest rows of the bank to each query: cosines and indices, Q x min(k, N) each, in any order.

    Of equally near ones those that stand first in the bank are taken.
    """
    k = min(k, len(bank))
    found = [_nearest(part @ bank.T, k) for part in queries.split(max(1, PART // len(bank)))]
    if not found:  # no queries
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    similarity, index = zip(*found, strict=True)
    return torch.cat(similarity), torch.cat(index)


def vote(similarity, labels, classes, T):
    """The sum of exp(cosine / T) of each class among neighbours: Q x classes, float64.

    similarity: Q x k; labels: Q x k, int64. Every weight is divided by exp(1 / T), which changes no order.
    """
    weights = ((similarity.double() - 1) / T).exp()
    scores = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
    return scores.scatter_add_(1, labels, weights)


def unit_rows(features):
    """Features (N x C, any precision) as float32 rows of length 1."""
    return F.normalize(features.float(), dim=1)


def _nearest(similarity, k):
    values, index = similarity.topk(k, dim=1, sorted=False)
    last = values.amin(dim=1, keepdim=True)
    places = (values == last).sum(dim=1)  # for those that are as near as the last
    equal = similarity == last
    tied = (equal.sum(dim=1) > places).nonzero().flatten()
    if len(tied):  # topk takes any of them
        first = equal[tied].cumsum(dim=1) <= places[tied, None]
        chosen = (similarity[tied] > last[tied]) | (equal[tied] & first)  # k in each row
        index[tied] = chosen.nonzero()[:, 1].view(-1, k)
        values[tied] = similarity[tied].gather(1, index[tied])
    return values, index
