"""Images of your own: a folder with a subfolder of images for each class, as for torchvision's ImageFolder.

The networks see 28x28 grey pixels, so that is what every image becomes. docs/extending.md names what to edit for
larger images or for colour.
"""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import DataError
from photos import open_image
from photos.files import FORMATS

SIDE, MODE = 28, "L"  # width and height in pixels; Pillow's name for grey. Colour is "RGB"
# Besides names that start with a dot: what systems and editors leave, never a class or an image.
HIDDEN = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
          "thumbnails", "thumbs.db", "desktop.ini"}  # fmt: skip
CLASS_FOLDERS = "put the images of each class into a folder of their own"
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}


def load_folder(folder: Path, train: bool, read: Callable[[str], Tensor] | None = None) -> tuple[Tensor, Tensor, list]:
    """The images of train/ or of test/. Without these folders, about four fifths of each class, or the others.

    Returns uint8 images [N, C, SIDE, SIDE] and int64 labels [N], in an order that mixes the classes and is always the
    same, and the paths. read: instead of `read_image`, for a folder that is all test images if it has no such parts.
    Raises DataError.
    """
    listed, left_out = list_images(folder, train, whole=bool(read))
    paths, labels = zip(*listed)
    images = read_all(paths, read or read_image)
    what = f"{len(images)} {'training' if train else 'test'} images of {max(labels) + 1} classes"
    print(f"{folder}: {what}, each scaled to {SIDE}x{SIDE} {'grey ' * (MODE == 'L')}pixels")
    report(folder, left_out)
    return images, torch.tensor(labels), [*paths]


def report(folder: object, left_out: Sequence[str]) -> None:
    if left_out:
        print(f"{folder}: left out, in no class or not read as images: {endings(left_out)}")


def read_all(paths: Sequence[str], read: Callable[[str], Tensor]) -> Tensor:
    """What `read` makes of the files, each one image. Raises a DataError that names all it cannot read."""

    def attempt(path: str) -> Tensor | DataError:
        try:
            return read(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the bar is shown in a terminal only
        images = [*tqdm(pool.map(attempt, paths), "reading images", len(paths), leave=False, disable=None)]
    errors = {path: image for path, image in zip(paths, images) if isinstance(image, DataError)}
    if errors:
        many = f"{len(errors)} of {len(images)} images cannot be read, such as {str([*errors][:5])[1:-1]}: "
        raise DataError(f"{many * (len(errors) > 1)}{next(iter(errors.values()))}")
    return torch.cat(images)


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


def folder_classes(folder: Path) -> list[str]:
    """The names of the classes: of the subfolders, sorted. Raises DataError."""
    train, test = (subfolders(part) for part in parts(folder))
    if not train:
        raise DataError(f"{parts(folder)[0]} has no subfolder; {CLASS_FOLDERS}")
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
    names = next(os.walk(folder, onerror=refuse))[1]
    ours = {"runs"} if os.path.samefile(folder, ".") else set[str]()  # the user stands in `folder`
    return sorted(name for name in names if not is_hidden(name) and name not in ours)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}); allow reading it, or remove it") from error


def list_images(folder: Path, train: bool, whole: bool = False) -> tuple[list[tuple[str, int]], list[str]]:
    """The path and the label of each image of a part, and the other files that it holds. Raises DataError if too few.

    Sorted by a hash of the names: it mixes the classes, because --val-size takes the last images. A folder without
    train/ and test/ is split by it too, unless `whole`: about a fifth of the hashes are those of test images, so that a
    training image remains one when others are added.
    """
    part, names = parts(folder)[1 - train], folder_classes(folder)
    others, chosen = outside_classes(folder, part), list[tuple[bytes, str, int]]()
    for label, (name, files) in enumerate(class_files(part, names).items()):
        images = sorted((name_hash(path, part), path, label) for path in filter(is_image, files))
        others += itertools.filterfalse(is_image, files)
        fifth = sum(hashed[0] < 256 / 5 for hashed, _, _ in images)  # by the first byte
        fifth = 0 if whole or part != folder else max(1, min(fifth, len(images) - 1))
        if len(images) <= min(1, fifth):
            kinds = f" ({endings(files)})" * bool(files)
            holds = f"{len(images)} images ({', '.join(FORMATS)}) in {len(files)} files{kinds}"
            remedy = f"needs at least {2 if fifth else 1}; add some, or move the folder elsewhere"
            raise DataError(f"{part / name} holds {holds}, but {remedy}")
        chosen += images[fifth:] if train or not fifth else images[:fifth]
    return [(path, label) for _, path, label in sorted(chosen)], others


def outside_classes(folder: Path, part: Path) -> list[str]:
    """The files beside the folders of the classes, and those in folders that are neither train/ nor test/."""
    unused = [folder / name for name in subfolders(folder) if part != folder and name not in ("train", "test")]
    found = itertools.chain(part.glob("*.*"), *(place.rglob("*.*") for place in unused))
    return [str(path) for path in found if path.is_file() and not is_hidden(path.name)]


def is_image(path: str) -> bool:
    from PIL import Image

    return Image.registered_extensions().get(os.path.splitext(path)[1].lower()) in FORMATS


def endings(files: Sequence[str]) -> str:
    kinds = ("links to folders" if os.path.isdir(path) else os.path.splitext(path)[1].lower() for path in files)
    return ", ".join(f"{count} {kind or 'without an ending'}" for kind, count in Counter(kinds).items())


def pictures(folder: str) -> list[str]:
    """The images in and below a folder, sorted. Raises DataError if there are none."""
    files = sorted(files_below(folder))
    found = [*filter(is_image, files)]
    report(folder, [*itertools.filterfalse(is_image, files)])
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(FORMATS)}); name a file or another folder")
    return found


def class_files(part: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The files in and below the folder of each class. One that links lead to as well counts once, where it lies."""
    found = [(path, name) for name in names for path in sorted(files_below(part / name))]
    found.sort(key=lambda each: not os.path.islink(each[0]))
    once = {os.path.realpath(path): (path, name) for path, name in found}  # of several paths to a file, the last
    files: dict[str, list[str]] = {name: [] for name in names}
    for path, name in once.values():
        files[name].append(path)
    return files


def files_below(folder: str | Path) -> Iterator[str]:
    """All but hidden files in and below a folder. A link to a folder counts as a file: it may lead in circles."""
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from (os.path.join(root, name) for name in [*files, *links] if not is_hidden(name))


def name_hash(path: str, part: Path) -> bytes:
    name = Path(path).relative_to(part).as_posix()  # so that the folder may be moved
    return hashlib.sha256(os.fsencode(name)).digest()
