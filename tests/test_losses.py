"""The losses and the perturbed logits against literal loops in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moco import losses
from moco.builder import ifm_logits

N, K, C = 3, 7, 5
GRID = list(
    itertools.product([0.0, 0.05, 0.3, 1.0], [0.0, 0.5, 1.0, 3.0], [0.05, 0.2, 1.0])
)  # epsilon, alpha, T


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(N, C, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return q, k, F.normalize(torch.randn(C, K, generator=generator, dtype=torch.float64), dim=0)


def loops(q, k, queue, T, shift):
    """InfoNCE with the positive's cosine lowered by `shift`, the negatives' raised: loss and gradient."""
    total, gradient = 0.0, [[0.0] * C for _ in range(N)]
    for i in range(N):
        others = [k[i].tolist()] + [queue[:, j].tolist() for j in range(K)]
        cosines = [sum(q[i][c].item() * o[c] for c in range(C)) for o in others]
        logits = [(s + (shift if j else -shift)) / T for j, s in enumerate(cosines)]
        largest = max(logits)
        weights = [math.exp(x - largest) for x in logits]
        total += -(logits[0] - largest) + math.log(sum(weights))
        for j, o in enumerate(others):
            slope = (weights[j] / sum(weights) - (j == 0)) / T / N
            for c in range(C):
                gradient[i][c] += slope * o[c]
    return total / N, torch.tensor(gradient, dtype=torch.float64)


def by_library(q, k, queue, epsilon, alpha, T):
    q = q.clone().requires_grad_()
    l_pos, l_neg = (q * k).sum(1, keepdim=True), q @ queue
    logits, labels = torch.cat([l_pos, l_neg], 1) / T, torch.zeros(N, dtype=torch.long)
    loss = losses.ifm(logits, ifm_logits(l_pos, l_neg, epsilon, T), labels, alpha)
    loss.backward()
    return loss.item(), q.grad


@pytest.mark.parametrize(("epsilon", "alpha", "T"), GRID)
def test_ifm_is_what_the_loops_say(epsilon, alpha, T):
    q, k, queue = features()
    (plain, plain_slope), (moved, moved_slope) = loops(q, k, queue, T, 0.0), loops(q, k, queue, T, epsilon)
    loss, slope = by_library(q, k, queue, epsilon, alpha, T)
    assert loss == pytest.approx((plain + alpha * moved) / (1 + alpha), rel=1e-12)
    torch.testing.assert_close(
        slope, (plain_slope + alpha * moved_slope) / (1 + alpha), rtol=1e-10, atol=1e-12
    )
    if epsilon * alpha > 0:
        assert abs(loss - plain) > 1e-9


@pytest.mark.parametrize(("epsilon", "alpha", "T"), GRID)
def test_the_perturbation_is_a_margin_of_two_epsilon(epsilon, alpha, T):
    q, k, queue = features(1)
    a, b = (q * k).sum(1) / T, torch.logsumexp(q @ queue / T, dim=1)
    zero = torch.zeros(N, dtype=torch.float64)  # softplus(x) = log(e^x + e^0); F.softplus rounds above 20
    plain, moved = (torch.logaddexp(b - a + 2 * e / T, zero).mean().item() for e in (0.0, epsilon))
    loss, _ = by_library(q, k, queue, epsilon, alpha, T)
    assert loss == pytest.approx((plain + alpha * moved) / (1 + alpha), rel=1e-12)
    assert moved >= plain
    if epsilon == 0 or alpha == 0:
        assert loss == pytest.approx(plain, rel=1e-12)


def test_the_closed_form_is_a_step_along_the_gradient():
    """Moving the keys themselves by epsilon up the gradient of InfoNCE gives the perturbed logits."""
    epsilon, T = 0.1, 0.2
    q, k, queue = features(2)
    for i in range(N):
        positive, negatives = k[i].clone().requires_grad_(), queue.clone().requires_grad_()
        logits = torch.cat([(q[i] @ positive)[None], q[i] @ negatives]) / T
        losses.info_nce(logits[None], torch.zeros(1, dtype=torch.long)).backward()
        moved_positive = positive + epsilon * F.normalize(positive.grad, dim=0)
        moved_negatives = negatives + epsilon * F.normalize(negatives.grad, dim=0)
        expected = torch.cat([(q[i] @ moved_positive)[None], q[i] @ moved_negatives]) / T
        closed = ifm_logits((q[i] @ k[i])[None, None], (q[i] @ queue)[None], epsilon, T)[0]
        torch.testing.assert_close(closed, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "epsilon", "alpha"), [(None, 0.0, 0.0), ("ifm", 0.1, 2.0), ("ifm_only", 0.3, 1.0)]
)
def test_chance_is_the_loss_of_equal_similarities(method, epsilon, alpha):
    T, labels = 0.2, torch.zeros(N, dtype=torch.long)
    l_pos, l_neg = torch.full((N, 1), 0.3, dtype=torch.float64), torch.full((N, K), 0.3, dtype=torch.float64)
    logits, moved = torch.cat([l_pos, l_neg], 1) / T, ifm_logits(l_pos, l_neg, epsilon, T)
    expected = {
        None: losses.info_nce(logits, labels),
        "ifm": losses.ifm(logits, moved, labels, alpha),
        "ifm_only": losses.info_nce(moved, labels),
    }[method]
    assert losses.chance(K, method, epsilon, alpha, T) == pytest.approx(expected.item(), rel=1e-12)


def test_chance_does_not_overflow():
    assert losses.chance(10, "ifm_only", 30.0, 1.0, 0.05) == pytest.approx(1200 + math.log(10))
