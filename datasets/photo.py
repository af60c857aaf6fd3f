"""Pictures of handwritten digits, made to look like MNIST's."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets.mnist import DataError
from datasets.picture import open_picture

if TYPE_CHECKING:  # Pillow takes a while to import
    from PIL import Image

SIDE = 800  # larger pictures are reduced to so many pixels, enough for a digit of a twentieth of the side


def read_photo(picture: "str | Path | Image.Image") -> torch.Tensor:
    """Read the digits in a picture, from left to right: uint8 [N, 1, 28, 28], white on black, as networks see them.

    Any photo or drawing, dark on light or light on dark. Prepared as MNIST was (yann.lecun.com/exdb/mnist): a digit
    is scaled to fit into 20x20 pixels, then its centre of mass is moved to the centre of 28x28. Raises DataError, too
    if nothing is found, or several things that do not stand in one row.
    """
    from datasets.ink import find_digits  # SciPy takes a while to import

    digits, boxes = find_digits(read_pixels(picture))
    name = picture if isinstance(picture, str | Path) else "the picture"
    if not digits:
        raise DataError(f"{name} shows no digit: nothing stands out; take a picture of one digit on a plain background")
    if not in_one_row([rows for rows, _ in boxes]):
        raise DataError(f"{name} shows {len(boxes)} things that do not stand in one row; crop it to one digit")
    if any(width > 2 * height for height, width in (ink.shape for ink in digits)):
        raise DataError(f"{name} shows something too wide for a digit; leave a gap between digits, or crop it to one")
    return torch.from_numpy(np.stack([centre(ink) for ink in digits])).unsqueeze(1)


def in_one_row(sides: list[slice]) -> bool:
    """Whether the middle of each digit lies between top and bottom of every other."""
    return all(side.start < (other.start + other.stop) / 2 < side.stop for side in sides for other in sides)


def read_pixels(picture: "str | Path | Image.Image") -> np.ndarray:
    """The picture's channels, float32 [C, H, W], 0 (black) to 255, reduced to SIDE pixels; a tiny one is enlarged."""
    image = open_picture(picture, SIDE)
    if max(image.size) < 200:
        image = image.resize([round(200 / max(image.size) * length) or 1 for length in image.size])
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)


def centre(ink: np.ndarray) -> np.ndarray:
    """Fit `ink` [H, W] into 20x20 and put its centre of mass at the centre of 28x28, uint8."""
    from PIL import Image

    height, width = ink.shape
    scale = 20 / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)).clip(0, None)
    small = small / small.max()
    mass = small.sum()
    top = round(14 - (small.sum(axis=1) @ np.arange(len(small))) / mass)
    left = round(14 - (small.sum(axis=0) @ np.arange(len(small[0]))) / mass)
    top, left = min(max(top, 0), 28 - size[1]), min(max(left, 0), 28 - size[0])
    canvas = np.zeros((28, 28), dtype=np.float32)
    canvas[top : top + size[1], left : left + size[0]] = small
    return (canvas * 255).round().astype(np.uint8)
