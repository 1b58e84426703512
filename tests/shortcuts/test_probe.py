"""The linear probe: its minimum is scikit-learn's, and what it claims about itself is so."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from moco.errors import UserError
from moco.shortcuts import probe
from moco.shortcuts.probe import PrincipalAxes, read_out, standardized


def fit(features, targets, classes, weight_decay):
    return PrincipalAxes(features).fit(targets, classes, weight_decay)


def blobs(n=300, d=6, classes=4, spread=1.5, seed=0):
    """Features (n, d) float64 around a mean for each class, with scales far apart, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (means[targets] + spread * noise) * torch.logspace(-1, 1, d, dtype=torch.float64) + 3, targets


@pytest.mark.parametrize("weight_decay", [1.0, 0.03, 0.001])
def test_a_fit_is_scikit_learns(weight_decay):
    features, targets = blobs()
    own = fit(features, targets, 4, weight_decay)
    C = 1 / (weight_decay * len(features))  # their objective is C * the sum of losses + |W|^2 / 2
    other = LogisticRegression(C=C, tol=1e-12, max_iter=100_000).fit(features.numpy(), targets.numpy())
    assert own.converged and own.gradient <= probe.TOLERANCE
    np.testing.assert_allclose(own.weight, other.coef_, atol=2e-4)
    bias = own.bias - own.bias.mean()  # a constant in all of them changes nothing
    np.testing.assert_allclose(bias, other.intercept_ - other.intercept_.mean(), atol=2e-3)
    assert own.predict(features).tolist() == other.predict(features.numpy()).tolist()
    elsewhere = fit(features, targets, 4, 2 * weight_decay).weight  # negative control
    assert not np.allclose(elsewhere, other.coef_, atol=2e-4)


def test_the_gradient_that_a_fit_tells_is_that_of_its_objective():
    features, targets = blobs()
    for steps in (2, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "MOST_STEPS", steps)
            own = fit(features, targets, 4, 0.01)
        assert own.converged == (steps == 1000) and own.iterations <= steps
        centred = features - features.mean(dim=0)  # the biases are told for these axes
        W, bias = own.weight.clone().requires_grad_(), own.bias + own.weight @ features.mean(dim=0)
        bias = bias.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(centred @ W.T + bias, targets) + 0.005 * (W**2).sum()
        loss.backward()
        literal = float(torch.cat([W.grad.flatten(), bias.grad]).norm())
        assert own.gradient == pytest.approx(literal, rel=1e-3, abs=1e-8)


def test_classes_that_one_feature_tells_apart_by_far_converge():
    targets = torch.arange(40) % 2
    features = torch.stack([1e4 * (targets - 0.5), torch.zeros(40)], 1).double()  # p is 0 or 1 after a step
    own = fit(features, targets, 2, 1e-4)
    assert own.converged and own.predict(features).tolist() == targets.tolist()
    alone = fit(torch.zeros(40, 3).double(), targets, 2, 1e-4)  # nothing but the biases
    assert alone.converged and float(alone.weight.abs().max()) == 0


def test_a_readout_that_was_cut_off_says_so(monkeypatch):
    features, targets = blobs()
    given = features, targets, torch.arange(300), features, targets, 4
    assert read_out(*given)["converged"]
    monkeypatch.setattr(probe, "MOST_STEPS", 2)
    cut = read_out(*given)
    assert not cut["converged"] and cut["iterations"] == 2 and cut["gradient"] > probe.TOLERANCE


def test_what_tells_nothing_is_read_at_chance_and_what_is_apart_is_read_whole():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3000, 5, generator=generator)
    targets, groups = torch.arange(3000) % 4, torch.arange(3000) // 4
    chance = read_out(noise[:2000], targets[:2000], groups[:2000], noise[2000:], targets[2000:], 4)
    assert chance["converged"] and abs(chance["accuracy"] - 25) < 5  # 5: more than 3 standard deviations
    apart = torch.eye(4)[targets] + 0.01 * noise[:, :4]  # separable: only weight decay gives a minimum
    whole = read_out(apart[:2000], targets[:2000], groups[:2000], apart[2000:], targets[2000:], 4)
    assert whole["converged"] and whole["accuracy"] == 100


def test_the_same_features_give_the_same_to_the_bit():
    features, targets = blobs()
    given = features[:200], targets[:200], torch.arange(200), features[200:], targets[200:], 4
    one = read_out(*given)
    assert one == read_out(*given)
    other = read_out(features[:200] + 0.1 * features[100:], *given[1:])  # negative control
    assert one != other


def test_units_and_constant_features_change_nothing():
    features, targets = blobs(n=200)
    held_out = features + 0.02
    groups = torch.arange(200)
    one = read_out(features, targets, groups, held_out, targets, 4)
    constant = torch.full((200, 2), 7.123456789, dtype=torch.float64)
    moved = torch.full((200, 2), 1e6, dtype=torch.float64)  # constant in training, so of no use elsewhere
    two = read_out(
        torch.cat([1e5 * features - 4, constant], 1), targets, groups,
        torch.cat([1e5 * held_out - 4, moved], 1), targets, 4,
    )  # fmt: skip
    assert all(one[name] == two[name] for name in ("accuracy", "weight_decay"))
    assert one["accuracy"] > 40 and two["converged"]
    train, held = standardized(torch.cat([features, constant], 1), torch.cat([held_out, moved], 1))
    assert bool((train[:, 6:] == 0).all() and (held[:, 6:] == 0).all())
    torch.testing.assert_close(train[:, :6].mean(dim=0), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(train[:, :6].std(dim=0, correction=0), torch.ones(6, dtype=torch.float64))
    deviation, mean = features.std(dim=0, correction=0), features.mean(dim=0)
    torch.testing.assert_close(held[:, :6], (held_out - mean) / deviation)  # by the training part alone


def test_the_weight_decay_is_chosen_on_whole_groups(monkeypatch):
    features, targets = blobs(n=300)
    groups = torch.randperm(60, generator=torch.Generator().manual_seed(5)).repeat(5)
    parts = []

    class Spied(probe.PrincipalAxes):
        def __init__(self, given):
            parts.append(given)
            super().__init__(given)

    monkeypatch.setattr(probe, "PrincipalAxes", Spied)
    scored = []
    real = probe._percent
    monkeypatch.setattr(probe, "_percent", lambda *a: scored.append((a[1], real(*a))) or scored[-1][1])
    marked = torch.cat([features, groups[:, None].double()], 1)  # so that parts tell their groups
    found = read_out(marked, targets, groups, marked, targets, 4)
    deviation, mean = groups.double().std(correction=0), groups.double().mean()
    fitted, choosing = (
        set((part[:, -1] * deviation + mean).round().int().tolist()) for part in (parts[0], scored[0][0])
    )
    assert len(choosing) == 12 and len(fitted) == 48 and not choosing & fitted
    assert len(parts[1]) == 300  # the last fit is of all
    scores = [score for _, score in scored[: len(probe.WEIGHT_DECAYS)]]
    assert found["weight_decay"] == probe.WEIGHT_DECAYS[scores.index(max(scores))]
    assert len(set(scores)) > 1  # negative control: the choice was one


def test_no_weaker_weight_decay_is_tried_where_all_is_read(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    targets, groups = torch.arange(200) % 4, torch.arange(200) // 4
    apart = torch.eye(4)[targets] + 0.01 * torch.randn(200, 4, generator=generator)
    tried = []
    real = probe.PrincipalAxes.fit
    monkeypatch.setattr(probe.PrincipalAxes, "fit", lambda *a: tried.append(a[3]) or real(*a))
    assert read_out(apart, targets, groups, apart, targets, 4)["weight_decay"] == 1 and tried == [1, 1]


def test_one_group_cannot_be_divided():
    features, targets = blobs(n=20)
    with pytest.raises(UserError, match="at least two groups"):
        read_out(features, targets, torch.zeros(20, dtype=torch.int64), features, targets, 4)
