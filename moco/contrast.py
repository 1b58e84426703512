"""InfoNCE, its form under implicit feature modification (IFM), and the accuracy, in one pass over the queue.

Both losses are functions of two numbers of an image: the positive's logit a and b, the log-sum-exp of its
negatives' logits. InfoNCE is softplus(b - a); IFM lowers the positive's cosine by epsilon and raises the
negatives', so its loss is softplus(b - a + 2 epsilon / T). The gradient with respect to the query needs the
mean of the keys under softmax of the negatives' logits besides. So the N x K logits are never held: a part
of the queue after the other is multiplied, summed up and forgotten, as in "online" softmax (Milakov &
Gimelshein 2018; Dao et al. 2022). And because that mean is all that the backward pass reads, the queue may
change right after the forward pass.
"""

import torch
import torch.nn.functional as F

PART = {"cpu": 4096, "cuda": 16384}  # keys at a time: a CPU's cache then holds their logits


def contrast(q, k, queue, T, weights, margin=0.0):
    """The contrastive loss of N queries, and how many negatives are nearer to each than its positive.

    q, k: N x C, unit length, the k without gradient; queue: C x K, its columns the negatives; T: the
    temperature; weights: of the plain and of the perturbed loss; margin: 2 epsilon / T, by which the
    perturbed loss moves the logits apart. Returns the mean loss (a scalar with a gradient for q) and ranks
    (N, int64): the positive is among the j largest logits when its rank is below j.
    """
    l_pos = torch.einsum("nc,nc->n", q, k)
    b, rank = _Negatives.apply(q, l_pos.detach(), queue, T)
    plain, perturbed = weights
    gap = b - l_pos / T
    loss = 0.0
    if plain:
        loss = plain * _softplus(gap).mean()
    if perturbed:
        loss = loss + perturbed * _softplus(gap + margin).mean()
    return loss, rank


class _Negatives(torch.autograd.Function):
    """(log-sum-exp of q @ queue / T, number of products above l_pos), each (N,)."""

    @staticmethod
    def forward(ctx, q, l_pos, queue, T):
        N, K = len(q), queue.shape[1]
        part = PART.get(q.device.type, K)
        largest = q.new_full((N, 1), -torch.inf)
        total, mean = q.new_zeros(N, 1), torch.zeros_like(q)
        rank = torch.zeros(N, dtype=torch.int64, device=q.device)
        for keys in queue.split(part, dim=1):
            logits = q @ keys  # N x part
            rank += (logits > l_pos[:, None]).sum(dim=1)
            logits.div_(T)
            newest = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
            shrink = (largest - newest).exp_()
            weights = logits.sub_(newest).exp_()
            total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
            mean.mul_(shrink).addmm_(weights, keys.T)
            largest = newest
        ctx.save_for_backward(mean.div_(total))
        ctx.T = T
        ctx.mark_non_differentiable(rank)
        return (total.log() + largest).squeeze(1), rank

    @staticmethod
    def backward(ctx, grad, _):
        (mean,) = ctx.saved_tensors
        return grad[:, None] * mean / ctx.T, None, None, None


def _softplus(x):
    """log(1 + exp(x)), exact for large x too, where F.softplus becomes x."""
    return -F.logsigmoid(-x)
