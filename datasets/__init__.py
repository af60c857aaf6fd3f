"""MNIST and its same-shaped relatives, by name."""

import torch

from datasets.augment import distort
from datasets.batches import Batches
from datasets.binarise import binarise
from datasets.digits import load_digits
from datasets.mnist import FOLDERS, DataError, load_mnist
from datasets.photo import read_photo

__all__ = [
    "CLASSES",
    "DATASETS",
    "SHOW_DIGITS",
    "Batches",
    "DataError",
    "binarise",
    "distort",
    "hold_out",
    "load",
    "read_photo",
]

DATASETS = (*FOLDERS, "digits")
CLASSES = 10
SHOW_DIGITS = ("mnist", "digits")  # the judge of measures/judge.py can read these

Images = tuple[torch.Tensor, torch.Tensor]  # uint8 [N, 1, 28, 28], and int64 labels [N]


def load(name: str, data_dir: str, train: bool = True) -> Images:
    """Training or test part of a data set. Raises DataError."""
    images, labels = load_digits(train) if name == "digits" else load_mnist(name, data_dir, train)
    if labels.min() < 0 or labels.max() >= CLASSES:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise DataError(f"the data set {name} has {found}; they must be from 0 to {CLASSES - 1}")
    return images, labels


def hold_out(images: torch.Tensor, labels: torch.Tensor, val_size: int) -> tuple[Images, Images]:
    """The images to train on, and the last `val_size`, the validation split. Raises DataError if none are left."""
    cut = len(images) - val_size
    if cut <= 0:
        raise DataError(f"--val-size {val_size} leaves none of the {len(images)} images to train on; lower it")
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
