"""Convolutions of maps that are smaller than their kernel, as matrix products: for inference.

A ResNet's last maps are 2 x 2 and 1 x 1 for images of 32 pixels. There most of a 3 x 3 kernel lies on
padding, and what lies on the map is a matrix from all its values to all values of the result, which has
less to multiply: (H W) / (kernel's area) of what the convolution does, with the same sums in another order.
"""

import torch
from torch import nn


class SmallMapConv2d(nn.Conv2d):
    """A Conv2d without groups and dilation that multiplies by a matrix where the map is smaller.

    The `matrix` is made from the weights when there is none: set it to None when they have changed.
    """

    matrix = None

    def forward(self, x):  # N x C x H x W
        height, width = x.shape[2:]
        if height * width >= self.kernel_size[0] * self.kernel_size[1]:
            return super().forward(x)
        if self.matrix is None or self.matrix.shape[:2] != (height, width):
            self.matrix = self._matrix(height, width)  # H x W x C x H' x W' x C'
        out = self.matrix.shape[3:]
        rows = x.permute(0, 2, 3, 1).flatten(1)  # a view with channels_last
        y = torch.mm(rows, self.matrix.flatten(3).flatten(0, 2)).unflatten(1, out).permute(0, 3, 1, 2)
        return y if self.bias is None else y + self.bias[:, None, None]

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
