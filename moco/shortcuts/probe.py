"""Linear probe of frozen features: multinomial logistic regression in float64, to convergence.

No learning rate, no number of epochs, no random numbers: the same features give the same accuracy. The weight
decay is chosen on a part of the training data, from one grid for all runs. Solved by Newton's method with
conjugate gradients, which takes a tenth of the time of torch.optim.LBFGS.
"""

import torch
import torch.nn.functional as F

from moco.errors import UserError

WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # the first with the best accuracy; weaker ones take longer
CHOOSING = 5  # one group in so many of the training part is held back to choose by
# Length of the gradient at which a fit has converged: with these biases no weights give an objective lower by
# more than TOLERANCE^2 / (2 * weight decay), 5e-7 or less.
TOLERANCE = 1e-5
MOST_STEPS = 100  # of Newton's method, each
MOST_PRODUCTS = 5000  # with the Hessian at most


def read_out(features, targets, groups, held_out, held_out_targets, classes):
    """How well a linear classifier trained on `features` (N, d) predicts the classes of `held_out` (M, d):
    {"accuracy": percent of the held-out samples, "weight_decay": the chosen one, "converged": of all fits}.

    targets (N,), (M,) int64. groups (N,) int64: samples of one group, such as the renders of one combination,
    are on the same side when the weight decay is chosen. Weight decays below one that predicts all of that
    part are not tried: they could not do better. Raises UserError when there are fewer than two groups.
    """
    x, x_held_out = principal_axes(features, held_out)
    choosing = _choosing(groups)
    theta, most, lengths = None, -1.0, []
    for weight_decay in WEIGHT_DECAYS:  # each starts where the stronger one ended
        theta, length = fit(x[~choosing], targets[~choosing], classes, weight_decay, theta)
        lengths.append(length)
        percent = _percent(theta, x[choosing], targets[choosing])
        if percent > most:
            most, best, start = percent, weight_decay, theta
        if percent == 100:
            break
    theta, length = fit(x, targets, classes, best, start)
    return {
        "accuracy": _percent(theta, x_held_out, held_out_targets),
        "weight_decay": best,
        "converged": max(*lengths, length) <= TOLERANCE,
    }


def principal_axes(features, held_out):
    """Features (N, d) and (M, d) as float64 (N, d+1), (M, d+1): standardized, along the principal axes of
    `features`, with a column of ones for the bias.

    Standardized by the mean and deviation of `features`; those that are constant, up to the rounding of
    float32, in which encoders compute, become 0. Along the axes the Hessian is nearly diagonal, so that
    conjugate gradients need a fraction of the steps.
    """
    features, held_out = features.double(), held_out.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    is_constant = deviation <= 1e-6 * mean.abs()
    scale = torch.where(is_constant, 0.0, 1 / deviation.masked_fill(is_constant, 1.0))
    features, held_out = (features - mean) * scale, (held_out - mean) * scale
    axes = torch.linalg.eigh(features.T @ features).eigenvectors
    return [torch.cat([x @ axes, x.new_ones(len(x), 1)], dim=1) for x in (features, held_out)]


def fit(x, targets, classes, weight_decay, start=None):
    """(theta, length of the gradient there) at the minimum of mean cross-entropy + weight_decay / 2 * |W|^2.

    x (N, d+1) float64 with ones in the last column; theta (classes, d+1): W and, in the last column, the
    bias; start: a theta; weight_decay is above 0. Newton's method, that is iteratively reweighted least
    squares, with conjugate gradients (Nocedal & Wright 2006, section 7.1).
    """
    N, D = x.shape
    theta = x.new_zeros(classes, D) if start is None else start
    decay = x.new_full((D,), weight_decay)
    decay[-1] = 0
    labels = F.one_hot(targets, classes).T.to(x)  # classes x N
    xt, squares = x.T.contiguous(), x**2

    def objective(theta):
        log_p = (theta @ xt).log_softmax(dim=0)
        return float(-(log_p * labels).sum() / N + (decay * theta**2).sum() / 2)

    for steps in range(MOST_STEPS + 1):
        p = (theta @ xt).softmax(dim=0)  # classes x N
        gradient = (p - labels) @ x / N + decay * theta
        length = float(gradient.norm())
        if length <= TOLERANCE or steps == MOST_STEPS:
            break

        def hessian(direction, p=p):
            moved = direction @ xt
            moved = p * (moved - (p * moved).sum(dim=0))
            return moved @ x / N + decay * direction

        diagonal = (p * (1 - p)) @ squares / N + decay
        precision = max(min(0.5, length**0.5) * length, TOLERANCE / 3)
        step = _conjugate_gradients(hessian, -gradient, diagonal, precision)
        before, slope, share = objective(theta), float((gradient * step).sum()), 1.0
        while objective(theta + share * step) > before + 1e-4 * share * slope and share > 1e-6:
            share /= 2
        theta = theta + share * step
        theta = theta - theta.mean(dim=0)  # what all classes share changes no p, and counts as weight
    return theta, length


def _conjugate_gradients(product, right, diagonal, tolerance):
    """Solve product(step) = right up to a residual of length `tolerance`; diagonal: the preconditioner."""
    step, residual, diagonal = torch.zeros_like(right), right, diagonal.clamp(min=1e-12)
    direction = residual / diagonal
    overlap = (residual * direction).sum()
    for _ in range(MOST_PRODUCTS):
        moved = product(direction)
        curvature = (direction * moved).sum()
        if not curvature > 0:  # flat up to rounding: nothing is left to gain along it
            break
        share = overlap / curvature
        step = step + share * direction
        residual = residual - share * moved
        if residual.norm() <= tolerance:
            break
        scaled = residual / diagonal
        overlap, before = (residual * scaled).sum(), overlap
        direction = scaled + overlap / before * direction
    return step


def _choosing(groups):
    """A mask (N,) of the samples to choose by: every CHOOSING-th group, in an order from a fixed seed."""
    names, place = torch.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UserError("a linear readout needs at least two groups of training images, one to choose by")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return (order % CHOOSING == 0)[place]


def _percent(theta, x, targets):
    return float(((x @ theta.T).argmax(dim=1) == targets).double().mean() * 100)
