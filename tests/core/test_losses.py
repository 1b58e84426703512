"""The losses and IFM's logits against literal loops in float64, and the one-pass form against both."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyEncoder
from torch.profiler import profile

from moco import losses
from moco.builder import MoCo, ifm_logits
from moco.losses import accuracy, contrast, rank_accuracy

N, C, K = 3, 5, 37
METHODS = [None, "ifm", "ifm_only"]
GRID = list(itertools.product([0.0, 0.1, 1.0], [0.0, 0.5, 3.0], [0.01, 0.07, 1.0]))  # epsilon, alpha, T


def features(n=N, c=C, k=K, seed=0):
    """q and k (n x c) and a queue (c x k) of unit length, float64."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator).double() for shape in ((n, c), (n, c), (c, k))]
    return [F.normalize(each, dim=dim) for each, dim in zip(made, (1, 1, 0), strict=True)]


def loops(q, k, queue, T, shift):
    """InfoNCE with the positive's cosine lowered by `shift` and the negatives' raised: (loss, gradient)."""
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
    return torch.tensor([total / N], dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


def loss_of(method, logits, logits_ifm, labels, alpha):
    """The published loss of a method."""
    if method is None:
        return losses.info_nce(logits, labels)
    if method == "ifm_only":
        return losses.info_nce(logits_ifm, labels)
    return losses.ifm(logits, logits_ifm, labels, alpha)


def from_logits(q, k, queue, T, method, epsilon, alpha):
    """(loss, gradient for q, accuracies) by two tensors of N x (1+K) logits."""
    q = q.clone().requires_grad_()
    l_pos, l_neg = (q * k).sum(1, keepdim=True), q @ queue
    logits, labels = torch.cat([l_pos, l_neg], 1) / T, torch.zeros(len(q), dtype=torch.long)
    loss = loss_of(method, logits, ifm_logits(l_pos, l_neg, epsilon, T), labels, alpha)
    loss.backward()
    return loss.detach(), q.grad, torch.stack(accuracy(logits, labels))


def one_pass(q, k, queue, T, method, epsilon, alpha):
    q = q.clone().requires_grad_()
    loss, ranks, _ = contrast(q, k, queue, T, losses.weights(method, alpha), 2 * epsilon / T)
    loss.backward()
    return loss.detach(), q.grad, torch.stack(rank_accuracy(ranks))


@pytest.mark.parametrize(("epsilon", "alpha", "T"), GRID)
def test_ifm_is_the_formula(epsilon, alpha, T):
    inputs = features()
    plain, perturbed = loops(*inputs, T, 0.0), loops(*inputs, T, epsilon)
    loss, gradient, _ = from_logits(*inputs, T, "ifm", epsilon, alpha)
    for found, first, second in zip((loss[None], gradient), plain, perturbed, strict=True):
        expected = (first + alpha * second) / (1 + alpha)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if epsilon * alpha:
        assert abs(loss - plain[0]) > 1e-9
    else:
        assert loss == pytest.approx(plain[0].item(), rel=1e-10)


def test_the_closed_form_is_a_step_along_the_gradient():
    epsilon, T = 0.1, 0.2
    q, k, queue = features(seed=2)
    for i in range(N):
        positive, negatives = k[i].clone().requires_grad_(), queue.clone().requires_grad_()
        logits = torch.cat([(q[i] @ positive)[None], q[i] @ negatives]) / T
        losses.info_nce(logits[None], torch.zeros(1, dtype=torch.long)).backward()
        moved_positive = positive + epsilon * F.normalize(positive.grad, dim=0)
        moved_negatives = negatives + epsilon * F.normalize(negatives.grad, dim=0)
        expected = torch.cat([(q[i] @ moved_positive)[None], q[i] @ moved_negatives]) / T
        closed = ifm_logits((q[i] @ k[i])[None, None], (q[i] @ queue)[None], epsilon, T)[0]
        torch.testing.assert_close(closed, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "epsilon", "alpha"), [(None, None, None), ("ifm", 0.1, 2.0), ("ifm_only", 0.3, 1.0)]
)
def test_chance_is_the_loss_of_equal_similarities(method, epsilon, alpha):
    T, labels = 0.2, torch.zeros(N, dtype=torch.long)
    l_pos, l_neg = (torch.full((N, n), 0.3).double() for n in (1, K))
    logits, logits_ifm = torch.cat([l_pos, l_neg], 1) / T, ifm_logits(l_pos, l_neg, epsilon or 0.0, T)
    expected = loss_of(method, logits, logits_ifm, labels, alpha)
    assert losses.chance(K, method, epsilon, alpha, T) == pytest.approx(expected.item(), rel=1e-12)
    assert losses.chance(10, "ifm_only", 30.0, 1.0, 0.05) == pytest.approx(1200 + math.log(10))  # no overflow


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("epsilon", "alpha", "T"), GRID)
def test_one_pass_gives_the_same_loss_gradient_and_accuracy(monkeypatch, method, epsilon, alpha, T):
    monkeypatch.setitem(losses.CHUNK, "cpu", 8)  # the last chunk has 5
    inputs = features(6)
    loss, gradient, accuracies = one_pass(*inputs, T, method, epsilon, alpha)
    expected, expected_gradient, expected_accuracies = from_logits(*inputs, T, method, epsilon, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
    assert torch.equal(accuracies, expected_accuracies)
    other, other_gradient, _ = one_pass(*inputs, T, method, epsilon + 1e-3, alpha)
    if method == "ifm_only" or (method and alpha):  # negative control: epsilon matters where it should
        assert (gradient - other_gradient).abs().max() > 1e-9 or loss != other
    else:
        assert torch.equal(other_gradient, gradient) and other == loss


def test_one_pass_in_float32_is_as_exact_as_the_logits():
    inputs = features(64, 128, 4096)
    exact, exact_gradient, _ = from_logits(*inputs, 0.07, "ifm", 0.1, 1.0)
    errors = []
    for form in (one_pass, from_logits):
        loss, gradient, _ = form(*(each.float() for each in inputs), 0.07, "ifm", 0.1, 1.0)
        difference = (gradient - exact_gradient).norm() / exact_gradient.norm()
        errors.append(((loss - exact).abs() / exact, difference))
    assert errors[0][0] < 1e-6 and errors[0][1] < 1e-5
    assert errors[0][1] < 2 * errors[1][1]


def solved(n=8, c=6, k=50, mean=0.0):
    """features() whose positives are nearer by and by, and whose queue leans against q by `mean`."""
    q, k, queue = features(n, c, k, seed=3)
    nearer = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
    return (
        q,
        F.normalize(k + 20 * nearer * q, dim=1),
        F.normalize(queue - mean * q.mean(dim=0)[:, None], dim=0),
    )


@pytest.mark.parametrize("method", ["ifm", "ifm_only"])
@pytest.mark.parametrize(("epsilon", "alpha", "T"), GRID)
def test_ifm_is_info_nce_with_a_weight_for_each_image(method, epsilon, alpha, T):
    inputs = solved()
    _, plain, _ = one_pass(*inputs, T, None, 0.0, 0.0)
    _, perturbed, _ = one_pass(*inputs, T, method, epsilon, alpha)
    loss = contrast(*inputs, T, (1.0, 0.0))[2]
    weight = losses.gradient_weight(loss, epsilon, T, alpha, method)
    lengths = plain.norm(dim=1), perturbed.norm(dim=1)  # some below 1e-40
    cosines = (plain / lengths[0][:, None] * perturbed / lengths[1][:, None]).sum(dim=1)
    assert (cosines - 1).abs().max() < 1e-12
    found = lengths[1] / lengths[0]
    torch.testing.assert_close(found, weight, rtol=1e-12, atol=0)
    if epsilon and (alpha or method == "ifm_only"):  # negative control: weights differ, and with epsilon
        assert weight.max() > 1.0001 * weight.min()
        assert (losses.gradient_weight(loss, 0.01 * epsilon, T, alpha, method) < weight).any()
    else:
        torch.testing.assert_close(weight, torch.ones_like(weight), rtol=1e-12, atol=0)


def test_tiny_losses_are_exact_in_float32():
    loss = torch.tensor([1e-6] * 1000 + [1e-3], dtype=torch.float64)  # the last has half of all gradient
    exact, found = (losses.gradient_lengths(each, 0.2, 0.07, 1.0, "ifm") for each in (loss, loss.float()))
    assert (found[0] / found[1]).item() == pytest.approx((exact[0] / exact[1]).item(), rel=1e-5)
    assert ((1 - torch.exp(-loss.float())).sum() / exact[1] - 1).abs() > 1e-3  # negative control
    lengthened, length = losses.gradient_lengths(torch.zeros(256), 30.0, 0.05, 1.0, "ifm")  # margin 1200
    assert 1 < lengthened / length < math.inf


def test_the_factor_counts_images_by_the_length_of_their_gradient():
    loss = torch.tensor([0.05] * 10 + [6.0] * 10, dtype=torch.float64)
    found = losses.weight_statistics(loss, 0.1, 0.07, 1.0, "ifm")
    weight, slope = losses.gradient_weight(loss, 0.1, 0.07, 1.0, "ifm"), 1 - torch.exp(-loss)
    assert found["ifm_weight"] == pytest.approx(weight.mean().item()) and found["info_nce"] == loss.mean()
    assert found["ifm_weight_p95"] == pytest.approx(weight.max().item())
    lengths = losses.gradient_lengths(loss, 0.1, 0.07, 1.0, "ifm")
    torch.testing.assert_close(lengths, torch.stack([(weight * slope).sum(), slope.sum()]))
    assert found["ifm_weight"] > 3 and lengths[0] / lengths[1] < 1.3


@pytest.mark.parametrize("mean", [0.0, 0.5, 50.0])
def test_no_weight_is_above_its_bounds(mean):
    inputs = solved(mean=mean)
    length = inputs[2].mean(dim=1).norm().item()
    assert mean < 50 or length > 0.99
    for method, (epsilon, alpha, T) in itertools.product(METHODS[1:], GRID):
        loss = contrast(*inputs, T, (1.0, 0.0))[2]
        weight = losses.gradient_weight(loss, epsilon, T, alpha, method).max().item()
        assert weight <= min(losses.weight_bounds(50, epsilon, T, alpha, method, length)) * (1 + 1e-12)


def test_the_bounds_are_reached_and_one_grows_with_the_mean_of_the_queue():
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = contrast(q, q, -q.T.expand(2, 1000), 0.5, (1.0, 0.0))[2]  # the nearest and the farthest keys
    weight = losses.gradient_weight(loss, 1e3, 0.5, 1.0, "ifm_only").item()
    assert weight == pytest.approx(losses.weight_bounds(1000, 1e3, 0.5, 1.0, "ifm_only", 1.0)[0], rel=1e-9)
    assert weight > losses.weight_bounds(1000, 1e3, 0.5, 1.0, "ifm_only", 0.5)[0]  # negative control
    solved_image = losses.gradient_weight(torch.zeros(1).double(), 0.1, 0.2, 1.0, "ifm").item()
    assert solved_image == pytest.approx(losses.weight_bounds(1, 0.1, 0.2, 1.0, "ifm")[1], rel=1e-12)
    assert losses.weight_bounds(65536, 1.0, 1e-4, 1.0, "ifm") == (math.inf, math.inf)
    assert losses.weight_bounds(65536, 1.0, 1e-4, 0.0, "ifm") == (1.0, 1.0)


def test_ranks_count_the_nearer_negatives():
    q = torch.tensor([[1.0, 0.0]])
    k = F.normalize(torch.tensor([[1.0, 1.0]]), dim=1)
    queue = F.normalize(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.5, 1.0]]), dim=0)
    _, rank, _ = contrast(q, k, queue, 0.2, (1.0, 0.0))
    assert rank.tolist() == [2]  # the key that is equal to the positive does not count
    assert [each.item() for each in rank_accuracy(rank, (1, 2, 3))] == [0, 0, 100]


def test_accuracy_is_in_percent_and_takes_few_classes():
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 4)
    labels = torch.tensor([0, 1, 2, 2])
    assert [each.item() for each in accuracy(logits, labels, (1, 2, 5))] == [25, 50, 100]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_trains_the_same_in_one_pass(method):
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
                logits, *logits_ifm, labels = model(*images)
                loss = loss_of(method, logits, *(logits_ifm or [None]), labels, 1.0)
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


def test_one_pass_takes_at_most_a_fifth_of_the_memory():
    inputs = [each.float() for each in features(64, 64, 65536)]
    ours, logits = (
        peak_bytes(lambda f=form: f(*inputs, 0.2, "ifm", 0.1, 1.0)) for form in (one_pass, from_logits)
    )
    assert logits > 4 * 64 * 65536  # at least the logits: it is really measured
    assert ours < logits / 5
