"""InfoNCE, its perturbed form under implicit feature modification (IFM), what that does to the gradient, and
accuracy.

van den Oord et al. 2018 (InfoNCE); Robinson et al. 2021, section 4 (IFM). N: batch, C: feature dimension,
K: negatives, T: temperature. The positive's logit is in column 0, so all labels are 0.

`info_nce` and `ifm` are the published formulas on N x (1+K) logits. `contrast` gives the same loss without
holding the logits, and is what training uses.
"""

import math

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 4096, "cuda": 16384}  # keys at a time: their N x CHUNK logits stay in a CPU's cache


def info_nce(logits, labels):
    """Mean cross-entropy of N x (1+K) logits and labels (N,) int64, a scalar."""
    return F.cross_entropy(logits, labels)


def ifm(logits, logits_ifm, labels, alpha):
    """(CE(logits) + alpha * CE(logits_ifm)) / (1 + alpha), a scalar. Logits N x (1+K), labels (N,) int64."""
    return (info_nce(logits, labels) + alpha * info_nce(logits_ifm, labels)) / (1 + alpha)


def weights(method, alpha):
    """(weight of the plain loss, of the perturbed loss) for --method None, "ifm" or "ifm_only"."""
    if method is None:
        return 1.0, 0.0
    return (0.0, 1.0) if method == "ifm_only" else (1 / (1 + alpha), alpha / (1 + alpha))


def chance(K, method=None, epsilon=0.0, alpha=0.0, T=1.0):
    """The loss of a model that gives the positive and all K negatives the same similarity, a float.

    Plain InfoNCE: ln(1 + K). Perturbed: ln(1 + K exp(2 epsilon / T)). "ifm" is their mean weighted 1 : alpha.
    """
    margin = math.log(K) + 2 * (epsilon or 0.0) / T
    perturbed = max(margin, 0.0) + math.log1p(math.exp(-abs(margin)))  # ln(1 + exp(margin)), no overflow
    plain_weight, perturbed_weight = weights(method, alpha)
    return plain_weight * math.log1p(K) + perturbed_weight * perturbed


def gradient_weight(loss, epsilon, T, alpha, method):
    """What IFM multiplies an image's gradient by: (N,) from each image's InfoNCE `loss`, (N,).

    The perturbed loss of an image has the gradient of its InfoNCE times s(g + m) / s(g), with s the logistic
    function, g the gap of `contrast` and m = 2 epsilon / T: the same direction. As s(g) = 1 - exp(-loss),
    that is 1 / (1 - exp(-loss) + exp(-loss - m)): nearly 1 for a large loss and exp(m) for one of 0. So IFM
    is InfoNCE with more weight on the images that it has solved. method, alpha: as in `weights`.
    """
    plain, perturbed = weights(method, alpha)
    return plain + perturbed / (_slope(loss) + torch.exp(-loss - 2 * epsilon / T))


def gradient_lengths(loss, epsilon, T, alpha, method):
    """(sum of w s, sum of s) over the images, (2,): the length of the batch's gradient with IFM and without,
    up to a common factor, if the gradients of all images are parallel. Where they are not, the ratio of the
    two misstates by how much IFM lengthens it. Sums of processes add up.

    w: their `gradient_weight`s; s = 1 - exp(-loss): the length of an image's gradient up to the difference of
    its positive and its negative keys. The mean of w would count most the images that hardly have a gradient.
    """
    slope = _slope(loss)
    return torch.stack([(gradient_weight(loss, epsilon, T, alpha, method) * slope).sum(), slope.sum()])


def weight_statistics(loss, epsilon, T, alpha, method):
    """The mean and the 95th percentile of `gradient_weight` and the mean `loss` (N,), 0-dim. tensors by their
    names in the log.
    """
    weight = gradient_weight(loss, epsilon, T, alpha, method)
    p95 = weight.kthvalue(math.ceil(0.95 * len(weight))).values
    return {"info_nce": loss.mean(), "ifm_weight": weight.mean(), "ifm_weight_p95": p95}


def weight_bounds(K, epsilon, T, alpha, method, queue_mean=0.0):
    """Two upper bounds of any image's `gradient_weight`, floats: by the queue and by epsilon.

    By the queue, for K keys whose mean has this length: exp(g) is the sum of exp(l_neg / T) over
    exp(l_pos / T). By Jensen's inequality the sum is at least K exp(<q, mean key> / T), and l_pos is at most
    1; so s(g + m) / s(g) - 1 <= exp(-g) <= exp((1 + queue_mean) / T) / K. By epsilon: it is at most
    exp(m) - 1.
    """
    _, perturbed = weights(method, alpha)
    exponents = (1 + queue_mean) / T - math.log(K), 2 * epsilon / T
    by_queue, by_epsilon = (math.exp(x) if x < 700 else math.inf for x in exponents)
    return (1 + perturbed * by_queue, 1 + perturbed * (by_epsilon - 1)) if perturbed else (1.0, 1.0)


def _slope(loss):
    """1 - exp(-loss), above 0."""
    return (-torch.expm1(-loss)).clamp(min=torch.finfo(loss.dtype).tiny)


def contrast(q, k, queue, T, weights, margin=0.0):
    """The weighted sum of both losses and the ranks of the positives, in one pass over the queue.

    q, k: N x C, unit rows, k without gradient; queue: C x K, unit columns; weights: of the plain and of the
    perturbed loss; margin: 2 epsilon / T. Returns (loss, ranks, image_losses): a scalar with a gradient for
    q; (N,) int64, the number of negatives that are nearer to the query than its positive; (N,), each image's
    InfoNCE without gradient.

    With a = l_pos / T and b = logsumexp(l_neg / T), InfoNCE is softplus(b - a). IFM lowers the positive's
    cosine by epsilon and raises the negatives', so its loss is softplus(b - a + 2 epsilon / T). The gradient
    of b needs the mean of the keys under softmax(l_neg / T) and nothing else of the queue: so the queue may
    change right after the forward pass.
    """
    l_pos = torch.einsum("nc,nc->n", q, k)  # N
    b, ranks = _LogSumExp.apply(q, l_pos.detach(), queue, T)  # N each
    plain, perturbed = weights
    gap = b - l_pos / T  # N
    image_losses = _softplus(gap)  # N
    loss = 0.0
    if plain:
        loss = plain * image_losses.mean()
    if perturbed:
        loss = loss + perturbed * _softplus(gap + margin).mean()
    return loss, ranks, image_losses.detach()


class _LogSumExp(torch.autograd.Function):
    """(logsumexp of q @ queue / T, number of products above l_pos), each (N,).

    By "online" softmax (Milakov & Gimelshein 2018; Dao et al. 2022): in chunks of the queue, whose logits are
    not kept.
    """

    @staticmethod
    def forward(ctx, q, l_pos, queue, T):
        N, K = len(q), queue.shape[1]
        largest, total = q.new_full((N, 1), -torch.inf), q.new_zeros(N, 1)
        mean = torch.zeros_like(q)  # N x C, of the keys under softmax, times total until the end
        ranks = torch.zeros(N, dtype=torch.int64, device=q.device)
        for keys in queue.split(CHUNK.get(q.device.type, K), dim=1):
            logits = q @ keys  # N x chunk
            ranks += (logits > l_pos[:, None]).sum(dim=1)
            logits.div_(T)
            newest = torch.maximum(largest, logits.amax(dim=1, keepdim=True))  # N x 1
            shrink = (largest - newest).exp_()  # N x 1
            weights = logits.sub_(newest).exp_()  # N x chunk
            total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
            mean.mul_(shrink).addmm_(weights, keys.T)
            largest = newest
        ctx.save_for_backward(mean.div_(total))
        ctx.T = T
        ctx.mark_non_differentiable(ranks)
        return (total.log() + largest).squeeze(1), ranks

    @staticmethod
    def backward(ctx, grad, _):
        (mean,) = ctx.saved_tensors
        return grad[:, None] * mean / ctx.T, None, None, None


def _softplus(x):
    """log(1 + exp(x)), exact for large x too, where F.softplus becomes x."""
    return -F.logsigmoid(-x)


@torch.no_grad()
def accuracy(logits, labels, topk=(1, 5)):
    """Percentages of rows of N x classes whose label (N, int64) is among the k largest: 0-dim. tensors.

    With fewer classes than k every row counts as correct.
    """
    largest = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices  # N x k
    hits = largest == labels[:, None]
    return [hits[:, :k].any(dim=1).float().mean() * 100 for k in topk]


@torch.no_grad()
def rank_accuracy(ranks, topk=(1, 5)):
    """Percentages of ranks (N, int64) below each k, 0-dim. tensors: the accuracy of `contrast`'s logits."""
    return [(ranks < k).float().mean() * 100 for k in topk]
