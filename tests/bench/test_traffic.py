"""What a step sends: the computed bytes against those handed to the collectives, and against the kernel's."""

import os
import socket
import struct
import sys

import pytest
import torch
import torch.distributed as dist
from counted_steps import (
    IDENTICAL,
    SIZE,
    N,
    even_order,
    steps_counted,
    tiny_model,
    train_step,
    wrapped_model,
)
from torch.nn.parallel import DistributedDataParallel

import moco.builder
from moco.bench import __main__ as bench
from moco.bench.traffic import measure, published_per_rank, sent_per_rank
from moco.builder import MoCo
from moco.seeds import shuffle_order
from moco.shuffle import concat_all_gather

QUEUE = tiny_model().queue.nbytes + tiny_model().queue_ptr.nbytes


def images_that_leave(order, n, world):
    """How many images change ranks in an order (n*W,): (W,), by the rank they leave."""
    home = order // n
    return torch.bincount(home[home != torch.arange(len(order)) // n], minlength=world)


@pytest.mark.parametrize("world", [2, 4])
def test_computed_bytes_are_those_handed_to_the_collectives(run_ranks, world):
    orders = [even_order(world), *(shuffle_order(0, 0, step, N * world) for step in range(4))]
    expected = sent_per_rank(tiny_model(), N, SIZE, world)
    assert all(count > 0 for item, count in expected.items() if item != "order")
    leave = [images_that_leave(order, N, world) for order in orders]
    image = 3 * SIZE**2 * 4
    for rank, steps in enumerate(run_ranks(world, steps_counted, IDENTICAL, False, orders)):
        assert steps[0] == expected  # no rank's images are more than its share in this order
        for sent, leaving in zip(steps, leave, strict=True):
            assert sent == {**expected, "images": leaving[rank].item() * image}
    assert len({tuple(leaving.tolist()) for leaving in leave}) > 1  # the orders do differ in it


def test_flags_change_what_is_counted(run_ranks):
    """Under autocast images count half; a queue that is not declared identical is sent with the buffers."""
    model, order = tiny_model(), [even_order(2)]
    full = sent_per_rank(model, N, SIZE, 2)
    for identical, amp, expected in (
        (IDENTICAL, True, sent_per_rank(model, N, SIZE, 2, itemsize=2)),
        ((), False, {**full, "buffers": full["buffers"] + QUEUE / 2}),
    ):
        for steps in run_ranks(2, steps_counted, identical, amp, order):
            assert steps == [expected] and expected != full
    assert expected["buffers"] == published_per_rank(model, N, SIZE, 2)["buffers"]


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
    expected = published_per_rank(tiny_model(), N, SIZE, world)
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
        world * sum(per_rank(tiny_model(), n, size, world).values())
        for per_rank in (sent_per_rank, published_per_rank)
    ]
    for published in (False, True):
        sent = sum(run_ranks(world, steps_on_the_wire, n, size, steps, published)) / steps
        assert computed[published] == pytest.approx(sent, rel=0.02)
        assert computed[not published] != pytest.approx(sent, rel=0.5)


def state_after(rank, world, how):
    """The state after 5 steps under Rank.wrap or under DistributedDataParallel as it comes."""
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
        assert all((own[name] == other[name]).all() for name in own) and own.keys() == other.keys()
    for name in ("encoder_q.bn.running_mean", "encoder_k.bn.running_var"):
        assert (ours[1][name] != unsent[1][name]).any()  # rank 1 kept its own
        assert (ours[0][name] != ours[1][name]).any()  # the last step's differ


def test_the_table_of_resnet50(cli):
    rows = next(iter(measure()["tables"].values()))
    # By hand: ResNet-50 has 25,557,032 weights, its fc 2,049,000 of them; the head is Linear(2048, 2048) and
    # Linear(2048, 128). BatchNorm: 53 layers, 26,560 channels with a mean and a variance, and a counter each.
    weights = 25_557_032 - 2_049_000 + (2048 * 2048 + 2048) + (2048 * 128 + 128)
    expected = {
        "images": 32 * 3 * 224**2 * 2 * 7 / 8,
        "order": 0,
        "keys": 32 * 128 * 4 * 7,
        "gradients": 2 * 4 * weights * 7 / 8,
        "buffers": 2 * (26_560 * 2 * 4 + 53 * 8) * 7 / 8,
    }
    expected["total"] = sum(expected.values())
    assert rows["8 GPUs, here, --amp"] == pytest.approx({item: n / 1e6 for item, n in expected.items()})
    assert rows["512 GPUs, published"]["images"] == pytest.approx(511 * 32 * 3 * 224**2 * 4 / 1e6)
    totals = [round(row["total"]) for row in rows.values()]
    assert totals == [361, 213, 205, 1470, 241, 231, 10120, 251, 242]  # as in the README
    code, output, _ = cli(bench.main, "step", "--traffic")
    assert code == 0 and "10,120" in output and "computed" in output
    assert "did you mean resnet50" in cli(bench.main, "step", "--traffic", "-a", "resnet5O")[2]
