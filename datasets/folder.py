"""Images of your own: a folder with a subfolder of images for each class, as torchvision's ImageFolder has it.

The networks see 28x28 grey pixels, so that is what every image becomes. docs/extending.md names what to edit for
larger images or for colour.
"""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.mnist import DataError
from datasets.picture import open_picture

SIDE, MODE = 28, "L"  # width and height in pixels; Pillow's name for grey. Colour is "RGB"
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}


def load_folder(folder: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of train/ or of test/; where there are no such folders, four fifths of each class, or the others.

    Returns uint8 images [N, 1, 28, 28] and int64 labels [N], in an order that mixes the classes and is always the same.
    Raises DataError.
    """
    paths, labels = zip(*list_images(folder, train))
    hidden = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # torchrun's other processes read the same
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(paths), desc=f"reading {folder}", leave=False, disable=hidden) as bar,
    ):
        images = []
        for image in pool.map(read_image, paths):
            images.append(image)
            bar.update()
    what = f"{len(images)} {'training' if train else 'test'} images of {max(labels) + 1} classes"
    print(f"{folder}: {what}, each brought to {SIDE}x{SIDE} {'grey ' * (MODE == 'L')}pixels", flush=True)
    return torch.cat(images), torch.tensor(labels)


def read_image(path: str | Path) -> torch.Tensor:
    """A picture of any size and mode as a network sees it: uint8 [1, C, SIDE, SIDE]. Raises DataError.

    Its proportions stay: a picture that is not square gets margins of its own border's brightness.
    """
    from PIL import Image

    picture = open_picture(path, 4 * SIDE).convert(MODE)
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    pixels = np.atleast_3d(picture)  # [H, W, C]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = Image.new(MODE, (SIDE, SIDE), tuple(np.median(border, axis=0).astype(int).tolist()))
    small = picture.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's filters are antialiased
    square.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return torch.tensor(np.atleast_3d(square)).permute(2, 0, 1).unsqueeze(0)


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
        remedy = "give both parts the same subfolders"
        raise DataError(
            f"{folder / 'test'} does not have the same classes as train ({difference(train, test)}); {remedy}"
        )
    return train


def difference(before: list[str], now: list[str]) -> str:
    """What two lists of classes do not share, in words."""
    words = []
    for word, names in (("missing", sorted({*before} - {*now})), ("new", sorted({*now} - {*before}))):
        if names:
            words.append(f"{word}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
    return "; ".join(words)


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

    The order is that of a hash of the names. It mixes the classes, because --val-size takes the last images. A folder
    of one level is split by it too, so that an image stays in its part when others are added.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # takes a second to import

    def is_image(path):
        name = os.path.basename(path).lower()
        return name.endswith(IMG_EXTENSIONS) and not name.startswith(".")

    part, chosen = parts(folder)[0 if train else 1], []
    for label, name in enumerate(folder_classes(folder)):
        found = make_dataset(part, {name: label}, is_valid_file=is_image, allow_empty=True)
        found = sorted((name_hash(path, part), path, label) for path, label in found)
        least = 1 if part != folder else 2
        if len(found) < least:
            images = f"{len(found)} images ({', '.join(IMG_EXTENSIONS)})"
            raise DataError(f"{part / name} holds {images}, but needs at least {least}; add some, or remove the folder")
        if part == folder:
            cut = max(1, round(len(found) / 5))
            found = found[cut:] if train else found[:cut]
        chosen += found
    return [(path, label) for _, path, label in sorted(chosen)]


def name_hash(path: str, part: Path) -> bytes:
    name = Path(path).relative_to(part).as_posix()  # so that the folder may be moved
    return hashlib.sha256(os.fsencode(name)).digest()
