"""BatchNorm over groups of the batch: what N processes compute on their own batches, computed in one process.

MoCo's shuffled BatchNorm (He et al. 2020, section 3.3) needs several separate batches: a query and its
key must not share statistics, or the model finds its positives by them. One process has one batch, unless
it is split here.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of `splits` interleaved groups: sample i is in
    group i % splits. Layers within it, as of timm's BatchNormAct2d, follow it.

    Interleaved, because a batch of N = n * splits samples is then, without a copy, one of n samples with
    splits * C channels, which the usual kernel normalizes at its usual speed. The running statistics are
    those of group 0, as in DistributedDataParallel, which keeps the buffers of rank 0. Evaluation is
    unchanged.
    """

    def __init__(self, *args, splits, **kwargs):
        super().__init__(*args, **kwargs)
        self.splits = splits

    def forward(self, x):  # N x C x H x W
        x = self._normalized(x)
        for layer in self.children():
            x = layer(x)
        return x

    def _normalized(self, x):
        if not self.training:
            return super().forward(x)
        N, C, H, W = x.shape
        if N % self.splits:
            raise ValueError(f"a batch of {N} cannot be split into {self.splits} equal BatchNorm groups")
        if torch.compiler.is_compiling():
            return self._by_formula(x)
        weight, bias, *running = (
            None if t is None else t.expand(self.splits, C).flatten()
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        y = F.batch_norm(
            x.reshape(N // self.splits, self.splits * C, H, W),
            *running,
            weight,
            bias,
            training=True,
            momentum=self._momentum(),
            eps=self.eps,
        )
        if self.track_running_stats:
            self.running_mean.copy_(running[0][:C])
            self.running_var.copy_(running[1][:C])
        return y.reshape(N, C, H, W)

    def _by_formula(self, x):
        """The same by formulas, which a compiler fuses into few passes for any memory format of x.

        Eager kernels treat the groups as channels, which must be adjacent in memory: with channels_last that
        costs a copy.
        """
        groups = x.unflatten(0, (-1, self.splits))  # n x splits x C x H x W
        with torch.no_grad():
            var, mean = torch.var_mean(_wide(groups), dim=(0, 3, 4), correction=0, keepdim=True)
        momentum = self._momentum()
        if self.track_running_stats:
            count = x.numel() // mean.numel()
            if count == 1:
                raise ValueError("BatchNorm needs more than 1 value per channel and group when training")
            for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                running.copy_((1 - momentum) * running + momentum * new[0, 0, :, 0, 0])
        weight, bias = self.weight, self.bias
        if not self.affine:
            weight, bias = torch.ones_like(mean[0, 0, :, 0, 0]), torch.zeros_like(mean[0, 0, :, 0, 0])
        return _Normalize.apply(groups, weight, bias, mean, torch.rsqrt(var + self.eps)).flatten(0, 1)

    def _momentum(self):
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a cumulative average
            return 1.0 / float(self.num_batches_tracked) if self.track_running_stats else 0.0
        return self.momentum


class SplitBatchNorm1d(SplitBatchNorm2d):
    """The same for a BatchNorm1d of N x C or N x C x L."""

    def forward(self, x):
        return super().forward(x.reshape(*x.shape[:2], -1, 1)).reshape(x.shape)


class _Normalize(torch.autograd.Function):
    """(x - mean) * rstd * weight + bias for x of n x splits x C x H x W and its statistics over n, H and W.

    mean, rstd: 1 x splits x C x 1 x 1; weight, bias: (C,). The statistics are functions of x, and the
    gradient is that of BatchNorm with m values per channel and group (Ioffe and Szegedy 2015, section 3):
    dx = weight rstd (g - (sum g + xhat sum(g xhat)) / m). Derived from the operations instead, it would take
    more passes over memory: the sums one by one, each from its own intermediate results.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, rstd):
        ctx.save_for_backward(x, weight, mean, rstd)
        y = (_wide(x) - mean) * rstd * weight[:, None, None] + bias[:, None, None]
        return _narrow(y, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        g, xhat = _wide(grad), (_wide(x) - mean) * rstd
        of_bias = g.sum((0, 3, 4), keepdim=True)  # 1 x splits x C x 1 x 1
        of_weight = (g * xhat).sum((0, 3, 4), keepdim=True)
        m = x.numel() // mean.numel()
        dx = weight[:, None, None] * rstd * (g - (of_bias + xhat * of_weight) / m)
        return _narrow(dx, x.dtype), of_weight.sum((0, 1, 3, 4)), of_bias.sum((0, 1, 3, 4)), None, None


def _wide(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _narrow(y, dtype):
    # without a call that changes nothing, for which torch 2.11 compiles a gradient of zeros
    return y if y.dtype == dtype else y.to(dtype)


def split_batchnorm(module, splits):
    """Replace every BatchNorm below `module` by a SplitBatchNorm with its tensors; return how many."""
    changed = 0
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            kind = SplitBatchNorm2d if isinstance(child, nn.BatchNorm2d) else SplitBatchNorm1d
            split = kind(
                child.num_features,
                child.eps,
                child.momentum,
                child.affine,
                child.track_running_stats,
                splits=splits,
            )
            split._parameters, split._buffers = child._parameters, child._buffers
            split._modules = child._modules
            split.train(child.training)
            setattr(module, name, split)
            changed += 1
        else:
            changed += split_batchnorm(child, splits)
    return changed


def interleave(x, splits):
    """Reorder N = splits * n samples: contiguous groups, as of `splits` processes, become interleaved."""
    return x if splits == 1 else x.unflatten(0, (splits, -1)).transpose(0, 1).flatten(0, 1)


def deinterleave(x, splits):
    """Undo `interleave`: the samples of each group are contiguous again."""
    return x if splits == 1 else x.unflatten(0, (-1, splits)).transpose(0, 1).flatten(0, 1)
