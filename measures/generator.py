"""Generated images compared with real ones: FID, KID, neighbours and classes, by the reference classifier."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import UserError
from measures.parzen import parzen_measures
from measures.reference import ReferenceClassifier

NEIGHBOURS = 5


def feature_distances(features: Tensor, real_features: Tensor) -> dict[str, float]:
    """Fréchet and kernel distance (FID, KID) between features [N, d] and [M, d]."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
    identity: Any = torch.nn.Identity()
    identity.num_features = features.shape[1]
    fid = FrechetInceptionDistance(feature=identity)
    kid = KernelInceptionDistance(feature=identity, subset_size=min(1000, len(features), len(real_features)))
    torch.manual_seed(0)  # of KID's subsets
    for metric in (fid, kid):
        metric.update(real_features.double(), real=True)
        metric.update(features.double(), real=False)
    return {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}


def neighbour_measures(features: Tensor, real_features: Tensor) -> dict[str, float]:
    """Do samples lie among the real images (precision, density), and do they reach all of them (recall, coverage)?

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), Naeem et al. 2020 (arXiv 2002.09797): an image's ball reaches to its
    k-th nearest neighbour in its own set. features: [N, d]; real_features: [M, d].
    """
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors

    fake, real = features.numpy(), real_features.numpy()
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute")
    fake_radius, real_radius = (nearest.fit(points).kneighbors()[0][:, -1] for points in (fake, real))
    distances = pairwise_distances(real, fake)  # [M, N]: 400 MB for 10,000 images each
    inside = distances < real_radius[:, None]  # whether a real ball holds a sample
    return {
        "precision": inside.any(0).mean().item(),
        "recall": (distances < fake_radius).any(1).mean().item(),
        "density": inside.sum().item() / (NEIGHBOURS * len(fake)),
        "coverage": inside.any(1).mean().item(),
    }


def class_measures(labels: Tensor) -> dict[str, Any]:
    """The fraction of each class in `labels` [N], and the Kullback-Leibler divergence from equal ones, in nats."""
    fractions = labels.bincount(minlength=10) / len(labels)
    divergence = math.log(10) + fractions.xlogy(fractions).sum()
    return {"class_histogram": fractions.tolist(), "class_kl": divergence.item()}


def measure_images(
    images: Tensor,
    labels: Tensor | None,
    classifier: ReferenceClassifier,
    reference: tuple[Tensor, Tensor, Tensor],
    of_digits: bool = True,
) -> dict[str, Any]:
    """All measures of generated or real images [N, 1, 28, 28] with pixels in [0, 1].

    labels: the classes they should show, or None; only compared with the predictions `of_digits`.
    reference: validation images, test images, and test labels.
    """
    validation_images, test_images, test_labels = reference
    features, digits = classifier.read(images)
    test_features, _ = classifier.read(test_images)
    parts = {
        "Parzen": lambda: parzen_measures(images, validation_images, test_images),
        "FID, KID": lambda: feature_distances(features, test_features),
        "neighbours": lambda: neighbour_measures(features, test_features),
    }
    measures: dict[str, Any] = {"images": len(images)}
    for measure in tqdm(parts.values(), ", ".join(parts), leave=False, disable=None):  # None: in a terminal only
        measures.update(measure())
    if of_digits:
        measures.update(class_measures(digits))
    if of_digits and labels is not None:
        measures["conditional_accuracy"] = (digits == labels).double().mean().item()
        if min(part.bincount(minlength=10).min() for part in (labels, test_labels)) > NEIGHBOURS:
            measures["class_coverage"] = [
                neighbour_measures(features[labels == digit], test_features[test_labels == digit])["coverage"]
                for digit in range(10)
            ]
    return measures


def require_enough(train_images: Tensor, test_images: Tensor) -> None:
    """Raise UserError if there are too few real images for `beside_real_images`."""
    for part, count in {"training": len(train_images) * 5 // 6, "test": len(test_images)}.items():
        if count <= NEIGHBOURS:
            raise UserError(f"{count} {part} images are too few to measure a generator; add images")


def beside_real_images(
    samples: Tensor,
    labels: Tensor | None,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    classifier: ReferenceClassifier,
    of_digits: bool = True,
) -> dict[str, Any]:
    """`measure_images` of samples, and, as `real`, of up to 10,000 training images. The sets: uint8 images, and labels.

    Validation images, which choose Parzen's sigma, are the first 1,000 of the last sixth of the training images, as in
    Goodfellow et al. 2014: the last 10,000 of MNIST's 60,000. The real images come from the others. At most
    10,000 test images are used.
    """
    (train_images, train_labels), (test_images, test_labels) = train_set, (part[:10_000] for part in test_set)
    cut = len(train_images) * 5 // 6
    reference = train_images[cut:][:1000] / 255, test_images / 255, test_labels
    measures = measure_images(samples, labels, classifier, reference, of_digits)
    real_labels = None if labels is None else train_labels[:cut][:10_000]
    measures["real"] = measure_images(train_images[:cut][:10_000] / 255, real_labels, classifier, reference, of_digits)
    return measures


def print_measures(measures: dict[str, Any]) -> None:
    """Each measure of the samples beside that of real images."""
    real = measures["real"]
    print(f"{'':24}{'samples':>10}{'real':>10}   ({measures['images']} samples, {real['images']} real training images)")
    for name, value in measures.items():
        if name not in real:
            continue
        if isinstance(value, float):
            print(f"{name:24}{value:10.4g}{real[name]:10.4g}")
        elif isinstance(value, list):
            for digit in range(10):
                print(f"{f'{name} of {digit}':24}{value[digit]:10.4g}{real[name][digit]:10.4g}")


def nearest_images(samples: Tensor, images: Tensor) -> Tensor:
    """The nearest of `images`, uint8 [M, 1, H, W], to each sample [N, 1, H, W]: do the samples copy any of them?"""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit((images.flatten(1) / 255).numpy())
    return images[nearest.kneighbors(samples.flatten(1).numpy(), return_distance=False)[:, 0]] / 255
