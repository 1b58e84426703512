"""BatchNorm in evaluation mode as a part of the convolution before it: the same network in fewer passes."""

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

NORM = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")


def fold_batchnorm(network):
    """Take out of a network, in place, each BatchNorm2d that reads a Conv2d which nothing else reads.

    These convolutions have a bias then. Returns fold(state): of the tensors of the network as it was, which
    stay as they are, those of the network as it is. A network that torch.fx cannot follow stays whole.
    """
    try:
        nodes = list(fx.symbolic_trace(network).graph.nodes)
    except (ValueError, TypeError, RuntimeError):  # its way depends on what it computes
        nodes = []
    modules = dict(network.named_modules())
    targets = [node.target for node in nodes]
    folded = []
    for norm in nodes:
        conv = norm.args[0] if norm.args else None
        pair = isinstance(conv, fx.Node) and (modules.get(conv.target), modules.get(norm.target))
        if not pair or [type(module) for module in pair] != [nn.Conv2d, nn.BatchNorm2d]:
            continue
        if len(conv.users) == 1 and targets.count(conv.target) == targets.count(norm.target) == 1:
            if pair[0].bias is None:
                pair[0].bias = nn.Parameter(torch.empty_like(pair[0].weight[:, 0, 0, 0]))
            network.set_submodule(norm.target, nn.Identity())
            folded.append((conv.target, norm.target, pair[1].eps))

    def fold(state):
        state = dict(state)
        for conv, norm, eps in folded:
            mean, variance, weight, bias, _ = (state.pop(f"{norm}.{name}", None) for name in NORM)
            state[f"{conv}.weight"], state[f"{conv}.bias"] = fuse_conv_bn_weights(
                state[f"{conv}.weight"], state.get(f"{conv}.bias"), mean, variance, eps, weight, bias
            )
        return state

    return fold
