"""Convolutions of small maps as matrix products: for inference.

A ResNet's last maps are 2 x 2 and 1 x 1 for images of 32 pixels. There most of a 3 x 3 kernel lies on
padding, and what lies on the map is a matrix from all its values to all values of the result, which has
less to multiply: (H W) / (kernel's area) of what the convolution does, with the same sums in another order.
With a stride, somewhat larger maps are faster as a product of their windows with the kernel.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SmallMapConv2d(nn.Conv2d):
    """A Conv2d without groups and dilation that multiplies by a matrix where the map is small.

    The `matrix` is made from the weights when there is none: set it to None when they have changed.
    """

    matrix = None

    def forward(self, x):  # N x C x H x W
        height, width = x.shape[2:]
        area, step = (pair[0] * pair[1] for pair in (self.kernel_size, self.stride))
        if height * width >= area:
            return self._of_windows(x) if step > 1 and height * width <= area * step else super().forward(x)
        if self.matrix is None or self.matrix.shape[:2] != (height, width):
            self.matrix = self._matrix(height, width)  # H x W x C x H' x W' x C'
        out = self.matrix.shape[3:5]
        rows = x.permute(0, 2, 3, 1).flatten(1)  # a view with channels_last
        return self._product(rows, self.matrix.flatten(3).flatten(0, 2), out)

    def _of_windows(self, x):
        x = F.pad(x, (self.padding[1],) * 2 + (self.padding[0],) * 2)
        for axis in (0, 1):
            x = x.unfold(2 + axis, self.kernel_size[axis], self.stride[axis])  # N x C x H' x W' x kernel
        rows = x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)
        y = self._product(rows, self.weight.permute(2, 3, 1, 0).flatten(0, 2), (1, 1))
        return y.view(len(x), *x.shape[2:4], -1).permute(0, 3, 1, 2)

    def _product(self, rows, matrix, out):
        """rows @ matrix + bias as a map of the size `out`: N x C' x H' x W', channels last in memory."""
        if self.bias is None:
            y = torch.mm(rows, matrix)
        else:
            y = torch.addmm(self.bias.repeat(out[0] * out[1]), rows, matrix)
        return y.unflatten(1, (*out, -1)).permute(0, 3, 1, 2)

    def _matrix(self, height, width):
        size, kernel, stride, padding = (height, width), self.kernel_size, self.stride, self.padding
        out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
        matrix = self.weight.new_zeros(*size, self.in_channels, *out, self.out_channels)
        for top, left, down, right in torch.cartesian_prod(*map(torch.arange, (*size, *out))).tolist():
            y, x = top - down * stride[0] + padding[0], left - right * stride[1] + padding[1]
            if 0 <= y < kernel[0] and 0 <= x < kernel[1]:
                matrix[top, left, :, down, right] = self.weight[:, :, y, x].T
        return matrix


def small_maps(module):
    """Make every Conv2d below `module` that can be one a SmallMapConv2d in place; names and tensors stay.

    Returns those that were made.
    """
    made = []
    for parent in list(module.modules()):
        for name, conv in parent.named_children():
            plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
            if plain and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
                made.append(
                    SmallMapConv2d(
                        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                        bias=conv.bias is not None, device="meta",
                    )
                )  # fmt: skip
                made[-1]._parameters = conv._parameters
                setattr(parent, name, made[-1])
    return made
