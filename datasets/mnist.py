"""MNIST, Fashion-MNIST and KMNIST from IDX files, raw or gzipped, in torchvision's folder layout."""

import gzip
import hashlib
import os
import socket
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
MIRRORS = {  # the same files that torchvision downloads, over https only
    "MNIST": ["https://ossci-datasets.s3.amazonaws.com/mnist/"],
    "FashionMNIST": ["https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"],
    "KMNIST": ["https://codh.rois.ac.jp/kmnist/dataset/kmnist/"],
}
TIMEOUT = 60  # seconds without an answer; torchvision would wait forever
LARGEST = {"train": 60_000, "t10k": 10_000}  # images in each part of all three

# MNIST: the SHA-256 of the uncompressed content. The other two: that of the published gzipped files. They are read from
# their .gz only, because an unpacked file cannot be verified.
SHA256 = {
    "MNIST/raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "MNIST/raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "MNIST/raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "MNIST/raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "FashionMNIST/raw/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "FashionMNIST/raw/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "FashionMNIST/raw/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    "KMNIST/raw/train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
    "KMNIST/raw/train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
    "KMNIST/raw/t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
    "KMNIST/raw/t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
}


class DataError(OSError):
    """A data set that cannot be used. The message names the file and the remedy."""


def load_mnist(name: str, data_dir: str, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one part of the data set `name` below `data_dir`; download it first if it is missing.

    Returns uint8 images [N, 1, 28, 28] and int64 labels [N]. Raises DataError.
    """
    root, folder, part = Path(data_dir), FOLDERS[name], "train" if train else "t10k"
    if not all(find_idx(root, stem) for stem in part_stems(folder, part)):
        download(folder, root)
    return read_part(root, folder, part)


def part_stems(folder, part):
    return [f"{folder}/raw/{part}-images-idx3-ubyte", f"{folder}/raw/{part}-labels-idx1-ubyte"]


def names_of(stem):
    """The names below the root that the file `stem` may have, in order of preference."""
    return [stem + ".gz"] if stem + ".gz" in SHA256 else [stem, stem + ".gz"]


def find_idx(root, stem):
    """The file `root`/`stem`, raw or gzipped, or None."""
    return next((root / name for name in names_of(stem) if os.path.isfile(root / name)), None)


def read_part(root, folder, part):
    images_stem, labels_stem = part_stems(folder, part)
    images = read_idx(root, images_stem, item_shape=(28, 28), most=LARGEST[part])
    labels = read_idx(root, labels_stem, item_shape=(), most=LARGEST[part])
    if len(images) != len(labels):
        raise DataError(
            f"{find_idx(root, images_stem)} holds {len(images)} images but {find_idx(root, labels_stem).name} "
            f"{len(labels)} labels; they do not belong together; delete both to download them again"
        )
    if labels.max() > 9:
        raise DataError(f"{find_idx(root, labels_stem)} holds a label above 9; delete it to download it again")
    return images.unsqueeze(1), labels.long()


def read_idx(root, stem, item_shape, most):
    """Read the IDX file `root`/`stem` or its .gz: uint8 [N, *item_shape], N from 1 to `most`.

    Never unpacks more than the header promises. Raises DataError on anything but a whole, unaltered file.
    """
    path = find_idx(root, stem)
    remedy = "delete it to download it again"
    item_size = int(np.prod(item_shape))
    header_size = 4 + 4 * (1 + len(item_shape))
    magic = bytes([0, 0, 0x08, 1 + len(item_shape)])  # 0x08: unsigned byte
    altered = DataError(f"{path} is not the published file (its SHA-256 differs); {remedy}")
    try:
        with open(path, "rb") as packed, gzip.open(packed) if path.suffix == ".gz" else packed as file:
            if stem + ".gz" in SHA256:
                # At most what it can be: gzip makes nothing much larger.
                whole = packed.read(header_size + most * item_size + 2**16)
                if hashlib.sha256(whole).hexdigest() != SHA256[stem + ".gz"]:
                    raise altered
                packed.seek(0)
            header = file.read(header_size)
            count, *shape = np.frombuffer(header[4:], dtype=">u4").tolist() if len(header) == header_size else [0]
            if header[:4] == magic and shape == list(item_shape) and 0 < count <= most:
                content = file.read(count * item_size + 1)
            else:
                content = None
    except DataError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    if content is None:
        raise DataError(f"{path} is not an IDX file of up to {most} items of shape {item_shape}; {remedy}")
    if len(content) != count * item_size:
        raise DataError(f"{path} does not hold the {count} items that its header promises; {remedy}")
    if stem in SHA256 and hashlib.sha256(header + content).hexdigest() != SHA256[stem]:
        raise altered
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8)).view(count, *item_shape)


def download(folder, root):
    """Download the data set with torchvision into a temporary folder, and move it into place once verified."""
    stems = part_stems(folder, "train") + part_stems(folder, "t10k")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            fetch(folder, temporary)
            for part in LARGEST:
                read_part(Path(temporary), folder, part)
            (root / folder / "raw").mkdir(parents=True, exist_ok=True)
            for stem in stems:
                if not find_idx(root, stem):
                    fetched = find_idx(Path(temporary), stem)
                    os.replace(fetched, root / fetched.relative_to(temporary))
    except DataError as error:
        reason = str(error).split(";")[0]
        raise DataError(f"the download was discarded: {reason}; try again later") from error
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: torchvision found no mirror or a wrong MD5
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = next((root / names_of(stem)[0] for stem in stems if not find_idx(root, stem)), root)
        raise DataError(
            f"{missing} is missing and could not be downloaded ({reason}); go online, put {folder}'s four files there, "
            "point --data-dir at a copy, or use --dataset digits, which needs no network"
        ) from error


def fetch(folder, root):
    from torchvision import datasets  # takes a second to import

    published = getattr(datasets, folder)
    over_https = type(folder, (published,), {"mirrors": MIRRORS[folder]})
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        over_https(root, download=True)
    finally:
        socket.setdefaulttimeout(before)
