"""What a step sends: the computed bytes against those handed to the collectives, and against the kernel's."""

import os
import socket
import struct
import sys

import pytest
import torch
import torch.distributed as dist
from tiny import TinyEncoder
from torch.nn.parallel import DistributedDataParallel

import moco.builder
from moco import losses
from moco.bench_scale import (
    ITEMS,
    images_that_leave,
    measure,
    published_per_rank,
    sent_per_rank,
    sizes_of,
    table,
)
from moco.builder import MoCo
from moco.distributed import Process, wrap
from moco.errors import UserError
from moco.seeds import shuffle_order
from moco.shuffle import concat_all_gather

N, SIZE, DIM, K = 8, 16, 16, 64
IDENTICAL = ("queue", "queue_ptr")


class Counted:
    """Counts by item, from its creation on, the payload that leaves this rank in torch's collectives.

    What a rank hands in is counted as the collective is defined: to an all-gather W-1 times, to an
    all-reduce 2(W-1)/W times, from a broadcast the mean of W-1 copies over W ranks; of an all-to-all the
    parts for others.
    """

    def __init__(self, wrapped):
        self.sent = dict.fromkeys(ITEMS, 0)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._spy("all_to_all_single", self._all_to_all)
        self._spy("all_gather", self._all_gather)
        self._spy("broadcast", lambda tensor, *_, **__: self._add("order", tensor, self._mean))
        self._spy("_broadcast_coalesced", self._buffers)
        wrapped.register_comm_hook(None, self._gradients)

    @property
    def _mean(self):
        return (self.world - 1) / self.world

    def _add(self, item, tensor, times):
        self.sent[item] += tensor.numel() * tensor.element_size() * times

    def _spy(self, name, note):
        genuine = getattr(dist, name)

        def noted(*args, **kwargs):
            note(*args, **kwargs)
            return genuine(*args, **kwargs)

        setattr(dist, name, noted)  # in this forked rank alone

    def _all_to_all(self, _, handed, output_split_sizes, input_split_sizes):
        for to, part in enumerate(handed.split(input_split_sizes)):
            if to != self.rank:
                self._add("images", part, 1)

    def _all_gather(self, _, tensor):
        self._add("images" if tensor.dim() == 4 else "keys", tensor, self.world - 1)

    def _buffers(self, group, tensors, size, source):
        for tensor in tensors:
            self._add("buffers", tensor, self._mean)

    def _gradients(self, _, bucket):
        self._add("gradients", bucket.buffer(), 2 * self._mean)
        mean = dist.all_reduce(bucket.buffer().div_(self.world), async_op=True).get_future()
        return mean.then(lambda done: done.value()[0])


def tiny_model(epsilon=0.1):
    torch.manual_seed(0)
    return MoCo(TinyEncoder, DIM, K, 0.9, 0.2, epsilon=epsilon)


def wrapped_model(rank, world, identical=IDENTICAL):
    process = Process(rank, world, rank, world, world, torch.device("cpu"))
    return wrap(tiny_model(), process, identical)


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
    """By step, what this rank sent; after a first one, in which DDP also agrees on its buckets."""
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


@pytest.mark.parametrize("world", [2, 4])
def test_computed_bytes_are_those_handed_to_the_collectives(run_ranks, world):
    orders = [even_order(world), *(shuffle_order(0, 0, step, N * world) for step in range(4))]
    expected = sent_per_rank(tiny_model(), N, SIZE, 4, DIM, world)
    assert all(expected[item] > 0 for item in ITEMS if item != "order")
    by_rank = run_ranks(world, steps_counted, IDENTICAL, False, orders)
    leave = [images_that_leave(order, N, world) for order in orders]
    image = 3 * SIZE**2 * 4
    for rank, steps in enumerate(by_rank):
        assert steps[0] == expected  # no rank's images are more than its share in this order
        for sent, leaving in zip(steps, leave, strict=True):
            assert sent == {**expected, "images": leaving[rank].item() * image}
    assert len({tuple(leaving.tolist()) for leaving in leave}) > 1  # the orders do differ in it


def test_images_formula_is_the_mean_over_orders():
    torch.manual_seed(0)
    leaving = torch.stack([images_that_leave(torch.randperm(N * 4), N, 4) for _ in range(4000)]).double()
    error = leaving.std(0) / len(leaving) ** 0.5
    assert (error < 0.05).all()  # so that a mean off by an image would be seen
    assert ((leaving.mean(0) - N * 3 / 4).abs() < 4 * error).all()


def test_flags_change_what_is_counted(run_ranks):
    """Under autocast images count half; a queue that is not declared identical is sent with the buffers."""
    model, order = tiny_model(), [even_order(2)]
    full = sent_per_rank(model, N, SIZE, 4, DIM, 2)
    for identical, amp, expected in (
        (IDENTICAL, True, {**full, "images": full["images"] / 2}),
        ((), False, {**full, "buffers": full["buffers"] + sizes_of(model).queue / 2}),
    ):
        for steps in run_ranks(2, steps_counted, identical, amp, order):
            assert steps == [expected]
    assert expected["buffers"] == published_per_rank(model, N, SIZE, DIM, 2)["buffers"] != full["buffers"]


def shuffle_as_published():
    """Everyone's images everywhere, rank 0's order, and keys gathered again for the queue."""

    def batch_shuffle(images, order):
        everyone = concat_all_gather(images)
        order = torch.randperm(len(everyone))
        dist.broadcast(order, src=0)
        return everyone.chunk(dist.get_world_size())[dist.get_rank()], torch.argsort(order)

    enqueue = MoCo._dequeue_and_enqueue

    def gather_and_enqueue(self, keys):
        enqueue(self, concat_all_gather(keys.chunk(dist.get_world_size())[dist.get_rank()]))

    moco.builder.batch_shuffle = batch_shuffle  # in this forked rank alone
    MoCo._dequeue_and_enqueue = gather_and_enqueue


@pytest.mark.parametrize("world", [2, 4])
def test_published_bytes_are_those_of_the_published_arrangement(run_ranks, world):
    expected = published_per_rank(tiny_model(), N, SIZE, DIM, world)
    for steps in run_ranks(world, steps_counted, (), False, [None, None], shuffle_as_published):
        assert steps == [expected, expected]


def bytes_on_the_wire():
    """Bytes that the kernel has sent so far on the TCP connections of this process (tcpi_bytes_sent)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
                    total += struct.unpack_from("Q", info, 200)[0]
        except OSError:  # the folder's own descriptor, closed by now
            continue
    return total


def steps_on_the_wire(rank, world, n, size, steps, published):
    if published:
        shuffle_as_published()
    wrapped = wrapped_model(rank, world, () if published else IDENTICAL)
    for step in range(2 + steps):
        if step == 2:
            dist.barrier()
            before = bytes_on_the_wire()
        train_step(wrapped, step, even_order(world, n), n=n, size=size)
    return bytes_on_the_wire() - before


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it sent")
def test_computed_bytes_leave_the_sockets(run_ranks):
    """With images large enough that headers are little against them."""
    world, n, size, steps = 4, 16, 64, 4
    computed = [
        world * sum(sent_per_rank(tiny_model(), n, size, 4, DIM, world).values()),
        world * sum(published_per_rank(tiny_model(), n, size, DIM, world).values()),
    ]
    for published in (False, True):
        sent = sum(run_ranks(world, steps_on_the_wire, n, size, steps, published)) / steps
        assert computed[published] == pytest.approx(sent, rel=0.02)
        assert computed[not published] != pytest.approx(sent, rel=0.5)


def queue_after(rank, world, differing):
    """Of 20 steps: is the queue still the same bits on all ranks? `differing`: it started otherwise."""
    wrapped = wrapped_model(rank, world)
    if differing:
        wrapped.module.queue[0, -1] += rank * 1e-6  # the last to be replaced, which 20 steps do not reach
    start = wrapped.module.queue.clone()
    counted = Counted(wrapped)
    for step in range(20 if not differing else 1):
        train_step(wrapped, step, shuffle_order(0, 0, step, N * world))
    buffers = sizes_of(wrapped.module).batchnorm * (world - 1) / world
    assert counted.sent["buffers"] == buffers * (step + 1)  # without the queue's
    everyone = concat_all_gather(wrapped.module.queue[None])
    pointers = concat_all_gather(wrapped.module.queue_ptr)
    assert (pointers == (step + 1) * N * world % K).all()
    assert not torch.equal(start, wrapped.module.queue)
    return all(torch.equal(one, everyone[0]) for one in everyone)


def test_queue_stays_identical_without_being_sent(run_ranks):
    assert run_ranks(4, queue_after, False) == [True] * 4
    assert run_ranks(4, queue_after, True) == [False] * 4


def state_after(rank, world, how):
    """The state after 5 steps under wrap() or under DistributedDataParallel as it comes."""
    if how == "wrap":
        wrapped = wrapped_model(rank, world)
    else:
        wrapped = DistributedDataParallel(tiny_model(), broadcast_buffers=how == "plain")
    for step in range(5):
        train_step(wrapped, step, shuffle_order(0, 0, step, N * world))
    return {name: tensor.numpy().copy() for name, tensor in wrapped.module.state_dict().items()}


def test_state_is_as_under_plain_distributed_data_parallel(run_ranks):
    """BatchNorm's buffers, which rank 0 sends, the weights and the queue, bit for bit on each rank."""
    ours, plain, unsent = (run_ranks(2, state_after, how) for how in ("wrap", "plain", "not sent"))
    for own, other in zip(ours, plain, strict=True):
        for name in own:
            assert torch.equal(torch.tensor(own[name]), torch.tensor(other[name])), name
    for name in ("encoder_q.bn.running_mean", "encoder_k.bn.running_var"):
        assert not torch.equal(
            torch.tensor(ours[1][name]), torch.tensor(unsent[1][name])
        )  # rank 1 kept its own
        assert not torch.equal(
            torch.tensor(ours[0][name]), torch.tensor(ours[1][name])
        )  # the last step's differ


def test_report_and_table():
    report = measure("resnet50", batch=32, size=224, dim=128, K=65536)
    eight, _, most = report["rows"]
    assert [row["gpus"] for row in report["rows"]] == [8, 64, 512]
    # By hand: ResNet-50 has 25,557,032 weights, its fc 2,049,000 of them; the head is Linear(2048, 2048) and
    # Linear(2048, 128). BatchNorm: 53 layers, 26,560 channels with a mean and a variance, and a counter each.
    weights = 25_557_032 - 2_049_000 + (2048 * 2048 + 2048) + (2048 * 128 + 128)
    assert eight["half"]["bytes"] == {
        "images": 32 * 3 * 224**2 * 2 * 7 / 8,
        "order": 0,
        "keys": 32 * 128 * 4 * 7,
        "gradients": 2 * 4 * weights * 7 / 8,
        "buffers": 2 * (26_560 * 2 * 4 + 53 * 8) * 7 / 8,
    }
    assert most["published"]["bytes"]["images"] == 511 * 32 * 3 * 224**2 * 4
    assert most["published"]["limits"] == "images"
    assert most["float32"]["limits"] == "gradients"
    text = table(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "9,845.74" in text
    assert "not measured" in text
    assert "images to encode: half" not in text  # advice only about what limits
    assert "images to encode: half" in table(measure("resnet18", batch=512, mlp=False))
    assert "raise --moco-k" in table(measure("resnet18", batch=512))
    assert "link keeps up" in table(measure("resnet18", worlds=(1,)))
    with pytest.raises(UserError, match="batch must be at least 1"):
        measure(batch=0)
    with pytest.raises(UserError, match="did you mean resnet50"):
        measure("resnet5O")
