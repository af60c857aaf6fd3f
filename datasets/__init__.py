"""MNIST and its same-shaped relatives, by name."""

from datasets.augment import distort
from datasets.batches import Batches
from datasets.digits import load_digits
from datasets.mnist import FOLDERS, DataError, load_mnist
from datasets.photo import read_photo

__all__ = ["DATASETS", "SHOW_DIGITS", "Batches", "DataError", "distort", "hold_out", "load", "read_photo"]

DATASETS = (*FOLDERS, "digits")
SHOW_DIGITS = ("mnist", "digits")  # the judge of models/judge.py can read these


def load(name, data_dir, train=True):
    """Training or test part of a data set: uint8 images [N, 1, 28, 28], int64 labels [N]. Raises DataError."""
    return load_digits(train) if name == "digits" else load_mnist(name, data_dir, train)


def hold_out(images, labels, val_size):
    """(images, labels) to train on, and the last `val_size` (images, labels). Raises DataError where none are left."""
    cut = len(images) - val_size
    if cut <= 0:
        raise DataError(f"--val-size {val_size} leaves nothing of the {len(images)} images to train on")
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
