"""Proposals of where the ink is in a picture: dark or light, with frames and lines or without, faint strokes or not."""

from collections.abc import Iterator
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

SQUARE = np.ones((3, 3))  # pixels that touch at a corner are connected


def propose(grey: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Masks of ink [H, W] in a picture [H, W] with values from 0 to 255, and a penalty for each.

    Each polarity is tried, two estimates of the paper, two thresholds, and each kind of lines kept or removed.
    """
    for light, local in product((False, True), (False, True)):
        ink = measure_ink(255 - grey if light else grey, local)
        mask, half = ink > threshold(ink) / 2, ink[::2, ::2]
        steps = ndimage.maximum_filter(half, 5) - ndimage.minimum_filter(half, 5)
        framed = frames(mask)
        removed = [(gone, 0.1) for gone in (framed, lines(mask)) if gone.any()]
        for gone, cost in [(np.zeros_like(mask), 0.5 * framed.any()), *removed]:
            left = np.where(grow(gone, 2), 0, ink)
            level, cost = threshold(left), float(cost + 0.1 * light)
            yield from ((left > part * level, cost) for part in (1, 0.6) if is_ink(ink, steps, left > part * level))


def measure_ink(grey: np.ndarray, local: bool) -> np.ndarray:
    """How much darker each pixel is than the paper: the picture's lightest parts or, if `local`, those around it."""
    if not local:
        return np.percentile(grey[::4, ::4], 98) - grey
    scale = 160 / max(grey.shape)
    size = [max(4, round(scale * length)) for length in grey.shape[::-1]]
    small = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))
    paper = ndimage.grey_closing(small, (max(3, min(size) // 3),) * 2, mode="nearest")  # fills strokes, follows shadows
    paper = np.asarray(Image.fromarray(paper).resize(grey.shape[::-1], Image.Resampling.BILINEAR))
    return 255 * (1 - grey / np.maximum(paper, 8))


def threshold(ink: np.ndarray) -> float:
    """The value that best separates ink from paper, by Otsu's method, but above the grain of the paper.

    With little ink, the method (en.wikipedia.org/wiki/Otsu's_method) would split the grain.
    """
    counts, edges = np.histogram(ink[::2, ::2], 128)
    below, sums = counts.cumsum(), (counts * (edges[1:] + edges[:-1]) / 2).cumsum()
    above = below[-1] - below
    between = below * above * (sums / below.clip(1) - (sums[-1] - sums) / above.clip(1)) ** 2
    paper = np.median(ink[::4, ::4])
    grain = np.median(abs(ink[::4, ::4] - paper))
    return max(float(edges[between.argmax() + 1]), float(paper + 4 * grain))


def is_ink(ink: np.ndarray, steps: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a mask covers little of the paper, stands out, and ends at its outline, unlike a shade.

    steps: the differences of brightness within a few pixels, at half the resolution.
    """
    if not 0.0003 < mask.mean() < 0.5:
        return False
    contrast = ink[mask].mean() - np.median(ink[::4, ::4])
    half = mask[::2, ::2]
    outline = steps[half & grow(~half, 1)]
    return bool(contrast > 8 and len(outline) and np.median(outline) > contrast / 4)


def grow(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask, and what is within `by` pixels of it in both directions."""
    return ndimage.uniform_filter(mask.astype(np.float32), 2 * by + 1) > 1e-6  # faster than binary_dilation


def frames(mask: np.ndarray) -> np.ndarray:
    """What lies along the picture's edge, such as a table or a cell's lines, or surrounds most of the rest."""
    labels, count = ndimage.label(mask, SQUARE)
    boxes = ndimage.find_objects(labels)
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    rim = np.array([np.bincount(edge, minlength=count + 1)[1:] for edge in edges])
    sizes = np.array([max(side.stop - side.start for side in box) for box in boxes])
    gone = (rim.sum(0) > 0.15 * sizes) | ((rim > 0).sum(0) > 1)
    for number in np.flatnonzero(~gone & (sizes > 0.15 * min(mask.shape))) + 1:
        own = labels[boxes[number - 1]] == number
        inside = mask[boxes[number - 1]] & ~own
        large = sizes[np.unique(labels[boxes[number - 1]][inside]) - 1].max(initial=0) > 0.06 * sizes[number - 1]
        gone[number - 1] = large and inside.sum() > (mask.sum() - own.sum()) / 2
    return np.concatenate([[False], gone])[labels]


def lines(mask: np.ndarray) -> np.ndarray:
    """Straight level and upright lines, without the strokes that cross them; then `frames` of what is left.

    Where a line is thicker than elsewhere, a stroke crosses it.
    """
    level, upright = level_lines(mask), level_lines(mask.T).T
    found = level | upright
    return found | frames(mask & ~found) if found.any() else found


def level_lines(mask: np.ndarray) -> np.ndarray:
    """Level lines that begin or end at the picture's edge. Other lines and strokes may interrupt them."""
    runs, count = ndimage.label(mask, [[0, 1, 0]] * 3)  # of pixels above each other
    thickness, found = np.bincount(runs.ravel(), minlength=count + 1), np.zeros_like(mask)
    few = thickness[1:][thickness[1:] <= max(3, min(mask.shape) / 20)]
    typical = np.median(few) if len(few) else 0
    thin = (thickness < 1.5 * typical + 2)[runs] & mask
    labels = ndimage.label(ndimage.maximum_filter1d(thin, 2 * (min(mask.shape) // 60) + 3, axis=1), SQUARE)[0] * thin
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        width, ends = box[1].stop - box[1].start, (box[1].start, mask.shape[1] - box[1].stop)
        if min(ends) < 3 and width > 0.1 * mask.shape[1] and typical < width / 10:
            y, x = np.nonzero(labels[box] == number)
            slope, start = np.polyfit(x, y, 1)
            line = abs(y - start - slope * x) < typical + 2
            if abs(slope) < 0.2 and line.mean() > 0.7:
                found[box][y[line], x[line]] = True
    return found
