"""Samples of a trained generative model, from random numbers that training never draws."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from models.gan import draw_noise

# Plus --seed, which is smaller: training never draws the noise that is scored. A generator on the CPU uses only the low
# 32 bits of its seed.
NOISE_SEED = 2**31


def evaluation_noise(n: int, options: dict[str, Any], seed: int) -> torch.Tensor:
    """Noise z [n, 100] for a GAN's generator. options: of its run."""
    return draw_noise(n, options["noise"], "cpu", torch.Generator().manual_seed(NOISE_SEED + seed))


@torch.no_grad()
def draw(network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Images [N, 1, 28, 28] on the CPU, from noise z [N, 100] and, for a conditional generator, labels [N]."""
    device = next(network.parameters()).device
    blocks = zip(*(tensor.split(1000) for tensor in inputs))
    return torch.cat([network(*(part.to(device) for part in block)).cpu() for block in blocks])


def draw_samples(
    network: nn.Module, labels: torch.Tensor, options: dict[str, Any], seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A sample for each label [N], images on the CPU, and the labels and the noise if the model uses them."""
    if options["script"] == "train_likelihood.py":
        device = next(network.parameters()).device
        generator = torch.Generator(device).manual_seed(NOISE_SEED + seed)
        parts = tqdm(labels.split(1000), desc="samples", leave=False, disable=None)  # None: in a terminal only
        return torch.cat([network.sample(len(part), generator).cpu() for part in parts]), None, None
    z = evaluation_noise(len(labels), options, seed)
    if options["script"] == "train_gan.py":
        return draw(network, z), None, z
    return draw(network, z, labels), labels, z


def draw_walks(
    network: nn.Module, options: dict[str, Any], seed: int, digits: Sequence[int] | None
) -> dict[str, torch.Tensor]:
    """Name -> images of a GAN [rows, columns, 1, 28, 28]: along straight lines through the noise, and z as all classes.

    interpolation: ten points on each line. A conditional generator draws a line for each class, or ten lines of those
    with the numbers `digits`. same_noise: a row for each of ten z, a column for each class. {} for other models.
    """
    if options["script"] == "train_likelihood.py":
        return {}
    conditional = options["script"] == "train_cgan.py"
    classes = network.classes if conditional else 10
    lines = 10 if digits else classes
    starts, ends = evaluation_noise(2 * lines, options, seed).chunk(2)
    steps = torch.linspace(0, 1, 10).view(1, 10, 1)
    z = starts[:, None].lerp(ends[:, None], steps).flatten(0, 1)
    if not conditional:
        return {"interpolation": draw(network, z).unflatten(0, (10, 10))}
    labels = torch.arange(classes)
    of_lines = torch.tensor(digits)[torch.arange(10) * len(digits) // 10] if digits else labels
    walks = {"interpolation": draw(network, z, of_lines.repeat_interleave(10)).unflatten(0, (lines, 10))}
    if not digits:
        z = evaluation_noise(10, options, seed).repeat_interleave(classes, dim=0)
        walks["same_noise"] = draw(network, z, labels.repeat(10)).unflatten(0, (10, classes))
    return walks


@torch.no_grad()
def draw_between(
    network: nn.Module, options: dict[str, Any], seed: int, other_seed: int, t: float, label: int = 0
) -> torch.Tensor:
    """One image [28, 28], from noise that lies `t` of the way from one seed's to the other's.

    label: of a conditional generator. An RBM, an RNN and an HMM have no such noise: they draw from the first seed.
    """
    if hasattr(network, "decode"):  # a VAE
        generators = (torch.Generator().manual_seed(NOISE_SEED + each) for each in (seed, other_seed))
        z = torch.lerp(*(torch.randn(1, network.latent, generator=generator) for generator in generators), t)
        return network.decode(z)[0, 0]
    if options["script"] == "train_likelihood.py":
        return draw_samples(network, torch.zeros(1), options, seed)[0][0, 0]
    z = torch.lerp(*(evaluation_noise(1, options, each) for each in (seed, other_seed)), t)
    return draw(network, z, *([torch.tensor([label])] if options["script"] == "train_cgan.py" else []))[0, 0]
