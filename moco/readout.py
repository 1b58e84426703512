"""How well frozen features tell classes apart: multinomial logistic regression in float64, to convergence.

No learning rate, no number of epochs, no random numbers: the same features give the same accuracy. How
strongly weights are held back is chosen on a part of the training data from one grid for all runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moco.errors import UserError

WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # the first that reads best is taken; weaker ones need
# a thousand steps and more; how many runs took the last is said under a sweep's table
CHOOSING = 5  # one group in so many of the training part is held back to choose by
TOLERANCE = 1e-5  # length of the gradient at which a fit counts as converged: with these biases no weights
# give an objective lower by more than TOLERANCE^2 / (2 * weight decay), 5e-7 or less
MOST_STEPS = 3000
LOOK_EVERY = 10  # steps between two looks at that gradient; L-BFGS itself sees that of whitened features


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


@dataclass(frozen=True)
class Readout:
    """accuracy: percent of the held-out part; iterations, gradient: of the last fit; converged: all fits.

    Weight decays below one that reads all there is to choose by are not tried: they could not read better.
    """

    accuracy: float
    weight_decay: float
    iterations: int
    gradient: float
    converged: bool


def read_out(features, targets, groups, held_out, held_out_targets, classes):
    """The Readout of `held_out` (M, d) by a classifier of `features` (N, d); targets (N,), (M,) int64.

    groups (N,) int64: samples of one group, such as the renders of one combination, are on the same side when
    the weight decay is chosen. Features are standardised by the mean and deviation of the training part.
    Raises UserError when there are fewer than two groups.
    """
    features, held_out = standardised(features, held_out)
    choosing = _choosing(groups)
    part = _Whitened(features[~choosing])
    fits, scores = [None], []
    for weight_decay in WEIGHT_DECAYS:  # each starts where the stronger one ended
        fits.append(part.fit(targets[~choosing], classes, weight_decay, fits[-1]))
        scores.append(_percent(fits[-1], features[choosing], targets[choosing]))
        if scores[-1] == 100:
            break
    best = scores.index(max(scores))
    last = _Whitened(features).fit(targets, classes, WEIGHT_DECAYS[best], fits[1 + best])
    accuracy = _percent(last, held_out, held_out_targets)
    converged = all(fit.converged for fit in [*fits[1:], last])
    return Readout(accuracy, WEIGHT_DECAYS[best], last.iterations, last.gradient, converged)


def standardised(features, held_out):
    """Both as float64, less the mean and divided by the deviation of `features`; constant ones become 0.

    Constant up to the rounding of float32, in which encoders compute.
    """
    features, held_out = features.double(), held_out.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    tiny = deviation <= 1e-6 * mean.abs()
    scale = torch.where(tiny, 0.0, 1 / deviation.masked_fill(tiny, 1.0))
    return (features - mean) * scale, (held_out - mean) * scale


def fit(features, targets, classes, weight_decay):
    """Minimise mean cross-entropy + weight_decay / 2 * |W|^2 over features (N, d) float64: a Fit.

    weight_decay is above 0; the bias is free. L-BFGS with a strong Wolfe search; whether it converged is
    the Fit's to say.
    """
    return _Whitened(features).fit(targets, classes, weight_decay)


class _Whitened:
    """Features along their principal axes, on which L-BFGS needs a fraction of the steps.

    With W = V A for an invertible A the objective has the same minimum. A scales each axis by the inverse
    root of its curvature at the start, about mean of p (1 - p) * variance + weight decay.
    """

    def __init__(self, features):
        mean = features.mean(dim=0)  # free biases take up any mean; the axes are those of the rest
        self.mean, centred = mean, features - mean
        self.variance, self.axes = torch.linalg.eigh(centred.T @ centred / len(features))
        self.along = centred @ self.axes  # N x d
        self.variance = self.variance.clamp(min=0)

    def fit(self, targets, classes, weight_decay, start=None):
        along, variance = self.along, self.variance
        W, bias = along.new_zeros(classes, along.shape[1]), along.new_zeros(classes)
        if start is not None:
            W, bias = start.weight @ self.axes, start.bias + start.weight @ self.mean
        p = (along @ W.T + bias).softmax(dim=1)
        scale = ((p * (1 - p)).mean() * variance + weight_decay).rsqrt()  # d
        x = along * scale
        V, bias = (W / scale).requires_grad_(True), bias.clone().requires_grad_(True)
        penalty = weight_decay / 2 * scale**2
        optimizer = torch.optim.LBFGS(
            [V, bias], history_size=100, line_search_fn="strong_wolfe", tolerance_change=0
        )
        group, steps = optimizer.param_groups[0], 0

        def objective():
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ V.T + bias, targets) + (penalty * V**2).sum()
            loss.backward()
            return loss

        gradient = float("inf")
        while gradient > TOLERANCE and steps < MOST_STEPS:
            count = min(LOOK_EVERY, MOST_STEPS - steps)
            group.update(tolerance_grad=0, max_iter=count, max_eval=20 * count)
            optimizer.step(objective)
            objective()
            turned = (V.grad / scale).flatten()  # with respect to W, in turned axes, which keep lengths
            gradient = float(torch.cat([turned, bias.grad]).norm())
            steps = optimizer.state[V]["n_iter"]
        weight = (V.detach() * scale) @ self.axes.T
        return Fit(weight, bias.detach() - weight @ self.mean, steps, gradient)


def _choosing(groups):
    """A mask (N,) of the samples to choose by: every CHOOSING-th group, in an order from a fixed seed."""
    names, place = torch.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UserError("a linear readout needs at least two groups of training images, one to choose by")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return (order % CHOOSING == 0)[place]


def _percent(fit, features, targets):
    return float((fit.predict(features) == targets).double().mean() * 100)
