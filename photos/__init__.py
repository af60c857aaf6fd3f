"""From a picture to the 28x28 pixels that the networks read: image files, photos of handwritten digits, arrays."""

from photos.arrays import to_pixels as to_pixels
from photos.files import open_image as open_image
from photos.reader import Reading as Reading
from photos.reader import read as read
