"""Small training steps in several processes, and what each of them hands to torch's collectives."""

import torch
import torch.distributed as dist
from tiny import TinyEncoder

from moco import losses
from moco.builder import MoCo
from moco.run.launch import Rank

N, SIZE, DIM, K = 8, 16, 16, 64
IDENTICAL = ("queue", "queue_ptr")
ITEMS = ("images", "order", "keys", "gradients", "buffers")


class Counted:
    """Counts by item, from its creation on, the payload that leaves this rank in torch's collectives.

    What a rank hands in is counted as the collective is defined: to an all-gather W-1 times, to an
    all-reduce 2(W-1)/W times, from a broadcast the mean of W-1 copies over W ranks; of an all-to-all the
    parts for others.
    """

    def __init__(self, wrapped):
        self.sent = dict.fromkeys(ITEMS, 0)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mean = (self.world - 1) / self.world
        self._spy("all_to_all_single", self._all_to_all)
        self._spy("all_gather", self._all_gather)
        self._spy("broadcast", lambda tensor, *_, **__: self._add("order", tensor, self.mean))
        self._spy("_broadcast_coalesced", self._buffers)
        wrapped.register_comm_hook(None, self._gradients)

    def _add(self, item, tensor, times):
        self.sent[item] += tensor.numel() * tensor.element_size() * times

    def _spy(self, name, count):
        genuine = getattr(dist, name)

        def counted(*args, **kwargs):
            count(*args, **kwargs)
            return genuine(*args, **kwargs)

        setattr(dist, name, counted)  # in this forked rank alone

    def _all_to_all(self, _, handed, output_split_sizes, input_split_sizes):
        for to, part in enumerate(handed.split(input_split_sizes)):
            if to != self.rank:
                self._add("images", part, 1)

    def _all_gather(self, _, tensor):
        self._add("images" if tensor.dim() == 4 else "keys", tensor, self.world - 1)

    def _buffers(self, group, tensors, size, source):
        for tensor in tensors:
            self._add("buffers", tensor, self.mean)

    def _gradients(self, _, bucket):
        self._add("gradients", bucket.buffer(), 2 * self.mean)
        mean = dist.all_reduce(bucket.buffer().div_(self.world), async_op=True).get_future()
        return mean.then(lambda done: done.value()[0])


def tiny_model(epsilon=0.1):
    torch.manual_seed(0)
    return MoCo(TinyEncoder, DIM, K, 0.9, 0.2, epsilon=epsilon)


def wrapped_model(rank, world, identical=IDENTICAL):
    return Rank(rank, world, rank, world, world, torch.device("cpu")).wrap(tiny_model(), identical)


def train_step(wrapped, step, order, amp=False, n=N, size=SIZE):
    """A step on images that differ by rank, with a learning rate of 0.1."""
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
    im_q, im_k = torch.randn(2, n, 3, size, size, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss, *_ = wrapped(im_q, im_k, weights=losses.weights("ifm", 1.0), order=order)
    wrapped.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad


def even_order(world, n=N):
    """An order in which each rank sends as many images to each: the mean of all orders."""
    return torch.arange(n * world).view(-1, world).T.flatten()


def steps_counted(rank, world, identical, amp, orders, shuffle=None):
    """What this rank sent in each step, after a first one, in which DDP also agrees on its buckets."""
    if shuffle:
        shuffle()
    wrapped = wrapped_model(rank, world, identical)
    counted = Counted(wrapped)
    train_step(wrapped, 0, even_order(world), amp)
    steps = []
    for step, order in enumerate(orders, 1):
        counted.sent = dict.fromkeys(ITEMS, 0)
        train_step(wrapped, step, order, amp)
        steps.append(counted.sent)
    return steps
