"""Arrays of images as the networks read them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError


def to_pixels(images: Any) -> Tensor:
    """One image or N of them as float images [N, 1, 28, 28] with pixels from 0 to 1.

    images: an array or tensor [28, 28], [N, 28, 28], [N, 1, 28, 28], [N, 28, 28, 1], [784] or [N, 784], white on black
    as in MNIST. Its range follows from all its pixels: a negative one means -1 to 1, one above 1 means 0 to 255,
    otherwise it is 0 to 1, whatever the type. Raises DataError.
    """
    try:  # a copy: torch takes no negative strides, no big-endian numbers, and warns of what it could not write to
        pixels = images.detach().cpu() if isinstance(images, Tensor) else torch.from_numpy(np.array(images, np.float32))
    except (TypeError, ValueError) as error:
        raise DataError(f"images must be numbers in one array or tensor [N, 1, 28, 28]: {error}") from error
    shape = [*pixels.shape]
    ends = [28, 28], [28, 28, 1], [784], [1, 28, 28]
    if not pixels.numel() or not any(shape in (end, [*shape[:1], *end]) for end in ends):
        remedy = "resize them, or pass a PIL image to evaluate.classify"
        raise DataError(f"images of shape {shape}; the networks read [N, 1, 28, 28]; {remedy}")
    return unit_range(pixels.float()).reshape(-1, 1, 28, 28)


def unit_range(pixels: Tensor) -> Tensor:
    """Scale float pixels of any of the usual ranges to 0 to 1. Raises DataError if they do not show which it is.

    Every image has paper and ink, so -0.1 to 1, into which interpolation turns 0 to 1, and 0 to 16 are errors.
    """
    low, high = (round(value.item(), 3) for value in pixels.aminmax())  # resizing may turn 1 into 1.0000001
    if low >= 0 and high <= 1:
        return pixels
    if low >= 0 and 64 <= high <= 255:
        return pixels / 255
    if -1 <= low <= -0.5 and high <= 1:
        return (pixels + 1) / 2
    raise DataError(f"pixels from {low:.3g} to {high:.3g}; scale them to 0 to 255, 0 to 1 or -1 to 1")
