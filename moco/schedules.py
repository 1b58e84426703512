"""The learning rate, set once per epoch."""

import math


def learning_rate(base, epoch, epochs, cosine=False, milestones=()):
    """`base` on half a cosine from epoch 0 to `epochs`, or divided by 10 at every milestone that has been
    reached.
    """
    if cosine:
        return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    for milestone in milestones:
        if epoch >= milestone:
            base *= 0.1
    return base


def set_learning_rate(optimizer, value):
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
