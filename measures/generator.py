"""What generated images look like beside real ones: FID, KID, neighbours and classes in the judge's features."""

import math
import warnings
from typing import Any

import torch
from tqdm import tqdm

from engine.errors import UserError
from measures.judge import Judge
from measures.parzen import parzen_measures

NEIGHBOURS = 5


def feature_distances(features: torch.Tensor, real_features: torch.Tensor) -> dict[str, float]:
    """Fréchet and kernel distance (FID, KID) between features [N, d] and [M, d]."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
    identity = torch.nn.Identity()
    identity.num_features = features.shape[1]
    fid = FrechetInceptionDistance(feature=identity)
    kid = KernelInceptionDistance(feature=identity, subset_size=min(1000, len(features), len(real_features)))
    torch.manual_seed(0)  # of KID's subsets
    for metric in (fid, kid):
        metric.update(real_features.double(), real=True)
        metric.update(features.double(), real=False)
    return {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}


def neighbour_measures(features: torch.Tensor, real_features: torch.Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Do the samples lie among the real images (precision, density), and do they reach all of them (recall, coverage)?

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), Naeem et al. 2020 (arXiv 2002.09797): an image's ball reaches to its
    k-th nearest neighbour in its own set. features: [N, d]; real_features: [M, d].
    """
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    fake, real = features.numpy(), real_features.numpy()
    fake_radius, real_radius = (
        NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors()[0][:, -1] for points in (fake, real)
    )
    around = torch.zeros(len(fake))  # in how many real balls each sample lies
    covered, recalled = [], []
    for distances in pairwise_distances_chunked(real, fake, working_memory=200):  # blocks of rows of [M, N], in order
        radius = real_radius[len(covered) : len(covered) + len(distances), None]
        around += torch.from_numpy((distances < radius).sum(0))
        covered.extend((distances < radius).any(1))
        recalled.extend((distances < fake_radius).any(1))
    return {
        "precision": (around > 0).float().mean().item(),
        "recall": sum(recalled) / len(recalled),
        "density": (around.mean() / k).item(),
        "coverage": sum(covered) / len(covered),
    }


def class_measures(labels: torch.Tensor, classes: int = 10) -> dict[str, Any]:
    """The share of each class in `labels` [N], and the Kullback-Leibler divergence from equal shares, in nats."""
    shares = labels.bincount(minlength=classes) / len(labels)
    return {"class_histogram": shares.tolist(), "class_kl": (math.log(classes) + shares.xlogy(shares).sum()).item()}


def measure_images(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    judge: Judge,
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    classes: int = 10,
) -> dict[str, Any]:
    """All measures of generated or real images [N, 1, 28, 28] with pixels in [0, 1].

    labels: the classes they should show, or None. reference: validation images, test images, and test labels. What the
    judge reads is compared with the classes only if there are ten of them, as of digits. Raises UserError if there are
    too few images.
    """
    validation_images, test_images, test_labels = reference
    conditional = labels is not None and classes == 10
    counts = [len(images), len(test_images)]
    if conditional:
        counts += [*labels.bincount(minlength=10).tolist(), *test_labels.bincount(minlength=10).tolist()]
    if min(counts) <= NEIGHBOURS:
        remedy = f"it takes more than {NEIGHBOURS} of each class in each part"
        raise UserError(f"{min(counts)} images are too few to measure a generator by; {remedy}")
    features, digits = judge.read(images)
    test_features, _ = judge.read(test_images)
    parts = {
        "Parzen": lambda: parzen_measures(images, validation_images, test_images),
        "FID, KID": lambda: feature_distances(features, test_features),
        "neighbours": lambda: neighbour_measures(features, test_features),
    }
    measures: dict[str, Any] = {"images": len(images)}
    with tqdm(parts.items(), leave=False, disable=None) as bar:  # None: in a terminal only
        for name, measure in bar:
            bar.set_description(f"{name} of {len(images)} images")
            measures.update(measure())
    if classes == 10:
        measures.update(class_measures(digits))
    if conditional:
        measures["conditional_accuracy"] = (digits == labels).double().mean().item()
        measures["class_coverage"] = [
            neighbour_measures(features[labels == digit], test_features[test_labels == digit])["coverage"]
            for digit in range(10)
        ]
    return measures


def print_measures(measures: dict[str, Any], real: dict[str, Any]) -> None:
    """Each measure of the samples beside that of real images."""
    print(f"{'':24}{'samples':>10}{'real':>10}   ({measures['images']} samples, {real['images']} real training images)")
    for name, value in measures.items():
        if name not in real:
            continue
        if isinstance(value, float):
            print(f"{name:24}{value:10.4g}{real[name]:10.4g}")
        elif isinstance(value, list):
            for digit in range(10):
                print(f"{f'{name} of {digit}':24}{value[digit]:10.4g}{real[name][digit]:10.4g}")


def nearest_images(samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The nearest of `images`, uint8 [M, 1, H, W], to each sample [N, 1, H, W]: do the samples copy any of them?"""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(images.flatten(1).numpy() / 255)
    return images[nearest.kneighbors(samples.flatten(1).numpy(), return_distance=False)[:, 0]] / 255
