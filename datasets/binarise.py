"""Binarised images, as the literature on likelihoods has them: each pixel is sampled from Bernoulli(grey value)."""

import torch

TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 0, 1, 2  # of the images that are sampled once


def binarise(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Sample each pixel of uint8 images once: white (255) with probability grey / 255, else black; same shape and type.

    For fixed binarisation and for test sets: the same seed gives the same images on every machine. Thresholding would
    be another, easier task (Salakhutdinov & Murray 2008, section 5, sample them).
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(part.shape, generator=generator) * 255 < part for part in images.cpu().split(1000)]
    return torch.cat(parts).to(torch.uint8) * 255
