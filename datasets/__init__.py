"""Datasets: MNIST, Fashion-MNIST, KMNIST and scikit-learn's digits by name, or a folder of images."""

import argparse
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from datasets.augment import distort as distort
from datasets.batches import Batches as Batches
from datasets.binarise import binarise as binarise
from datasets.digits import load_digits
from datasets.folder import CLASS_FOLDERS, difference, folder_classes, load_folder
from datasets.mnist import FOLDERS, load_mnist
from engine.distributed import broadcast, rank_0_first
from engine.errors import DataError

DATASETS = (*FOLDERS, "digits")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLASSES = {"fashion-mnist": CLOTHES, "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")}
SHOW_DIGITS = ("mnist", "digits")  # the reference classifier can read these

Images = tuple[Tensor, Tensor]  # uint8 [N, 1, 28, 28], and int64 labels [N]


def load(name: str, data_dir: str, train: bool = True) -> Images:
    """Training or test part of a dataset. Raises DataError."""
    if name not in DATASETS:
        return load_folder(require_folder(name, data_dir), train)[:2]
    images, labels = load_digits(train) if name == "digits" else load_mnist(name, data_dir, train)
    if labels.min() < 0 or labels.max() > 9:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise DataError(f"the dataset {name} has {found}; they must be from 0 to 9")
    return images, labels


def load_test(name: str, data_dir: str, classes: list[str], read: Callable[[str], Tensor] | None = None) -> tuple:
    """The test images, their labels as numbers of `classes`, and their paths (built-in datasets: numbers).

    classes: those that the network knows. read: reads the files of a folder that it was not trained on. Such a folder
    may lack some classes. Raises DataError.
    """
    now = class_names(name, data_dir, None if read else classes)
    if read and (new := {*now} - {*classes}):
        listed = ", ".join(sorted(new)[:5])
        remedy = "use a network that was trained on them" if name in DATASETS else "remove them"
        raise DataError(f"{name} has classes that the network does not know ({listed}); {remedy}")
    numbers = torch.tensor([classes.index(each) for each in now] if read else range(len(now)))
    if name in DATASETS:
        images, labels = load(name, data_dir, train=False)
        return images, numbers[labels], range(len(images))
    images, labels, paths = load_folder(require_folder(name, data_dir), False, read)
    return images, numbers[labels], paths


def class_names(name: str, data_dir: str, before: list[str] | None = None) -> list[str]:
    """The names of a dataset's classes, in the order of their labels. Raises DataError.

    before: those that a run was trained on, or None. A folder must still have them: its labels are their numbers.
    """
    if name in DATASETS:
        if os.path.isdir(name) and not os.path.isdir(os.path.join(name, "raw")):
            print(f"{name} is the built-in dataset; for the folder of that name, use {os.path.join('.', name)}")
        return list(CLASSES.get(name, "0123456789"))
    names = folder_classes(require_folder(name, data_dir))
    if before and names != before:
        reason = f"{name} has other classes than the run was trained on ({difference(before, names)})"
        raise DataError(f"{reason}; restore them, or start a new run")
    return names


def require_folder(name: str, data_dir: str) -> Path:
    """The folder `name`; if it is not there, the one of that name in `data_dir`, to which it may have been moved."""
    path, elsewhere = (Path(os.path.expanduser(each)) for each in (name, data_dir))
    near = {each.replace("-", ""): each for each in DATASETS}.get(re.sub(r"[-_ ]", "", name.lower()))
    if near and ((path / "raw").is_dir() or not path.is_dir()):  # torchvision's own folder has no class folders
        raise DataError(f"there is no dataset {name}; did you mean {near}?")
    for place in (path, elsewhere / path.name):
        if place.is_dir():
            return place
    remedy = f"use one of {', '.join(DATASETS)}, or a folder that holds a folder of images for each class"
    raise DataError(f"there is no dataset {name}, neither here nor in {data_dir}; {remedy}")


def short_name(name: str) -> str:
    """The dataset in the name of a run folder: of a folder, its own name without what file names cannot have."""
    path = Path(os.path.expanduser(name)).resolve()
    return name if name in DATASETS else re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "folder"


def split(args: argparse.Namespace, at_least: int = 1) -> tuple[Images, Images]:
    """The training images and the validation split of --dataset, each with labels.

    Sets `args.classes` to the classes' names and, for a folder, `args.dataset_digest`. With several processes, rank 0
    downloads and the others read. Raises DataError, also for fewer than `at_least` classes, or if a resumed run was
    trained on other images.
    """
    before = {**vars(args)} if args.resume else {}
    args.classes = broadcast(lambda: class_names(args.dataset, args.data_dir, before.get("classes")))
    if len(args.classes) < at_least:
        raise DataError(f"{args.dataset} has one class, but {args.script} needs at least two; {CLASS_FOLDERS}")

    def read() -> Images:
        images, labels = load(args.dataset, args.data_dir)
        if args.dataset in DATASETS:  # built in; the digits' pixels depend on how the processor rounds
            return images, labels
        args.dataset_digest = digest(images, labels)
        if before.get("dataset_digest") not in (None, args.dataset_digest):
            remedy = f"restore them, or start a new run with --start-from {args.resume}"
            raise DataError(f"{args.dataset} has other training images than {args.resume} was trained on; {remedy}")
        return images, labels

    images, labels = rank_0_first(read)
    return hold_out(images, labels, args.val_size)


def digest(images: Tensor, labels: Tensor) -> str:
    """The SHA-256 of a part of a dataset, by which a run recognises its training images."""
    content = hashlib.sha256(images.contiguous().numpy().data)
    content.update(labels.contiguous().numpy().data)
    return content.hexdigest()


def hold_out(images: Tensor, labels: Tensor, val_size: int) -> tuple[Images, Images]:
    """The images to train on, and the last `val_size`, the validation split. Raises DataError if none are left."""
    cut = len(images) - val_size
    if cut <= 0:
        raise DataError(f"--val-size {val_size} leaves none of the {len(images)} images to train on; lower it")
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
