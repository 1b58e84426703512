"""Means over seeds and how sure they are: Student's t intervals, also of differences paired by seed."""

import math


def t_quantile(p, degrees):
    """The point below which Student's t with `degrees` (1, 2, ...) of freedom lies with probability p."""
    low, high = -1.0, 1.0
    while _t_cdf(low, degrees) > p:
        low *= 2
    while _t_cdf(high, degrees) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def interval(values, level=0.95):
    """(mean, half the width of its t interval) of independent values; the half is nan for fewer than two."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, t_quantile((1 + level) / 2, n - 1) * math.sqrt(variance / n)


def _t_cdf(t, degrees):
    """By the finite series for whole degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total  # P(-t < T < t)
    return (1 + inside) / 2
