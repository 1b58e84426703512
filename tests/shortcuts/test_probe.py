"""The linear probe: its minimum is scikit-learn's, and it says whether it converged."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from moco.errors import UserError
from moco.shortcuts import probe
from moco.shortcuts.probe import fit, principal_axes, read_out


def blobs(n=300, d=6, classes=4, spread=1.5):
    """Features (n, d) float64 around a mean for each class, with scales far apart, and targets (n,)."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (means[targets] + spread * noise) * torch.logspace(-1, 1, d, dtype=torch.float64) + 3, targets


def with_ones(features):
    return torch.cat([features, torch.ones(len(features), 1)], dim=1).double()


@pytest.mark.parametrize("weight_decay", [1.0, 0.03, 0.001])
def test_a_fit_is_scikit_learns(weight_decay):
    features, targets = blobs()
    theta, length = fit(with_ones(features), targets, 4, weight_decay)
    C = 1 / (weight_decay * len(features))  # their objective is C * the sum of losses + |W|^2 / 2
    other = LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=1000).fit(
        features.numpy(), targets.numpy()
    )
    assert length <= probe.TOLERANCE
    np.testing.assert_allclose(theta[:, :-1], other.coef_, atol=1e-3)
    np.testing.assert_allclose(theta[:, -1], other.intercept_ - other.intercept_.mean(), atol=1e-2)
    elsewhere, _ = fit(with_ones(features), targets, 4, 2 * weight_decay)  # negative control
    assert not np.allclose(elsewhere[:, :-1], other.coef_, atol=1e-3)


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_one_feature_that_separates_the_classes_and_none_converge(scale):
    targets = torch.arange(40) % 2
    features = scale * torch.stack([targets - 0.5, torch.zeros(40)], dim=1)  # p is 0 or 1 after a step
    theta, length = fit(with_ones(features), targets, 2, 1e-4)
    assert length <= probe.TOLERANCE and bool(theta[:, 0].any()) == bool(scale)


def test_noise_is_read_at_chance_and_separate_classes_perfectly():
    noise = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1))
    targets, groups = torch.arange(3000) % 4, torch.arange(3000) // 4

    def readout(features):
        return read_out(features[:2000], targets[:2000], groups[:2000], features[2000:], targets[2000:], 4)

    chance = readout(noise)
    assert chance["converged"] and abs(chance["accuracy"] - 25) < 5  # 5: more than 3 standard deviations
    separate = readout(torch.eye(4)[targets] + 0.01 * noise[:, :4])
    assert separate == {"accuracy": 100, "weight_decay": 1, "converged": True}


def test_a_readout_is_repeated_to_the_bit_whatever_the_units_and_says_when_it_was_cut_off(monkeypatch):
    features, targets = blobs()

    def readout(features):
        return read_out(features[:200], targets[:200], torch.arange(200), features[200:], targets[200:], 4)

    first = readout(features)
    assert first["converged"] and first == readout(features)
    assert first != readout(features + 0.1 * features.roll(1, 0))  # negative control
    constant = torch.full((300, 2), 7.123456789)
    constant[200:] = 1e6  # constant in training, so of no use elsewhere
    assert readout(torch.cat([1e5 * features - 4, constant], dim=1)) == first
    x, held_out = principal_axes(torch.cat([features, constant], dim=1)[:200], features.new_ones(3, 8))
    mean, square = x.mean(dim=0), x.T @ x / 200  # uncorrelated; the two constants and their variances are 0
    torch.testing.assert_close(mean, torch.eye(9)[8].double())
    torch.testing.assert_close(square.diag().sum(), torch.tensor(7.0).double())
    torch.testing.assert_close(square, square.diag().diag())
    monkeypatch.setattr(probe, "MOST_STEPS", 2)
    assert not readout(features)["converged"]


def test_the_weight_decay_is_chosen_on_groups_that_were_held_back(monkeypatch):
    features, targets = blobs()
    groups = torch.randperm(60, generator=torch.Generator().manual_seed(5)).repeat(5)
    fitted, scored = [], []
    real_fit, real_percent = probe.fit, probe._percent
    monkeypatch.setattr(probe, "principal_axes", lambda features, held_out: (features, held_out))
    monkeypatch.setattr(probe, "fit", lambda x, *rest: fitted.append(x) or real_fit(x, *rest))
    monkeypatch.setattr(
        probe, "_percent", lambda *a: scored.append((a[1], real_percent(*a))) or scored[-1][1]
    )
    marked = with_ones(torch.cat([features, 1e-9 * groups[:, None]], dim=1))  # samples tell their group
    found = read_out(marked, targets, groups, marked, targets, 4)
    kept, chosen = (set((1e9 * x[:, -2]).round().int().tolist()) for x in (fitted[0], scored[0][0]))
    assert (len(kept), len(chosen)) == (48, 12) and not kept & chosen and len(fitted[-1]) == 300
    scores = [score for _, score in scored[:-1]]
    assert found["weight_decay"] == probe.WEIGHT_DECAYS[scores.index(max(scores))] and len(set(scores)) > 1
    with pytest.raises(UserError, match="at least two groups"):
        read_out(marked, targets, torch.zeros(300, dtype=torch.int64), marked, targets, 4)
