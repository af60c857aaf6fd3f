"""Random distortions of whole batches, on whatever device they are."""

import math

import torch
import torch.nn.functional as F


def distort(images, degrees=10.0, scale=0.1, shear=10.0, shift=2.0):
    """Each image [N, 1, H, W] under a random affine map of its own; same shape.

    degrees, shear: largest rotation and shear, in degrees. scale: largest relative change of width and of height.
    shift: largest translation, in pixels.
    """
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for coordinates
        grid = random_grid(images, degrees, scale, shear, shift)
        # Within the centres of the border pixels, so that the border, the background, repeats: padding_mode="border",
        # which not every device has.
        height, width = images.shape[2:]
        x, y = grid.unbind(-1)
        x, y = x.clamp(1 / width - 1, 1 - 1 / width), y.clamp(1 / height - 1, 1 - 1 / height)
        return F.grid_sample(images, torch.stack([x, y], dim=-1), align_corners=False)


def random_grid(images, degrees, scale, shear, shift):
    """Where each pixel of the result is taken from: x and y in [-1, 1], [N, H, W, 2]."""
    n, _, height, width = images.shape

    def uniform(limit):
        return torch.empty(n, device=images.device).uniform_(-limit, limit)

    angle = uniform(math.radians(degrees))
    slant = uniform(math.tan(math.radians(shear)))
    stretch_x, stretch_y = 1 + uniform(scale), 1 + uniform(scale)
    cos, sin = angle.cos(), angle.sin()
    # grid_sample's coordinates run from -1 to 1, so one pixel is 2 / side.
    row_x = torch.stack([cos * stretch_x, (slant * cos - sin) * stretch_y, uniform(shift * 2 / width)], dim=1)
    row_y = torch.stack([sin * stretch_x, (slant * sin + cos) * stretch_y, uniform(shift * 2 / height)], dim=1)
    return F.affine_grid(torch.stack([row_x, row_y], dim=1), images.shape, align_corners=False)
