"""Linear probe of frozen features: multinomial logistic regression in float64, to convergence.

No learning rate, no number of epochs, no random numbers: the same features give the same accuracy. The weight
decay is chosen on a part of the training data, from one grid for all runs. Solved by Newton's method with
conjugate gradients, which takes a tenth of the time of torch.optim.LBFGS.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moco.errors import UserError

WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # the first that reads best is taken; weaker ones take longer
CHOOSING = 5  # one group in so many of the training part is held back to choose by
# Length of the gradient at which a fit has converged: with these biases no weights give an objective lower by
# more than TOLERANCE^2 / (2 * weight decay), 5e-7 or less.
TOLERANCE = 1e-5
MOST_STEPS = 100  # of Newton's method, each
MOST_PRODUCTS = 5000  # with the Hessian at most


@dataclass(frozen=True)
class Fit:
    """W (classes, d) and bias (classes,), float64; gradient: the length of the objective's gradient there."""

    weight: torch.Tensor
    bias: torch.Tensor
    iterations: int
    gradient: float

    @property
    def converged(self):
        return self.gradient <= TOLERANCE

    def predict(self, features):
        """The likeliest class (N,) of features (N, d)."""
        return (features @ self.weight.T + self.bias).argmax(dim=1)


def read_out(features, targets, groups, held_out, held_out_targets, classes):
    """How well a linear classifier trained on `features` (N, d) predicts the classes of `held_out` (M, d);
    targets (N,), (M,) int64. A dict: `accuracy` in percent of the held-out samples, the `weight_decay` that
    was chosen, `iterations` and `gradient` (length) of the last fit, whether all fits `converged`.

    groups (N,) int64: samples of one group, such as the renders of one combination, are on the same side when
    the weight decay is chosen. Features are standardized by the mean and deviation of the training part.
    Weight decays below one that reads all there is to choose by are not tried: they could not read better.
    Raises UserError when there are fewer than two groups.
    """
    features, held_out = standardized(features, held_out)
    choosing = _choosing(groups)
    part = PrincipalAxes(features[~choosing])
    fits, scores = [None], []
    for weight_decay in WEIGHT_DECAYS:  # each starts where the stronger one ended
        fits.append(part.fit(targets[~choosing], classes, weight_decay, fits[-1]))
        scores.append(_percent(fits[-1], features[choosing], targets[choosing]))
        if scores[-1] == 100:
            break
    best = scores.index(max(scores))
    last = PrincipalAxes(features).fit(targets, classes, WEIGHT_DECAYS[best], fits[1 + best])
    return {
        "accuracy": _percent(last, held_out, held_out_targets),
        "weight_decay": WEIGHT_DECAYS[best],
        "iterations": last.iterations,
        "gradient": last.gradient,
        "converged": all(fit.converged for fit in [*fits[1:], last]),
    }


def standardized(features, held_out):
    """Both as float64, less the mean and divided by the deviation of `features`; constant ones become 0.

    Constant up to the rounding of float32, in which encoders compute.
    """
    features, held_out = features.double(), held_out.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    tiny = deviation <= 1e-6 * mean.abs()
    scale = torch.where(tiny, 0.0, 1 / deviation.masked_fill(tiny, 1.0))
    return (features - mean) * scale, (held_out - mean) * scale


class PrincipalAxes:
    """Features (N, d) float64 along their principal axes, on which conjugate gradients need a fraction of the
    products: there the Hessian is about diagonal for each class, mean of p (1 - p) * variance + weight decay.
    """

    def __init__(self, features):
        self.mean = features.mean(dim=0)  # free biases take up any mean; the axes are those of the rest
        centered = features - self.mean
        variance, self.axes = torch.linalg.eigh(centered.T @ centered / len(features))
        one = centered.new_ones(len(features), 1)
        self.x = torch.cat([centered @ self.axes, one], dim=1)  # N x d+1, the last is the bias's
        self.xt = self.x.T.contiguous()
        self.variance = torch.cat([variance.clamp(min=0), one[0]])

    def fit(self, targets, classes, weight_decay, start=None):
        """Minimize mean cross-entropy + weight_decay / 2 * |W|^2: a Fit, which says whether it converged.

        weight_decay is above 0; the bias is free; start: a Fit. Newton's method, that is iteratively
        reweighted least squares, with conjugate gradients (Nocedal & Wright 2006, section 7.1).
        """
        N, D = self.x.shape
        theta = self.x.new_zeros(classes, D)
        if start is not None:
            theta[:, :-1], theta[:, -1] = start.weight @ self.axes, start.bias + start.weight @ self.mean
        decay = self.x.new_full((D,), weight_decay)
        decay[-1] = 0
        right = F.one_hot(targets, classes).T.to(theta)  # classes x N

        def objective(theta):
            log_p = (theta @ self.xt).log_softmax(dim=0)
            return float(-(log_p * right).sum() / N + (decay * theta**2).sum() / 2)

        for steps in range(MOST_STEPS + 1):
            p = (theta @ self.xt).softmax(dim=0)
            gradient = (p - right) @ self.x / N + decay * theta
            length = float(gradient.norm())
            if length <= TOLERANCE or steps == MOST_STEPS:
                break
            step = self._newton_step(p, gradient, decay, max(min(0.5, length**0.5) * length, TOLERANCE / 3))
            before, slope, share = objective(theta), float((gradient * step).sum()), 1.0
            while objective(theta + share * step) > before + 1e-4 * share * slope and share > 1e-6:
                share /= 2
            theta = theta + share * step
            theta = theta - theta.mean(dim=0)  # what all classes share changes no p, and counts as weight
        weight = theta[:, :-1] @ self.axes.T
        return Fit(weight, theta[:, -1] - weight @ self.mean, steps, length)

    def _newton_step(self, p, gradient, decay, tolerance):
        """-Hessian^-1 gradient, to a residual of length `tolerance`, all (classes, d+1); p: (classes, N)."""
        diagonal = ((p * (1 - p)).mean(dim=1, keepdim=True) * self.variance + decay).clamp(min=1e-12)
        step, residual = torch.zeros_like(gradient), -gradient
        direction = residual / diagonal
        overlap = (residual * direction).sum()
        for _ in range(MOST_PRODUCTS):
            moved = direction @ self.xt
            moved = p * (moved - (p * moved).sum(dim=0))
            product = moved @ self.x / len(self.x) + decay * direction
            curvature = (direction * product).sum()
            if not curvature > 0:  # flat up to rounding: nothing is left to gain along it
                break
            share = overlap / curvature
            step = step + share * direction
            residual = residual - share * product
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


def _percent(fit, features, targets):
    return float((fit.predict(features) == targets).double().mean() * 100)
