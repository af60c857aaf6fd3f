"""Gaussian Parzen windows: a density from samples (Breuleux et al. 2011; Goodfellow et al. 2014, section 5)."""

import math

import torch

SIGMAS = [10 ** (i / 9 - 1) for i in range(10)]  # among which the paper's protocol chooses


def parzen_log_likelihood(samples, images, sigmas, block=1000):
    """Log-density of each image, in nats, under the mean of Gaussians of width sigma around the samples.

    log p(x) = log 1/n sum_i exp(-|x - s_i|^2 / (2 sigma^2)) - d/2 log(2 pi sigma^2)

    samples: [n, ...] and images: [m, ...] with pixels in [0, 1], flattened to d of them. sigmas: widths, in pixel
    values. Returns [len(sigmas), m]. Needs memory for a `block` of images times n distances at a time.
    """
    samples = samples.flatten(1)
    n, d = samples.shape
    rows = []
    for part in images.flatten(1).split(block):
        squares = torch.cdist(part, samples).square_()
        rows.append(torch.stack([(squares / (-2 * sigma**2)).logsumexp(1) for sigma in sigmas]))
    normalisers = [[math.log(n) + d / 2 * math.log(2 * math.pi * sigma**2)] for sigma in sigmas]
    return torch.cat(rows, dim=1) - rows[0].new_tensor(normalisers)
