"""Photos and arrays of handwritten digits as images like MNIST's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError
from photos.files import open_image

if TYPE_CHECKING:  # Pillow takes a while to import
    from PIL import Image

SIDE = 800  # larger photos are reduced to this many pixels, enough for a digit of a twentieth of the side


def to_pixels(images: Any) -> Tensor:
    """One image or N of them as float images [N, 1, 28, 28] with pixels from 0 to 1.

    images: an array or tensor [28, 28], [N, 28, 28], [N, 1, 28, 28], [N, 28, 28, 1], [784] or [N, 784], white on black
    as in MNIST. Its range follows from all its pixels: a negative one means -1 to 1, one above 1 means 0 to 255,
    otherwise it is 0 to 1, whatever the type. Raises DataError.
    """
    pixels = images.detach().cpu() if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))
    shape = [*pixels.shape]
    ends = [28, 28], [28, 28, 1], [784], [1, 28, 28]
    if not pixels.numel() or not any(shape in (end, [len(pixels), *end]) for end in ends):
        raise DataError(f"images of shape {shape}; the networks read [N, 1, 28, 28]: resize them, or pass a PIL image")
    return unit_range(pixels.float()).reshape(-1, 1, 28, 28)


def unit_range(pixels: Tensor) -> Tensor:
    """Scale float pixels of any of the usual ranges to 0 to 1. Raises DataError if they do not show which it is.

    Every image has paper and ink: their range is not -0.1 to 1, which interpolation makes of 0 to 1, nor 0 to 16.
    """
    low, high = (value.item() for value in pixels.aminmax())
    if low >= 0 and high <= 1:
        return pixels
    if low >= 0 and 64 <= high <= 255:
        return pixels / 255
    if -1 <= low <= -0.5 and high <= 1:
        return (pixels + 1) / 2
    raise DataError(f"pixels from {low:.3g} to {high:.3g}; scale them to 0 to 255, 0 to 1 or -1 to 1")


def read_photo(photo: "str | Path | Image.Image") -> Tensor:
    """The digits in a photo or drawing, from left to right: uint8 [N, 1, 28, 28], white on black.

    Dark on light or light on dark. Prepared as MNIST was (yann.lecun.com/exdb/mnist): each digit is scaled to fit into
    20x20 pixels, then its centre of mass is moved to the centre of 28x28. Raises DataError, also if nothing is found,
    or several objects that are not in one row.
    """
    from photos.ink import find_digits  # SciPy takes a while to import

    image = enlarge(open_image(photo, SIDE))
    digits, boxes = find_digits(np.asarray(image, dtype=np.float32).transpose(2, 0, 1))
    name = photo if isinstance(photo, str | Path) else "the picture"
    if not digits:
        raise DataError(f"{name} shows no digit: nothing stands out; photograph one digit on a plain background")
    if not in_one_row([rows for rows, _ in boxes]):
        raise DataError(f"{name} shows {len(boxes)} objects that are not in one row; crop it to one digit")
    if any(width > 2 * height for height, width in (ink.shape for ink in digits)):
        raise DataError(f"{name} shows something too wide for a digit; leave a gap between digits, or crop it to one")
    return torch.from_numpy(np.stack([centre(ink) for ink in digits])).unsqueeze(1)


def enlarge(image: "Image.Image", least: int = 200) -> "Image.Image":
    scale = max(1, least / max(image.size))
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.resize((width, height))


def in_one_row(sides: list[slice]) -> bool:
    """Whether the middle of each digit lies between top and bottom of every other."""
    return all(side.start < (other.start + other.stop) / 2 < side.stop for side in sides for other in sides)


def centre(ink: np.ndarray) -> np.ndarray:
    """Fit `ink` [H, W] into 20x20 and put its centre of mass at the centre of 28x28, uint8."""
    from PIL import Image

    scale = 20 / max(ink.shape)
    height, width = (max(1, round(length * scale)) for length in ink.shape)
    image = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.LANCZOS)
    small = np.asarray(image).clip(0, None)
    small = small / small.max()
    top = round(14 - (small.sum(axis=1) @ np.arange(height)) / small.sum())
    left = round(14 - (small.sum(axis=0) @ np.arange(width)) / small.sum())
    top, left = min(max(top, 0), 28 - height), min(max(left, 0), 28 - width)
    canvas = np.zeros((28, 28), dtype=np.float32)
    canvas[top : top + height, left : left + width] = small
    return (canvas * 255).round().astype(np.uint8)
