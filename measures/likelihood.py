"""Generative models with a likelihood: nats per image, and the one picture of each that shows what it is."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:  # matplotlib takes a while to import
    from matplotlib.figure import Figure


def likelihood_measures(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """Mean log-likelihood in nats of binarised images [N, 1, 28, 28] with its standard error over the images, its kind,
    and for an RBM the partition function that it rests on, estimated from below and from above.
    """
    measures, options = {"kind": model.likelihood}, {}
    if hasattr(model, "log_partition"):
        print("estimating log Z by annealed importance sampling, which takes minutes", flush=True)
        generator = torch.Generator(images.device).manual_seed(0)
        (forward, forward_error), (reverse, reverse_error) = model.log_partition(generator=generator)
        measures.update(log_z=forward, log_z_error=forward_error, log_z_reverse=reverse)
        measures.update(log_z_reverse_error=reverse_error)
        options["log_z"] = forward
    parts = tqdm(images.split(500), desc="log-likelihood", leave=False, disable=None)  # None: in a terminal only
    scores = torch.cat([model.log_likelihood(part, **options) for part in parts])
    measures["log_likelihood"] = scores.mean().item()
    measures["log_likelihood_error"] = (scores.std() / len(scores) ** 0.5).item()
    if options:  # AIS from below makes Z too small and the likelihood too high; the reverse errs the other way
        measures["log_likelihood_reverse"] = measures["log_likelihood"] + forward - reverse
    return measures


def print_likelihood(measures: dict[str, Any]) -> None:
    value, error = measures["log_likelihood"], measures["log_likelihood_error"]
    print(f"log-likelihood of the binarised test images: {value:.2f} ± {error:.2f} nats ({measures['kind']})")
    if "log_z" in measures:
        print(
            f"log Z {measures['log_z']:.2f} ± {measures['log_z_error']:.2f} by AIS, "
            f"{measures['log_z_reverse']:.2f} ± {measures['log_z_reverse_error']:.2f} by reverse AIS, "
            f"with which the log-likelihood is {measures['log_likelihood_reverse']:.2f} nats"
        )


@torch.no_grad()
def draw_pictures(model: nn.Module, images: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Name -> images [N, 1, 28, 28] for a grid of ten columns. images: binarised test images, at least 10.

    VAE: reconstructions, and a walk through the latent space. RBM: reconstructions, and Gibbs chains that start at the
    images. RNN: completions of the upper half. HMM: the row that each state draws, and what the best path writes.
    """
    ten = images[:10]
    pictures = {}
    if hasattr(model, "reconstruct"):
        parts = [torch.cat([part, model.reconstruct(part)]) for part in images[:50].split(10)]
        pictures["reconstructions"] = torch.cat(parts)  # rows of images, each above its reconstruction
    if hasattr(model, "decode"):
        starts, ends = torch.randn(20, model.latent, device=images.device, generator=generator).chunk(2)
        steps = torch.linspace(0, 1, 10, device=images.device).view(1, 10, 1)
        pictures["latent_walk"] = model.decode(starts[:, None].lerp(ends[:, None], steps).flatten(0, 1))
    if hasattr(model, "gibbs"):
        rows, v = [ten], ten.flatten(1)
        for steps in (1, 1, 3, 5, 10, 30, 50, 100, 300, 500):  # 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000 in all
            v = model.gibbs(v, steps, generator)
            rows.append(model.reconstruct(v.view_as(ten)))
        pictures["gibbs_chains"] = torch.cat(rows)
    if hasattr(model, "complete"):
        half = ten.clone()
        half[:, :, 14:] = 0
        pictures["completions"] = torch.cat([ten, half, *(model.complete(half, 14, generator) for _ in range(4))])
    if hasattr(model, "viterbi"):
        parts = [torch.cat([part, path_pixels(model, part)]) for part in images[:50].split(10)]
        pictures["paths"] = torch.cat(parts)  # rows of images, each above what its best path writes
    return pictures


def path_pixels(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The pixel probabilities of the states on each image's most probable path, [N, 1, 28, 28]."""
    return model.emission.sigmoid()[model.viterbi(images)].unsqueeze(1)


@torch.no_grad()
def draw_states(model: nn.Module, images: torch.Tensor) -> "Figure":
    """Which states wrote which rows: ten images of binarised [N, 1, 28, 28], each beside its path, one colour a state.

    A state's colour says in which row it is most often visited; its number is written beside it.
    """
    from matplotlib.figure import Figure

    paths = model.viterbi(images).cpu()  # [N, 28]
    rows = torch.arange(paths.shape[1])
    visits = torch.zeros(len(model.initial), paths.shape[1])
    for row in rows:
        visits[:, row] += paths[:, row].bincount(minlength=len(visits))
    usual = (visits * rows).sum(1) / visits.sum(1).clamp(min=1)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle("images, and the states that wrote their rows; the colour says where a state is usually visited")
    for place in range(min(10, len(images))):
        axis = figure.add_subplot(2, 5, place + 1)
        axis.imshow(images[place, 0].cpu().numpy(), cmap="gray", extent=(0, 28, 28, 0))
        strip = usual[paths[place]].view(-1, 1)
        axis.imshow(strip.numpy(), cmap="turbo", vmin=0, vmax=27, extent=(29, 37, 28, 0))
        for row, state in enumerate(paths[place].tolist()):
            axis.text(33, row + 0.5, str(state), fontsize=5, ha="center", va="center")
        axis.set(xlim=(0, 37), ylim=(28, 0))
        axis.axis("off")
    return figure
