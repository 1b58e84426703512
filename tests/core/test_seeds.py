"""Random numbers as a function of position, and the seed of a run."""

import torch

from moco import seeds
from moco.seeds import shuffle_order


def test_seeds_differ_by_position_and_nothing_else():
    assert seeds.fold(1, 2, 3) == seeds.fold(1, 2, 3) < 2**63
    found = {seeds.fold(s, a, b) for s in range(5) for a in range(5) for b in range(5)}
    assert len(found) == 125
    assert seeds.fold(5, seeds.SAMPLE, 0) != seeds.fold(5, seeds.ORDER, 0)


def test_the_seed_of_a_run():
    assert seeds.run_seed(3, {"seed": 5}) == 3
    assert seeds.run_seed(None, {"seed": 5}) == 5
    drawn = {seeds.run_seed(None, {}) for _ in range(8)}
    assert len(drawn) == 8 and all(0 <= seed < 2**31 for seed in drawn)


def test_the_order_belongs_to_the_step():
    order = shuffle_order(7, 0, 3, 100)
    assert torch.equal(order, shuffle_order(7, 0, 3, 100))
    assert sorted(order.tolist()) == list(range(100))
    for other in ((8, 0, 3), (7, 1, 3), (7, 0, 4)):
        assert not torch.equal(order, shuffle_order(*other, 100))
