"""MNIST and its same-shaped relatives, by name."""

from datasets.augment import distort
from datasets.batches import Batches
from datasets.digits import load_digits
from datasets.mnist import FOLDERS, DataError, load_mnist
from datasets.photo import read_photo

__all__ = ["DATASETS", "Batches", "DataError", "distort", "load", "read_photo"]

DATASETS = (*FOLDERS, "digits")


def load(name, data_dir, train=True):
    """Training or test part of a data set: uint8 images [N, 1, 28, 28], int64 labels [N]. Raises DataError."""
    return load_digits(train) if name == "digits" else load_mnist(name, data_dir, train)
