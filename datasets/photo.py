"""A picture of a handwritten digit, made to look like MNIST's."""

from pathlib import Path

import numpy as np
import torch

from datasets.mnist import DataError

MOST_PIXELS = 100_000_000


def read_photo(path: str | Path) -> torch.Tensor:
    """Read a picture of one digit: any size and mode, dark on light or light on dark. Returns uint8 [1, 1, 28, 28].

    Prepared as MNIST was (yann.lecun.com/exdb/mnist): the ink is scaled to fit into 20x20 pixels, then its centre of
    mass is moved to the centre of 28x28. Raises DataError.
    """
    ink = find_ink(read_grey(path))
    if ink is None:
        raise DataError(f"{path} shows no digit: it is blank; take a picture of one digit on a plain background")
    return torch.from_numpy(centre(ink)).view(1, 1, 28, 28)


def read_grey(path: str | Path) -> np.ndarray:
    """Brightness of each pixel, float32 [H, W], 0 (black) to 255.

    Transparent parts are white, or black if the digit on them is light.
    """
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise DataError(f"{path} is not a file; name a picture, such as a PNG or JPEG")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels; make it smaller than 100 megapixels"
                )
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 bits and more: the range is the file's own
                deep = np.asarray(image, dtype=np.float32)
                return (deep - deep.min()) / max(np.ptp(deep), 1) * 255
            if image.has_transparency_data:
                image = image.convert("RGBA")
                drawn = np.asarray(image.convert("L"))[np.asarray(image.getchannel("A")) > 127]
                paper = "black" if drawn.size and drawn.mean() > 127 else "white"
                image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
            return np.asarray(image.convert("L"), dtype=np.float32)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}); save it as PNG or JPEG") from error


def find_ink(grey: np.ndarray) -> np.ndarray | None:
    """The ink in each pixel, from 0 (background) to 1, cropped to the part that holds any; None if blank."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    paper = np.median(border)
    darker, lighter = paper - grey.min(), grey.max() - paper
    if max(darker, lighter) < 16:
        return None
    ink = (paper - grey) / darker if darker > lighter else (grey - paper) / lighter
    ink = ((ink - 0.2) / 0.6).clip(0, 1)  # shadows and paper grain count as 0, a full stroke as 1
    rows, columns = ink.any(axis=1).nonzero()[0], ink.any(axis=0).nonzero()[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def centre(ink: np.ndarray) -> np.ndarray:
    """Fit `ink` [H, W] into 20x20 and put its centre of mass at the centre of 28x28, uint8."""
    from PIL import Image

    height, width = ink.shape
    scale = 20 / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)).clip(0, None)
    small = small / small.max()
    mass = small.sum()
    top = round(13.5 - (small.sum(axis=1) @ np.arange(len(small))) / mass)
    left = round(13.5 - (small.sum(axis=0) @ np.arange(len(small[0]))) / mass)
    top, left = min(max(top, 0), 28 - size[1]), min(max(left, 0), 28 - size[0])
    canvas = np.zeros((28, 28), dtype=np.float32)
    canvas[top : top + size[1], left : left + size[0]] = small
    return (canvas * 255).round().astype(np.uint8)
