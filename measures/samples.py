"""Samples of a trained generative model, from random numbers that training never uses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

# Plus --seed, which is smaller: training never uses the noise that is scored. A generator on the CPU uses only the low
# 32 bits of its seed.
NOISE_SEED = 2**31


def device_of(network: torch.nn.Module) -> torch.device:
    return next(network.parameters()).device


def is_conditional(network: Any) -> bool:
    return getattr(network, "conditional", False)


def watched_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """For samples that a training shows: other random numbers than those of its weights, which begin with `seed`."""
    return torch.Generator(device).manual_seed(NOISE_SEED - 1 - seed)


def latent_noise(network: Any, n: int, seed: int) -> Tensor:
    """Noise z [n, d] of a latent model, the same on every device."""
    return network.noise(n, torch.Generator().manual_seed(NOISE_SEED + seed), "cpu")


@torch.no_grad()
def decode(network: Any, *inputs: Tensor) -> Tensor:
    """Images [N, 1, 28, 28] on the CPU, from noise z [N, d] and, for a conditional generator, labels [N]."""
    device = device_of(network)
    blocks = zip(*(tensor.split(1000) for tensor in inputs))
    return torch.cat([network.decode(*(part.to(device) for part in block)).cpu() for block in blocks])


@torch.no_grad()
def sample_images(network: Any, labels: Tensor, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """An image for each label [N], on the CPU; the labels and the noise, or None for those that the model lacks."""
    if not hasattr(network, "decode"):
        device = device_of(network)
        generator = torch.Generator(device).manual_seed(NOISE_SEED + seed)
        parts = tqdm(labels.split(1000), desc="samples", leave=False, disable=None)  # None: in a terminal only
        return torch.cat([network.sample(len(part), generator).cpu() for part in parts]), None, None
    z = latent_noise(network, len(labels), seed)
    if is_conditional(network):
        return decode(network, z, labels), labels, z
    return decode(network, z), None, z


def walks(network: Any, seed: int, digits: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Name -> images [rows, columns, 1, 28, 28] of a latent model; {} of any other.

    interpolation: ten points on each straight line through z. A conditional generator gets a line for each class, or
    ten lines of those with the numbers `digits`. same_noise: a row for each of ten z, a column for each class.
    """
    if not hasattr(network, "decode"):
        return {}
    conditional = is_conditional(network)
    lines = network.classes if conditional and not digits else 10
    starts, ends = latent_noise(network, 2 * lines, seed).chunk(2)
    z = starts[:, None].lerp(ends[:, None], torch.linspace(0, 1, 10).view(1, 10, 1)).flatten(0, 1)
    if not conditional:
        return {"interpolation": decode(network, z).unflatten(0, (10, 10))}
    of_lines = spread(lines, digits or range(network.classes))
    grids = {"interpolation": decode(network, z, of_lines.repeat_interleave(10)).unflatten(0, (lines, 10))}
    if not digits:
        z = latent_noise(network, 10, seed).repeat_interleave(network.classes, dim=0)
        labels = torch.arange(network.classes).repeat(10)
        grids["same_noise"] = decode(network, z, labels).unflatten(0, (10, network.classes))
    return grids


def sample_between(network: Any, seed: int, other_seed: int, t: float, label: int = 0) -> Tensor:
    """One image [28, 28], from noise that lies `t` of the way from one seed's to the other's.

    label: for a conditional generator. A model without latent noise (RBM, RNN, HMM) samples from the first seed.
    """
    if not hasattr(network, "decode"):
        return sample_images(network, torch.zeros(1), seed)[0][0, 0]
    z = torch.lerp(latent_noise(network, 1, seed), latent_noise(network, 1, other_seed), t)
    labels = [torch.tensor([label])] if is_conditional(network) else []
    return decode(network, z, *labels)[0, 0]


def spread(n: int, numbers: Sequence[int]) -> Tensor:
    """n labels, equally many of each number, in order."""
    return torch.tensor(numbers)[torch.arange(n) * len(numbers) // n]
