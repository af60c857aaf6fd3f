"""Images from Python: arrays of any of the usual shapes and ranges."""

from typing import Any

import numpy as np
import torch

from datasets.mnist import DataError
from datasets.photo import read_photo


def to_pixels(images: Any) -> torch.Tensor:
    """Float images [N, 1, 28, 28] with pixels from 0 to 1, from one image or N of them.

    images: a picture (PIL), in which the digit is found; or an array or tensor [28, 28], [N, 28, 28], [N, 1, 28, 28],
    [N, 28, 28, 1], [784] or [N, 784], white on black as MNIST's. Its range is read off all of its pixels: negative ones
    mean -1 to 1, ones above 1 mean 0 to 255, otherwise 0 to 1. Raises DataError.
    """
    if hasattr(images, "convert"):  # PIL
        return read_photo(images) / 255
    pixels = torch.as_tensor(np.asarray(images)) if not isinstance(images, torch.Tensor) else images.detach().cpu()
    shape = list(pixels.shape)
    if pixels.numel() == 0 or (shape[-1:] != [784] and shape[-2:] != [28, 28] and shape[-3:] != [28, 28, 1]):
        raise DataError(f"images of shape {shape}; the networks read [N, 1, 28, 28]: resize them, or pass a PIL image")
    whole = not pixels.is_floating_point()
    pixels = pixels.float().reshape(-1, 1, 28, 28)
    low, high = (value.item() for value in pixels.aminmax())
    if not -1 <= low <= high <= 255 or (low < 0 and high > 1):
        raise DataError(f"pixels from {low:.3g} to {high:.3g}; scale them to 0 to 255, 0 to 1 or -1 to 1")
    if whole or high > 1:
        return pixels / 255
    return (pixels + 1) / 2 if low < 0 else pixels
