"""Images of your own: a folder with a subfolder of images for each class, as torchvision's ImageFolder has it.

The networks see 28x28 grey pixels, so that is what every image becomes. docs/extending.md names what to edit for
larger images or for colour.
"""

import glob
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import DataError
from photos import open_image

SIDE, MODE = 28, "L"  # width and height in pixels; Pillow's name for grey. Colour is "RGB"
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}


def load_folder(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """The images of train/ or of test/. Without these folders, four fifths of each class, or the other fifth.

    Returns uint8 images [N, C, SIDE, SIDE] and int64 labels [N], in an order that mixes the classes and is always the
    same. Raises DataError.
    """
    paths, labels = zip(*list_images(folder, train))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = tqdm(pool.map(read_image, paths), f"reading {folder}", len(paths), leave=False, disable=None)
        images = [*read]  # with a bar in a terminal only
    what = f"{len(images)} {'training' if train else 'test'} images of {max(labels) + 1} classes"
    print(f"{folder}: {what}, each scaled to {SIDE}x{SIDE} {'grey ' * (MODE == 'L')}pixels", flush=True)
    return torch.cat(images), torch.tensor(labels)


def read_image(path: str | Path) -> Tensor:
    """An image of any size and mode as a network sees it: uint8 [1, C, SIDE, SIDE]. Raises DataError.

    The aspect ratio stays: an image that is not square gets margins as bright as its own border.
    """
    from PIL import Image

    image = open_image(path, 4 * SIDE).convert(MODE)
    width, height = (max(1, round(SIDE / max(image.size) * length)) for length in image.size)
    pixels = np.atleast_3d(np.asarray(image))  # [H, W, C]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = Image.new(MODE, (SIDE, SIDE), tuple(np.median(border, axis=0).astype(int).tolist()))
    small = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's filters are antialiased
    square.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return torch.tensor(np.atleast_3d(np.asarray(square))).permute(2, 0, 1).unsqueeze(0)


def find_folder(name: str, data_dir: str) -> Path | None:
    """The folder `name`; if it is not there, the one of that name in `data_dir`, to which it may have been moved."""
    return next((path for path in (Path(name), Path(data_dir) / Path(name).name) if path.is_dir()), None)


def folder_classes(folder: Path) -> list[str]:
    """The names of the classes: of the subfolders, sorted. Raises DataError."""
    train, test = (subfolders(part) for part in parts(folder))
    if len(train) < 2:
        remedy = "put the images of each class into a folder of their own"
        raise DataError(f"{parts(folder)[0]} has {len(train)} subfolders, but needs at least two; {remedy}")
    for name in train:
        if not name.isprintable():
            raise DataError(f"{folder} has a class with the name {name!r}; rename its folder")
    if train != test:
        reason = f"{folder / 'test'} does not have the same classes as train ({difference(train, test)})"
        raise DataError(f"{reason}; give both parts the same subfolders")
    return train


def difference(before: list[str], now: list[str]) -> str:
    """How two lists of classes differ, in words."""
    changes = {"missing": sorted({*before} - {*now}), "new": sorted({*now} - {*before})}
    lists = {word: ", ".join(names[:5]) + ", ..." * (len(names) > 5) for word, names in changes.items() if names}
    return "; ".join(f"{word}: {names}" for word, names in lists.items())


def parts(folder: Path) -> tuple[Path, Path]:
    """The folders of the training and of the test images: train/ and test/, or twice the folder itself."""
    names = subfolders(folder)
    if {"train", "test"} <= {*names}:
        return folder / "train", folder / "test"
    for name in names:
        if name.lower() in PARTS:
            raise DataError(f"{folder} has a folder {name}, but not both train and test; rename its parts to these")
    return folder, folder


def subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def list_images(folder: Path, train: bool) -> list[tuple[str, int]]:
    """The path and the label of each image of a part. Raises DataError if a class has none.

    Sorted by a hash of the names: it mixes the classes, because --val-size takes the last images. A folder without
    train/ and test/ is split by it too, so that an image stays in its part when others are added.
    """
    part = parts(folder)[0 if train else 1]
    least = 2 if part == folder else 1
    chosen: list[tuple[bytes, str, int]] = []
    for label, name in enumerate(folder_classes(folder)):
        found = sorted((name_hash(path, part), path, label) for path in image_files(part / name))
        if len(found) < least:
            images = f"{len(found)} images ({', '.join(SUFFIXES)})"
            raise DataError(f"{part / name} holds {images}, but needs at least {least}; add some, or remove the folder")
        cut = max(1, round(len(found) / 5)) if part == folder else 0
        chosen += found[cut:] if train or not cut else found[:cut]
    return [(path, label) for _, path, label in sorted(chosen)]


def image_files(folder: Path) -> list[str]:
    """All images in or below a folder, except hidden ones."""
    paths = glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True)
    return [path for path in paths if path.lower().endswith(SUFFIXES) and os.path.isfile(path)]


def name_hash(path: str, part: Path) -> bytes:
    name = Path(path).relative_to(part).as_posix()  # so that the folder may be moved
    return hashlib.sha256(os.fsencode(name)).digest()
