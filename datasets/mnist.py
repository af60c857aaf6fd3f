"""MNIST, Fashion-MNIST and KMNIST from IDX files, raw or gzipped, in torchvision's folder layout."""

import gzip
import hashlib
import io
import os
import tempfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import DataError

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
MIRRORS = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "KMNIST": "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
}
TIMEOUT = 60  # seconds without an answer
LARGEST = 16 + 60_000 * 784  # bytes: the header and the pixels of the training images

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


def load_mnist(name: str, data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    """Read one part of the dataset `name` below `data_dir`; download what is missing first.

    Returns uint8 images [N, 1, 28, 28] and int64 labels [N]. Raises DataError.
    """
    root, stems = Path(os.path.expanduser(data_dir)), part_stems(FOLDERS[name], "train" if train else "t10k")
    if not all(find_idx(root, stem) for stem in stems):
        download(FOLDERS[name], root)
    images, labels = (read_idx(root, stem) for stem in stems)
    return images[16:].view(-1, 1, 28, 28), labels[8:].long()  # after the IDX headers


def part_stems(folder: str, part: str) -> list[str]:
    return [f"{folder}/raw/{part}-images-idx3-ubyte", f"{folder}/raw/{part}-labels-idx1-ubyte"]


def find_idx(root: Path, stem: str) -> Path | None:
    """The file `root`/`stem`, raw (if that can be verified) or gzipped, or one folder or two above; None if missing."""
    folder, raw, name = stem.split("/")
    endings = ["", ".gz"] if stem in SHA256 else [".gz"]
    names = [each + ending for ending in endings for each in (name, name.replace("-idx", ".idx"))]
    places = (root / folder / raw, root / folder, root / raw, root)
    return next((place / each for place in places for each in names if os.path.isfile(place / each)), None)


def read_idx(root: Path, stem: str) -> Tensor:
    """The whole IDX file `root`/`stem`, uint8 [bytes]. Raises DataError unless it is the published one."""
    path = find_idx(root, stem) or root / stem
    in_place = path.parent == (root / stem).parent  # elsewhere it may be another dataset's: all have the same names
    remedy = "delete it to download it again" if in_place else "move it elsewhere, or use another --data-dir"
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 2**16)  # gzip makes nothing much larger
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    content = unpack(data, stem, path.suffix == ".gz", path, remedy)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unpack(data: bytes, stem: str, gz: bool, source: object, remedy: str) -> bytes:
    """The content of the file that `data` was read from, verified. Raises DataError, which names `source`."""
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(LARGEST + 1) if gz else data  # never unpacks more
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be read ({error}); {remedy}") from error
    name, published = (stem, content) if stem in SHA256 else (f"{stem}.gz", data)
    if hashlib.sha256(published).hexdigest() != SHA256[name]:
        raise DataError(f"{source} is not the published file (its SHA-256 differs); {remedy}")
    return content


def download(folder: str, root: Path) -> None:
    """Download the files of a dataset that are missing. Each is verified before it is moved into place."""
    for stem in part_stems(folder, "train") + part_stems(folder, "t10k"):
        if find_idx(root, stem):
            continue
        path, url = root / (stem if stem in SHA256 else f"{stem}.gz"), f"{MIRRORS[folder]}{Path(stem).name}.gz"
        if (root / stem).exists():
            print(f"{root / stem} is not read, because only the published {path.name} can be verified")
        try:
            print(f"downloading {url}")
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                data = answer.read(LARGEST)
            content = unpack(data, stem, True, f"the download was discarded: {url}", "try again later")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as temporary:
                (file := Path(temporary) / path.name).write_bytes(content if stem in SHA256 else data)
                os.replace(file, path)
        except (OSError, HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            remedy = f"put {folder}'s four files there, point --data-dir at a copy"
            raise DataError(
                f"{path} is missing and could not be downloaded ({reason}); go online, {remedy}, "
                "or use --dataset digits, which needs no network"
            ) from error
