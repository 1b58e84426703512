"""The one pass over the queue against the two cross-entropies of N x (1+K) logits."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyEncoder
from torch.profiler import profile

from moco import contrast as module
from moco import losses
from moco.builder import MoCo, ifm_logits
from moco.contrast import contrast
from moco.meters import accuracy, rank_accuracy

N, C, K = 6, 5, 37
GRID = list(itertools.product([0.0, 0.1, 1.0], [0.0, 0.5, 3.0], [0.01, 0.07, 1.0]))  # epsilon, alpha, T


def features(n=N, c=C, k=K, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((n, c), (n, c), (c, k))]
    return [F.normalize(each, dim=dim) for each, dim in zip(made, (1, 1, 0), strict=True)]


def published(q, k, queue, T, method, epsilon, alpha):
    """Loss, gradient for q, and accuracies by two logit tensors."""
    q = q.clone().requires_grad_()
    l_pos, l_neg = (q * k).sum(1, keepdim=True), q @ queue
    logits, labels = torch.cat([l_pos, l_neg], 1) / T, torch.zeros(len(q), dtype=torch.long)
    moved = ifm_logits(l_pos, l_neg, epsilon, T)
    loss = {
        None: lambda: losses.info_nce(logits, labels),
        "ifm": lambda: losses.ifm(logits, moved, labels, alpha),
        "ifm_only": lambda: losses.info_nce(moved, labels),
    }[method]()
    loss.backward()
    return loss.detach(), q.grad, torch.stack(accuracy(logits, labels))


def here(q, k, queue, T, method, epsilon, alpha):
    q = q.clone().requires_grad_()
    loss, ranks = contrast(q, k, queue, T, losses.weights(method, alpha), 2 * epsilon / T)
    loss.backward()
    return loss.detach(), q.grad, torch.stack(rank_accuracy(ranks))


@pytest.mark.parametrize("method", [None, "ifm", "ifm_only"])
@pytest.mark.parametrize(("epsilon", "alpha", "T"), GRID)
def test_the_same_loss_gradient_and_accuracy(monkeypatch, method, epsilon, alpha, T):
    monkeypatch.setitem(module.PART, "cpu", 8)  # the last part has 5
    inputs = features()
    loss, gradient, accuracies = here(*inputs, T, method, epsilon, alpha)
    expected, expected_gradient, expected_accuracies = published(*inputs, T, method, epsilon, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
    assert torch.equal(accuracies, expected_accuracies)
    other, other_gradient, _ = here(*inputs, T, method, epsilon + 1e-3, alpha)
    if method == "ifm_only" or (method and alpha):  # negative control: epsilon matters where it should
        assert (gradient - other_gradient).abs().max() > 1e-9 or loss != other
    else:
        assert torch.equal(other_gradient, gradient) and other == loss


def test_gradients_are_those_of_finite_differences():
    q, k, queue = features(3, 4, 9)
    weights = losses.weights("ifm", 0.7)
    assert torch.autograd.gradcheck(
        lambda q: contrast(q, k, queue, 0.2, weights, 1.0)[0], q.clone().requires_grad_(), eps=1e-7, atol=1e-7
    )


def test_float32_is_as_exact_as_the_published_form():
    inputs = features(64, 128, 4096)
    exact, exact_gradient, _ = published(*inputs, 0.07, "ifm", 0.1, 1.0)
    single = [each.float() for each in inputs]
    errors = []
    for form in (here, published):
        loss, gradient, _ = form(*single, 0.07, "ifm", 0.1, 1.0)
        errors.append(
            ((loss - exact).abs() / exact, (gradient - exact_gradient).norm() / exact_gradient.norm())
        )
    assert errors[0][0] < 1e-6 and errors[0][1] < 1e-5
    assert errors[0][1] < 2 * errors[1][1]


def test_ranks_count_the_nearer_negatives():
    q = torch.tensor([[1.0, 0.0]])
    k = F.normalize(torch.tensor([[1.0, 1.0]]), dim=1)
    queue = F.normalize(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.5, 1.0]]), dim=0)
    _, rank = contrast(q, k, queue, 0.2, (1.0, 0.0))
    assert rank.tolist() == [2]  # the key that is equal to the positive does not count
    assert [each.item() for each in rank_accuracy(rank, (1, 2, 3))] == [0, 0, 100]


def test_a_feature_that_is_no_number_shows_in_the_loss():
    q, k, queue = features()
    q[0, 0] = torch.nan
    assert contrast(q, k, queue, 0.2, (1.0, 0.0))[0].isnan()


@pytest.mark.parametrize("method", [None, "ifm", "ifm_only"])
def test_a_model_gives_either_form_and_trains_the_same(method):
    results = []
    for weights in (None, losses.weights(method, 1.0)):
        torch.manual_seed(0)
        model = MoCo(TinyEncoder, 8, 32, T=0.2, epsilon=0.1 if method else None).double()
        curve = []
        for step in range(6):
            images = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(step))
            if weights:
                loss, *_ = model(*images, weights=weights)
            else:
                logits, *moved, labels = model(*images)
                loss = {
                    None: lambda: losses.info_nce(logits, labels),  # noqa: B023
                    "ifm": lambda: losses.ifm(logits, *moved, labels, 1.0),  # noqa: B023
                    "ifm_only": lambda: losses.info_nce(*moved, labels),  # noqa: B023
                }[method]()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.encoder_q.parameters():
                    parameter -= 0.1 * parameter.grad
            curve.append(loss.item())
        results.append((curve, model.queue.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-12)
    assert len(set(results[0][0])) == 6


def peak_bytes(work):
    """The largest amount of memory that torch held on the CPU during `work()` beyond what it held before."""
    work()
    with profile(profile_memory=True) as record:
        work()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_it_takes_at_most_half_the_time_and_the_memory():
    inputs = features(256, 128, 65536, torch.float32)
    forms = {form: lambda f=form: f(*inputs, 0.2, "ifm", 0.1, 1.0) for form in (here, published)}
    seconds = {form: [] for form in forms}
    for _ in range(3):
        for form, work in forms.items():
            start = time.process_time()
            work()
            seconds[form].append(time.process_time() - start)
    assert min(seconds[here]) < 0.5 * min(seconds[published])
    peaks = {form: peak_bytes(work) for form, work in forms.items()}
    assert peaks[published] > 4 * 256 * 65536  # at least the logits: it is really measured
    assert peaks[here] < 0.5 * peaks[published]
