"""Random distortions of whole batches, on whatever device they are."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distort(
    images: Tensor,
    degrees: float = 10.0,
    scale: float = 0.1,
    shear: float = 10.0,
    shift: float = 2.0,
    elastic: float = 0.0,
) -> Tensor:
    """Distort images [N, C, H, W], each by a random affine map and an elastic distortion of its own; same shape.

    degrees, shear: largest rotation and shear, in degrees. scale: largest relative change of width and of height.
    shift: largest translation, in pixels. elastic: largest displacement of the points of a 5x5 grid, in pixels,
    interpolated linearly between them (in place of the smoothed noise of Simard et al. 2003).
    Not torchvision's RandomAffine and ElasticTransform, which choose one map per batch.
    """
    n, _, height, width = images.shape

    def uniform(limit: float, *shape: int) -> Tensor:
        return torch.empty(n, *(shape or (1, 1)), device=images.device).uniform_(-limit, limit)

    def centres(side: int) -> Tensor:
        return torch.linspace(-1, 1, side, device=images.device) * (side - 1) / side

    angle = uniform(math.radians(degrees))
    slant = uniform(math.tan(math.radians(shear)))
    stretch_x, stretch_y = 1 + uniform(scale), 1 + uniform(scale)
    cos, sin = angle.cos(), angle.sin()
    # Where each pixel comes from, x and y [N, H, W]. Coordinates run from -1 to 1, so one pixel is 2 / side.
    # Multiplied out instead of F.affine_grid, whose matrix product loses digits in TF32.
    x, y = centres(width).view(1, 1, -1), centres(height).view(1, -1, 1)
    from_x = cos * stretch_x * x + (slant * cos - sin) * stretch_y * y + uniform(shift * 2 / width)
    from_y = sin * stretch_x * x + (slant * sin + cos) * stretch_y * y + uniform(shift * 2 / height)
    if elastic:
        bent = F.interpolate(uniform(elastic, 2, 5, 5), (height, width), mode="bilinear", align_corners=True)
        from_x, from_y = from_x + bent[:, 0] * 2 / width, from_y + bent[:, 1] * 2 / height
    # Clamped to the centres of the edge pixels, so that these are replicated: padding_mode="border", which not every
    # device has.
    clamped = [origin.clamp(1 / side - 1, 1 - 1 / side) for origin, side in ((from_x, width), (from_y, height))]
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for coordinates
        return F.grid_sample(images, torch.stack(clamped, dim=-1), align_corners=False)
