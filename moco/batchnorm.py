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
    group i % splits.

    Interleaved, because a batch of N = n * splits samples is then, without a copy, one of n samples with
    splits * C channels, which the usual kernel normalizes at its usual speed. The running statistics are
    those of group 0, as in DistributedDataParallel, which keeps the buffers of rank 0. Evaluation is
    unchanged.
    """

    def __init__(self, *args, splits, **kwargs):
        super().__init__(*args, **kwargs)
        self.splits = splits

    def forward(self, x):  # N x C x H x W
        if not self.training:
            return super().forward(x)
        N, C, H, W = x.shape
        if N % self.splits:
            raise ValueError(f"a batch of {N} cannot be split into {self.splits} equal BatchNorm groups")
        if torch.compiler.is_compiling():
            return self._by_formula(x)
        per_group = [None if t is None else t.repeat(self.splits) for t in (self.weight, self.bias)]
        running = [
            None if t is None else t.repeat(self.splits) for t in (self.running_mean, self.running_var)
        ]
        y = F.batch_norm(
            x.reshape(N // self.splits, self.splits * C, H, W),
            *running,
            *per_group,
            training=True,
            momentum=self._momentum(),
            eps=self.eps,
        )
        if self.track_running_stats:
            self.running_mean.copy_(running[0][:C])
            self.running_var.copy_(running[1][:C])
        return y.reshape(N, C, H, W)

    def _by_formula(self, x):
        """The same by formulas, which a compiler fuses into two passes for any memory format of x.

        Eager kernels treat the groups as channels, which must be adjacent in memory: with channels_last that
        costs a copy.
        """
        groups = x.unflatten(0, (-1, self.splits))  # n x splits x C x H x W
        groups = groups if x.dtype == torch.float64 else groups.float()
        var, mean = torch.var_mean(groups, dim=(0, 3, 4), correction=0, keepdim=True)
        momentum = self._momentum()
        if self.track_running_stats:
            count = groups.shape[0] * groups.shape[3] * groups.shape[4]
            if count == 1:
                raise ValueError("BatchNorm needs more than 1 value per channel and group when training")
            for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                running.copy_((1 - momentum) * running + momentum * new[0, 0, :, 0, 0].detach())
        y = (groups - mean) * torch.rsqrt(var + self.eps)
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype).flatten(0, 1)

    def _momentum(self):
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a cumulative average
            return 1.0 / float(self.num_batches_tracked) if self.track_running_stats else 0.0
        return self.momentum


def split_batchnorm(module, splits):
    """Replace every BatchNorm2d below `module` by a SplitBatchNorm2d with its tensors; return how many."""
    changed = 0
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = SplitBatchNorm2d(
                child.num_features,
                child.eps,
                child.momentum,
                child.affine,
                child.track_running_stats,
                splits=splits,
            )
            split._parameters, split._buffers = child._parameters, child._buffers
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
