"""MNIST, Fashion-MNIST and KMNIST from IDX files, raw or gzipped, in torchvision's folder layout."""

import gzip
import hashlib
import os
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
LARGEST = {"train": 60_000, "t10k": 10_000}  # images in each part of all three

# SHA-256 of the uncompressed content. The other two sets have none published: torchvision's MD5 guards their download.
SHA256 = {
    "MNIST/raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "MNIST/raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "MNIST/raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "MNIST/raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataError(OSError):
    """A data set that cannot be used; the message names the file and the remedy."""


def load_mnist(name, data_dir, train):
    """Read one part of the data set `name` below `data_dir`, downloading it first where it is missing.

    Returns uint8 images [N, 1, 28, 28] and int64 labels [N]. Raises DataError.
    """
    root, folder, part = Path(data_dir), FOLDERS[name], "train" if train else "t10k"
    if not all(find_idx(root / stem) for stem in part_stems(folder, part)):
        download(folder, root)
    return read_part(root, folder, part)


def part_stems(folder, part):
    return [f"{folder}/raw/{part}-images-idx3-ubyte", f"{folder}/raw/{part}-labels-idx1-ubyte"]


def find_idx(path):
    """The raw file `path`, else `path`.gz, else None."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if os.path.isfile(p)), None)


def read_part(root, folder, part):
    images_stem, labels_stem = part_stems(folder, part)
    images = read_idx(root, images_stem, item_shape=(28, 28), most=LARGEST[part])
    labels = read_idx(root, labels_stem, item_shape=(), most=LARGEST[part])
    if len(images) != len(labels):
        raise DataError(
            f"{find_idx(root / images_stem)} holds {len(images)} images but {find_idx(root / labels_stem).name} "
            f"{len(labels)} labels: they do not belong together; delete both to download them again"
        )
    if labels.max() > 9:
        raise DataError(f"{find_idx(root / labels_stem)} holds a label above 9; delete it to download it again")
    return images.unsqueeze(1), labels.long()


def read_idx(root, stem, item_shape, most):
    """Read the IDX file `root`/`stem` or its .gz: uint8 [N, *item_shape], N from 1 to `most`.

    Never unpacks more than the header promises. Raises DataError on anything but a whole, unaltered file.
    """
    path = find_idx(root / stem)
    remedy = "delete it to download it again"
    item_size = int(np.prod(item_shape))
    header_size = 4 + 4 * (1 + len(item_shape))
    magic = bytes([0, 0, 0x08, 1 + len(item_shape)])  # 0x08: unsigned byte
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(header_size)
            count, *shape = np.frombuffer(header[4:], dtype=">u4").tolist() if len(header) == header_size else [0]
            if header[:4] == magic and shape == list(item_shape) and 0 < count <= most:
                content = file.read(count * item_size + 1)
            else:
                content = None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    if content is None:
        raise DataError(f"{path} is not an IDX file of up to {most} items of shape {item_shape}; {remedy}")
    if len(content) != count * item_size:
        raise DataError(f"{path} does not hold the {count} items that its header promises; {remedy}")
    if stem in SHA256 and hashlib.sha256(header + content).hexdigest() != SHA256[stem]:
        raise DataError(f"{path} is not the published file (its SHA-256 differs); {remedy}")
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8)).view(count, *item_shape)


def download(folder, root):
    """Fetch the data set through torchvision into a temporary folder; move it into place once verified."""
    raw = root / folder / "raw"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            fetch(folder, temporary)
            for part in LARGEST:
                read_part(Path(temporary), folder, part)
            raw.mkdir(parents=True, exist_ok=True)
            for file in (Path(temporary) / folder / "raw").glob("*-ubyte"):
                if not find_idx(raw / file.name):
                    os.replace(file, raw / file.name)
    except DataError as error:
        reason = str(error).split(";")[0]
        raise DataError(f"what was downloaded is thrown away: {reason}; try again later") from error
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: torchvision found no mirror or a wrong MD5
        reason = " ".join(str(error).split()) or type(error).__name__
        stems = part_stems(folder, "train") + part_stems(folder, "t10k")
        missing = next((root / stem for stem in stems if not find_idx(root / stem)), raw)
        raise DataError(
            f"{missing} is missing and could not be downloaded ({reason}); go online, put {folder}'s four files there, "
            "point --data-dir at a copy, or use --dataset digits, which needs no network"
        ) from error


def fetch(folder, root):
    from torchvision import datasets  # takes a second to import and is only needed here

    getattr(datasets, folder)(root, download=True)
