"""Gaussian Parzen windows: a density from samples (Breuleux et al. 2011; Goodfellow et al. 2014, section 5)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIGMAS = [10 ** (i / 9 - 1) for i in range(10)]  # among which the paper's protocol chooses


def parzen_log_likelihood(samples: Tensor, images: Tensor, sigmas: Sequence[float], block: int = 1000) -> Tensor:
    """Log-density of each image, in nats, under the mean of Gaussians of width sigma around the samples.

    log p(x) = log 1/n sum_i exp(-|x - s_i|^2 / (2 sigma^2)) - d/2 log(2 pi sigma^2)

    samples: [n, ...] and images: [m, ...] with pixels in [0, 1], flattened to d of them. sigmas: widths, in pixel
    values. Returns [len(sigmas), m] in double precision: TF32 is off by up to 2.7 nats. Needs memory for `block` times
    n distances.
    """
    device = "cpu" if samples.device.type == "mps" else samples.device  # MPS has no doubles
    samples = samples.to(device).flatten(1).double()
    n, d = samples.shape
    rows = []
    for part in images.flatten(1).split(block):
        squares = torch.cdist(part.to(device).double(), samples).square_()
        rows.append(torch.stack([(squares / (-2 * sigma**2)).logsumexp(1) for sigma in sigmas]))
    normalisers = [[math.log(n) + d / 2 * math.log(2 * math.pi * sigma**2)] for sigma in sigmas]
    return torch.cat(rows, dim=1) - rows[0].new_tensor(normalisers)


def parzen_measures(samples: Tensor, validation_images: Tensor, test_images: Tensor) -> dict[str, float]:
    """The protocol of Goodfellow et al. 2014: sigma is chosen on validation images, the test images are scored."""
    best = parzen_log_likelihood(samples, validation_images, SIGMAS).mean(1).argmax()
    scores = parzen_log_likelihood(samples, test_images, SIGMAS[best : best + 1])[0]
    return {
        "parzen_log_likelihood": scores.mean().item(),
        "parzen_standard_error": (scores.std() / len(scores) ** 0.5).item(),
        "parzen_sigma": SIGMAS[best],
    }
