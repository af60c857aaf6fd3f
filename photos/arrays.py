"""Arrays of images, or pictures, as the networks read them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError
from photos.reader import read_photo


def to_pixels(images: Any) -> Tensor:
    """One image or N of them as float images [N, 1, 28, 28] with pixels from 0 to 1.

    images: a PIL image, in which the digits are found; or an array or tensor [28, 28], [N, 28, 28], [N, 1, 28, 28],
    [N, 28, 28, 1], [784] or [N, 784], white on black as in MNIST. Its range follows from all its pixels: a negative
    one means -1 to 1, one above 1 means 0 to 255, otherwise it is 0 to 1. Raises DataError.
    """
    if hasattr(images, "convert"):  # PIL
        return read_photo(images) / 255
    pixels = images.detach().cpu() if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))
    shape = list(pixels.shape)
    if not pixels.numel() or not any(shape[-len(end) :] == end for end in ([784], [28, 28], [28, 28, 1])):
        raise DataError(f"images of shape {shape}; the networks read [N, 1, 28, 28]: resize them, or pass a PIL image")
    return unit_range(pixels).reshape(-1, 1, 28, 28)


def unit_range(pixels: Tensor) -> Tensor:
    """Scale pixels of any of the usual ranges to 0 to 1. Raises DataError if they have another range."""
    low, high = (value.item() for value in pixels.aminmax())
    if low >= 0 and high <= 255:
        return pixels.float() / (255 if high > 1 or not pixels.is_floating_point() else 1)
    if low >= -1 and high <= 1:
        return (pixels.float() + 1) / 2
    raise DataError(f"pixels from {low:.3g} to {high:.3g}; scale them to 0 to 255, 0 to 1 or -1 to 1")
