"""Picture files of any size, format and mode."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.mnist import DataError

if TYPE_CHECKING:  # Pillow takes a while to import
    from PIL import Image

MOST_PIXELS = 100_000_000
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of all that Pillow knows, some start other programs


def open_picture(picture: "str | Path | Image.Image", side: int) -> "Image.Image":
    """A file or a picture (PIL) in colour (RGB), upright, and reduced to at most `side` pixels in width and height.

    Transparent parts are white, or black if what is drawn on them is light. Raises DataError.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is our own
    if isinstance(picture, Image.Image):
        return in_colour(picture, side)
    name = picture if str(picture).isprintable() else repr(str(picture))
    if not Path(picture).is_file():
        raise DataError(f"{name} is not a file; name a picture, such as a PNG or JPEG")
    try:
        with Image.open(picture, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height}"
                raise DataError(f"{name} has {size} pixels; make it smaller than 100 megapixels, or remove it")
            image.draft("RGB", (side, side))  # a JPEG is reduced while it is decoded
            return in_colour(image, side)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of many kinds: each format has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "save it as PNG or JPEG, or remove it"
        raise DataError(f"{name} cannot be read as a picture ({reason}); {remedy}") from error


def in_colour(image: "Image.Image", side: int) -> "Image.Image":
    import numpy as np
    from PIL import Image, ImageOps

    if image.mode[0] in "IF":  # 16 bits and more: the range is the file's own
        deep = np.asarray(image, dtype=np.float32)
        deep = (deep - deep.min()) / max(np.ptp(deep), 1) * 255
        image = Image.fromarray(deep.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        drawn = np.asarray(image.convert("L"))[np.asarray(image.getchannel("A")) > 127]
        paper = "black" if drawn.size and drawn.mean() > 127 else "white"
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = min(1, side / max(upright.size))
    size = [max(1, round(length * scale)) for length in upright.size]
    return upright.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
