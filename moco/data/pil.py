"""What was drawn (moco.data.augment), applied on a CPU: crop and resize, color operations, blur, flip.

An image is uint8 (H, W, 3), as moco.data.decode reads it; a view is uint8 3 x S x S.
"""

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional


def crop_resize(image, view, size, resize, out=None):
    """Cut the box of `view` (a record of VIEW) out of `image` and resize it: uint8 3 x size x size.

    resize: "pil" (the published pixels) or "torch" (3 times as fast, at most 2 levels from PIL's). `out`, a
    CPU tensor of that shape with any strides, is filled and returned when given.
    """
    top, left, height, width = view.item()[:4]  # three times as fast as by name
    crop = image[top : top + height, left : left + width]
    if resize == "torch" and out is not None:  # in half the time when `out` has interleaved channels
        torch.ops.aten._upsample_bilinear2d_aa.out(
            _planar(crop)[None], [size, size], False, None, None, out=out[None]
        )
        return out
    return _write(_resized(crop, size, size, resize), out)


def center_resize(image, size, resize, out=None):
    """The view of `image` for validation: uint8 3 x size x size, `out` when given.

    The shorter side becomes 256/224 of `size`, as published for 224; what is cut out of the center is
    torchvision's Resize and CenterCrop to the pixel. resize, out: as in crop_resize.
    """
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    top, left = round((height - size) / 2), round((width - size) / 2)
    pixels = _resized(image, height, width, resize)
    return _write(pixels[:, top : top + size, left : left + size], out)


def photometric(pixels, view, gray_first):
    """Jitter, grayscale, blur and flip of a view as its record `view` says, by PIL: uint8 3 x H x W.

    pixels: uint8 3 x H x W with any strides; so is the result. gray_first: MoCo v1's order
    (moco.data.augment.Recipe).
    """
    if not (view["gray"] or view["jitter"] or view["sigma"] > 0):
        return pixels.flip(2) if view["flip"] else pixels
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    if view["gray"] and gray_first:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if view["jitter"]:
        image = _jitter(image, view)
    if view["gray"] and not gray_first:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if view["sigma"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(view["sigma"])))
    if view["flip"]:
        image = functional.hflip(image)
    return _planar(np.array(image))


def _jitter(image, view):
    """ColorJitter with what was drawn: the four operations in the drawn order."""
    for number in view["order"]:
        if number == 0:
            image = functional.adjust_brightness(image, float(view["brightness"]))
        elif number == 1:
            image = functional.adjust_contrast(image, float(view["contrast"]))
        elif number == 2:
            image = functional.adjust_saturation(image, float(view["saturation"]))
        else:
            image = functional.adjust_hue(image, float(view["hue"]))
    return image


def _resized(image, height, width, resize):
    """An image resized, bilinear and antialiased: uint8 3 x height x width, with any strides."""
    if resize == "pil":
        return _planar(np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)))
    size = height, width
    return torch.nn.functional.interpolate(_planar(image)[None], size, mode="bilinear", antialias=True)[0]


def _planar(image):
    """uint8 3 x H x W, channels interleaved in memory, for which torch's resize has a vector kernel.

    It refers to the pixels of a writable array, which is all that torch takes, and copies others.
    """
    writable = image if image.flags.writeable else np.array(image, order="C")
    return torch.from_numpy(writable).permute(2, 0, 1)


def _write(pixels, out):
    return pixels.contiguous() if out is None else out.copy_(pixels)
