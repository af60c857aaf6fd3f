"""Image files of any size, format and mode."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import DataError

if TYPE_CHECKING:  # Pillow takes a while to import
    from PIL import Image

MOST_PIXELS = 100_000_000
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow starts other programs to read some of the rest


def open_image(image: "str | Path | Image.Image", side: int) -> "Image.Image":
    """A file or a PIL image in colour (RGB), upright, and reduced to at most `side` pixels in width and height.

    Transparent parts become white, or black if what is drawn on them is light. Raises DataError.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", module="PIL")  # about damaged EXIF, or about sizes below our own limit
    name = "the picture" if isinstance(image, Image.Image) else image
    try:
        if isinstance(image, Image.Image):
            return in_colour(image, side)
        if not Path(image).is_file():
            raise DataError(f"{name} is not a file; give the path of an image, such as a PNG or JPEG")
        with Image.open(image, formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                size = f"{file.width} x {file.height}"
                raise DataError(f"{name} has {size} pixels; shrink it below 100 megapixels, or remove it")
            file.draft("RGB", (side, side))  # a JPEG is reduced while it is decoded
            return in_colour(file, side)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{name} cannot be read; allow reading it, or remove it") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels; shrink it below 100 megapixels, or remove it") from error
    except Exception as error:  # each format raises its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "save it as PNG or JPEG, or remove it"
        raise DataError(f"{name} cannot be read as an image ({reason}); {remedy}") from error


def in_colour(image: "Image.Image", side: int) -> "Image.Image":
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits and more: stretched from the darkest to the brightest pixel
        deep = np.asarray(image, dtype=np.float32)
        if not np.isfinite(deep).all():
            raise ValueError("not all of its pixels are finite")
        deep = (deep - deep.min()) / (np.ptp(deep) or 1) * 255
        image = Image.fromarray(deep.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        drawn = np.asarray(image.convert("L"))[np.asarray(image.getchannel("A")) > 127]
        paper = "black" if drawn.size and drawn.mean() > 127 else "white"
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    scale = min(1, side / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
