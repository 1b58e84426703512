"""Shuffling images between processes gives what gathering all of them everywhere would."""

import numpy as np
import pytest
import torch

from moco.seeds import shuffle_order
from moco.shuffle import batch_shuffle, concat_all_gather

N = 6


def images_of(rank):
    return torch.randn(N, 3, 2, 2, generator=torch.Generator().manual_seed(rank))


def exchange(rank, world, given, amp):
    """(what this process got, as float32; its dtype; all images again in their places)"""
    torch.manual_seed(100 + rank)
    order = shuffle_order(7, 0, 3, N * world) if given else None
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        ours, undo = batch_shuffle(images_of(rank), order)
    again = concat_all_gather(ours.float())[undo]
    return ours.float().numpy(), str(ours.dtype), again.numpy()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_gets_its_part_of_the_order(run_ranks, world, given, amp):
    torch.manual_seed(100)
    drawn = torch.randperm(N * world)
    order = shuffle_order(7, 0, 3, N * world) if given else drawn
    everyone = torch.cat([images_of(rank) for rank in range(world)])
    sent = everyone.bfloat16().float() if amp else everyone
    for rank, (ours, dtype, again) in enumerate(run_ranks(world, exchange, given, amp)):
        assert np.array_equal(ours, sent[order].chunk(world)[rank])
        assert dtype == ("torch.bfloat16" if amp else "torch.float32")
        assert np.array_equal(again, sent)
        assert not np.array_equal(ours, sent.chunk(world)[rank])  # something was exchanged or reordered
