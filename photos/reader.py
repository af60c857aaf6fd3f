"""Read the digits in a photo: many readings are proposed, and two networks decide between them.

Over-segmentation and recognition together, as in Matan et al., Multi-digit recognition using a space displacement
neural network, 1991: pieces of ink are joined with their neighbours in every way, and the path is taken whose images
look most like digits.
"""

import io
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import DataError
from engine.provenance import pinned
from photos.files import open_image

if TYPE_CHECKING:  # Pillow takes a while to import
    from PIL import Image

    from photos.pieces import Row

WEIGHTS = Path(__file__).parent.parent / "weights" / "reader.npz"
Classify = Callable[[Tensor], Tensor]  # images [N, 1, 28, 28] with pixels from 0 to 1 -> probabilities [N, 10]
SHA256 = "a494d64218f8ed90a9ff9a9973d04137843d73556f2d65660d7b34c6fd97d206"
AREA, LEAST = 360_000, 200  # larger pictures are reduced to this many pixels, smaller ones enlarged to this side
SHARPNESS = 3  # how fast a reading's weight falls with its score
# A number is sure if its length has more than SURE of the weight, each of its digits has more than SURE of the
# probability, and its score is above WEAK.
SURE, WEAK = 0.65, -0.8
NOTHING = -4.0  # score of what cannot be digits
NO_DIGIT = 0.6  # frequency of images of no digit, or of several, relative to the reader's training


class Network(nn.Sequential):
    """Images [N, 1, 28, 28] with pixels from 0 to 1 in, logits of the ten digits and of "no digit" out, [N, 11]."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 11))


@cache
def load_network() -> Network:
    """The network of weights/reader.npz. Raises UserError if it is missing or not the pinned file."""
    with torch.random.fork_rng([]):
        network = Network()
    arrays = np.load(io.BytesIO(pinned(WEIGHTS, SHA256)))
    network.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
    return network.eval()


class Reading(NamedTuple):
    """What a picture may show."""

    images: Tensor  # of each digit, from left to right: uint8 [N, 1, 28, 28], white on black
    probabilities: Tensor  # of each class, not normalised: [N, classes]
    sure: bool = True  # False if a number of another length is as likely, or this one is weak
    score: float = 0.0  # mean log p of the digits, minus the penalties
    several: bool = False  # whether there are other rows

    def answer(self) -> tuple[list[int], bool]:
        """The most likely classes, and whether they are sure."""
        fraction, classes = (self.probabilities / self.probabilities.sum(1, keepdim=True)).max(1)
        return classes.tolist(), self.sure and fraction.min().item() > SURE


def read(photo: "str | Path | Image.Image", classify: Classify | None = None) -> Reading:
    """The digits in a row in a photo or drawing, dark on light or light on dark.

    Each becomes an image as in MNIST (yann.lecun.com/exdb/mnist): fitted into 20x20 pixels, its centre of mass at the
    centre of 28x28. classify: a classifier of digits, which then decides together with the reader's own network. Raises
    DataError, also if nothing is found, or several rows.
    """
    name = photo if isinstance(photo, str | Path) else "the picture"
    image = open_image(photo, 1600)
    scale = max(min(1, (AREA / (image.width * image.height)) ** 0.5), LEAST / max(image.size))
    size = [max(1, round(scale * length)) for length in image.size]
    readings = find_readings(np.asarray(image.resize(size).convert("L"), dtype=np.float32), classify)
    if not readings:
        raise DataError(f"{name} shows no digit; photograph one digit, or a row of them, on a plain background")
    best = decide(readings)
    if best.several:
        raise DataError(f"{name} shows several rows; crop it to one row of digits")
    return best


@torch.no_grad()
def find_readings(grey: np.ndarray, classify: Classify | None) -> list[Reading]:
    """A reading for each proposed mask of a picture [H, W], if it may be digits."""
    from photos.ink import propose  # SciPy takes a while to import
    from photos.pieces import read_row

    rows = [(row, cost) for mask, cost in propose(grey) if (row := read_row(mask))]
    if not rows:
        return []
    images = torch.from_numpy(np.stack([image for row, _ in rows for image in row.images])).unsqueeze(1)
    logits = load_network()(images / 255) + torch.tensor([0.0] * 10 + [math.log(NO_DIGIT)])
    own = logits.log_softmax(1)[:, :10]  # log p that an image shows this digit, and nothing else
    other = classify(images / 255).log() if classify else torch.zeros_like(own)
    scores = (own + other / 2).clamp(min=-7).amax(1)  # the reader alone knows what is no digit
    readings, counts = [], [len(row.images) for row, _ in rows]
    parts = (tensor.split(counts) for tensor in (images, scores, (own + other).exp()))
    for (row, cost), seen, logs, probabilities in zip(rows, *parts):
        score, path = best_path(row, logs.tolist())
        if score - cost > NOTHING:
            readings.append(Reading(seen[path], probabilities[path], score=score - cost, several=row.several))
    return readings


def decide(readings: list[Reading]) -> Reading:
    """The best reading of the most likely length, with the mean probabilities of all readings of this length.

    Their weights add up: a reading that several thresholds agree on is more reliable.
    """
    groups: dict[int, list[Reading]] = {}  # by the number of digits; 0: several rows
    for reading in readings:
        groups.setdefault(0 if reading.several else len(reading.images), []).append(reading)
    weights = {length: sum(map(weight, own)) for length, own in groups.items()}
    length = max(weights, key=weights.__getitem__)
    best = max(groups[length], key=lambda reading: reading.score)
    if best.several:
        return best
    probabilities = torch.stack([weight(reading) * reading.probabilities for reading in groups[length]]).sum(0)
    sure = best.score > WEAK and weights[length] > SURE * sum(weights.values())
    return best._replace(probabilities=probabilities / weights[length], sure=sure)


def weight(reading: Reading) -> float:
    return math.exp(SHARPNESS * reading.score)


def best_path(row: "Row", logs: list[float]) -> tuple[float, list[int]]:
    """The score and the numbers of the images that explain a row best, by dynamic programming over its pieces.

    logs: for each image, the log p of its most likely digit.
    """
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end, skip in enumerate(row.skips, 1):
        options = [(best[-1][0] - skip, best[-1][1])]
        for k, (i, j) in enumerate(row.spans):
            if j == end:
                options.append((best[i][0] + logs[k] - row.costs[k], [*best[i][1], k]))
        best.append(max(options))
    score, path = best[-1]
    return (score - row.elsewhere) / len(path) if path else NOTHING, path
