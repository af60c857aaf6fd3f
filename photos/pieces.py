"""From a mask of ink to images like MNIST's: pieces that are a digit, alone or together with their neighbours."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from photos.ink import SQUARE, grow

# Penalties, in units of log p, for leaving out a large piece, cutting one, a flat digit, and ink above or below.
SKIP, CUT, FLAT, ELSEWHERE = 3.0, 0.7, 4.0, 0.5


class Row(NamedTuple):
    """A row of pieces, from left to right, and the images that they make with their neighbours."""

    images: list[np.ndarray]  # uint8 [28, 28] each
    spans: list[tuple[int, int]]  # of each image: its first piece, and the one after its last
    costs: list[float]  # of each image: its penalty
    skips: list[float]  # of each piece: the penalty for leaving it out
    elsewhere: float  # the penalty for ink above and below the row
    several: bool  # whether there are other rows of about this size


def read_row(mask: np.ndarray) -> Row | None:
    """The row of the largest pieces in a mask. None: they are too small, or too many, as in a texture."""
    least = max(10, min(mask.shape) / 40)
    mask = trim(mask)
    tall = spans(find_boxes(ndimage.label(mask, SQUARE)[0]))[:, 0].max()
    if tall < least:
        return None
    labels = ndimage.label(grow(mask, round(tall / 60)), SQUARE)[0] * mask  # strokes that nearly touch are one piece
    boxes = find_boxes(labels)
    sizes = spans(boxes)
    kept = np.flatnonzero(sizes.max(1) > 0.1 * tall)
    if len(kept) > 100:
        return None
    rows = find_rows(boxes, sorted(kept, key=lambda k: boxes[k, 2]))
    row = max(rows, key=lambda row: (sizes[row, 0] ** 2).sum())
    tall, others = sizes[row, 0].max(), sizes[[k for other in rows if other is not row for k in other]]
    several = bool((others[:, 0] > 0.65 * tall).any())
    elsewhere = 0.0 if several else min(1.0, ELSEWHERE * float(((others.max(1, initial=0) / tall) ** 2).sum()))
    parts = np.zeros_like(labels)  # the pieces of this row, cut and numbered again
    whole: list[int] = []  # of each, the piece that it was cut from
    for k in row:
        box = slice(*boxes[k, :2]), slice(*boxes[k, 2:])
        own = cut(labels[box] == k + 1)
        parts[box] = np.where(own > 0, own + len(whole), parts[box])
        whole += [k] * own.max()
    return Row(*combine(parts, whole, tall), elsewhere, several) if len(whole) < 40 else None


def trim(mask: np.ndarray) -> np.ndarray:
    """The smallest rectangle of a mask that holds all its ink."""
    return mask[ndimage.find_objects((mask > 0).astype(int))[0]]


def find_boxes(labels: np.ndarray) -> np.ndarray:
    """Top, bottom, left and right of each label, [N, 4]."""
    return np.array([[end for side in box for end in (side.start, side.stop)] for box in ndimage.find_objects(labels)])


def spans(boxes: np.ndarray) -> np.ndarray:
    """Height and width of each box, [N, 2]."""
    return boxes[:, 1::2] - boxes[:, ::2]


def find_rows(boxes: np.ndarray, order: list[int]) -> list[list[int]]:
    """Boxes beside each other. A row may slant: each box stands beside one of the three before it."""
    rows: list[list[int]] = []
    tall = spans(boxes)[:, 0].max()
    for k in order:
        near = (row for row in rows if any(beside(boxes[k], boxes[left], tall) for left in row[-3:]))
        if row := next(near, None):
            row.append(k)
        else:
            rows.append([k])
    return rows


def beside(box: np.ndarray, left: np.ndarray, tall: int) -> bool:
    """Whether a box overlaps the one on its left in height, or is a small part closely above or below it."""
    low = min(box[1] - box[0], left[1] - left[0])
    slack = 0.3 * tall if low < 0.5 * tall and box[2] < left[3] else 0
    return bool(min(box[1], left[1]) - max(box[0], left[0]) + slack > 0.25 * low)


def cut(mask: np.ndarray) -> np.ndarray:
    """Number the parts of a piece from left to right: a wide one is cut along the lines that cross the least ink."""
    height, start, parts = len(mask), 0, mask.astype(int)
    while (width := mask.shape[1] - start) > max(8, 0.6 * height):
        y, x = np.nonzero(parts == parts.max())
        least, most = (0.4 * height, 0.9 * height) if width > 1.8 * height else (0.3 * width, 0.7 * width)
        middle, cuts = start + np.arange(round(least), round(most) + 1), []
        for slope in (0, -0.2, 0.2, -0.4, 0.4):
            across = (x + slope * (y - height / 2)).round().clip(0).astype(int)
            ink = np.bincount(across, minlength=middle[-1] + 1)[middle]
            cuts.append((ink.min(), abs(slope), middle[ink.argmin()], slope))
        _, _, start, slope = min(cuts)
        beyond = x + slope * (y - height / 2) >= start
        if min(beyond.sum(), (~beyond).sum()) < 0.1 * len(y):
            break
        parts[y[beyond], x[beyond]] = parts.max() + 1
        if width <= 1.8 * height:
            break
    return parts


def combine(parts: np.ndarray, whole: list[int], tall: int) -> tuple[list, list, list, list]:
    """The first four fields of a Row: up to four neighbours make an image if they are close and not too large."""
    boxes = find_boxes(parts)
    images, ends, costs = [], [], []
    for i in range(len(whole)):
        for j in range(i + 1, min(i + 4, len(whole)) + 1):
            (top, _, left, _), (_, bottom, _, right) = boxes[i:j].min(0), boxes[i:j].max(0)
            gap = boxes[j - 1, 2] - boxes[i : j - 1, 3].max(initial=left)
            if j > i + 1 and (bottom - top > 1.4 * tall or right - left > 1.5 * (bottom - top) or gap > 0.3 * tall):
                break
            window = parts[top:bottom, left:right]
            images.append(normalise((window > i) & (window <= j)))
            ends.append((i, j))
            is_cut = i > 0 and whole[i] == whole[i - 1]
            costs.append(float(FLAT * max(0, 0.65 - (bottom - top) / tall) + CUT * is_cut))
    return images, ends, costs, (SKIP * (spans(boxes).max(1) / tall) ** 2).tolist()


def normalise(ink: np.ndarray) -> np.ndarray:
    """A mask [H, W] as an image like MNIST's, uint8 [28, 28]: thin strokes become thicker, the rest is `centre`."""
    scale = 60 / max(ink.shape)
    size = [max(1, round(scale * length)) for length in ink.shape[::-1]]
    ink = np.pad(np.asarray(Image.fromarray(ink).convert("L").resize(size, Image.Resampling.BILINEAR)) > 127, 4)
    stroke = 4 * ndimage.distance_transform_edt(ink)[ink].mean() if ink.any() else 60  # of width w: on average w / 4
    return centre(ndimage.distance_transform_edt(~ink) <= max(0, (6.5 - stroke) / 2))


def centre(ink: np.ndarray) -> np.ndarray:
    """Fit a mask [H, W] into 20x20 and move its centre of mass to the centre of 28x28, uint8 from 0 to 255."""
    if not ink.any():
        return np.zeros((28, 28), np.uint8)
    ink = trim(ink)
    scale = 20 / max(ink.shape)
    size = [max(1, round(scale * length)) for length in ink.shape[::-1]]
    small = Image.fromarray(ink).convert("L")
    small = small.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    canvas = Image.new("L", (28, 28))
    y, x = (round(13.5 - middle) for middle in ndimage.center_of_mass(np.asarray(small)))
    canvas.paste(small, (min(max(x, 0), 28 - size[0]), min(max(y, 0), 28 - size[1])))
    return np.asarray(canvas)
