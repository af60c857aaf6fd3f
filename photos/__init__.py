"""From a picture to the 28x28 pixels that the networks read: image files, photos of handwritten digits, arrays."""

from photos.digits import read_photo, to_pixels
from photos.files import open_image

__all__ = ["open_image", "read_photo", "to_pixels"]
