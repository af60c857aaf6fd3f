"""Find handwritten digits in a photo, despite shadows, ruled lines, specks and the edge of a table."""

import itertools

import numpy as np
from scipy import ndimage

Box = tuple[slice, slice]  # rows and columns


def find_digits(pixels: np.ndarray) -> tuple[list[np.ndarray], list[Box]]:
    """The ink of each digit in an image [C, H, W], from 0 (paper) to 1, and its box. Ordered from left to right.

    Tries dark on light and light on dark, and keeps what resembles strokes most. A close-up gets a margin of paper,
    because a stroke along its edge would look like a table beside the page.
    """
    found = [search(pixels, sign) for sign in (1, -1)]
    if is_close_up(max(found, key=lambda result: result[0])[2]):
        border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
        paper, margin = np.median(border, axis=1)[:, None, None], max(pixels.shape) // 2
        wide = np.pad(pixels - paper, ((0, 0), (margin, margin), (margin, margin))) + paper
        found += [search(wide, sign) for sign in (1, -1)]
    _, ink, labels = max(found, key=lambda result: result[0])
    boxes = ndimage.find_objects(labels)
    return [cut_out(ink, labels == number, box) for number, box in enumerate(boxes, 1)], boxes


def is_close_up(labels: np.ndarray) -> bool:
    """Whether a few digits fill most of the image's height, or nearly touch its edge."""
    near = max(labels.shape) // 25 + 1
    rows = np.flatnonzero(labels.any(axis=1))
    if not 0 < labels.max() < 10:
        return False
    return bool(np.ptp(rows) > 0.5 * len(labels) or labels[near:-near, near:-near].sum() < labels.sum())


def search(pixels: np.ndarray, sign: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The resemblance to strokes, the ink [H, W], and the digits as labels [H, W], numbered from 1 from left to right.

    sign: 1 for dark on light, -1 for light on dark. With the wrong sign, parts of the paper are taken for ink.
    """
    step = max(1, max(pixels.shape) // 200)
    channel = max(pixels, key=lambda channel: (measure_ink(channel[::step, ::step], sign) ** 2).sum())
    ink = measure_ink(channel, sign)
    for view in (ink, ink.T):  # horizontal lines, then vertical ones
        view[find_lines(view > faintest(view))] = 0
    labels = join_strokes(keep_strokes(ink > threshold(ink)))
    return resemblance(channel, labels > 0) if labels.any() else 0, ink, labels


def measure_ink(channel: np.ndarray, sign: int) -> np.ndarray:
    """The difference of each pixel from the paper around it, relative to the paper's brightness.

    The paper is estimated by a closing. It fills what is narrower than a third of the image, such as strokes, and
    follows shadows. Edge pixels are replicated, so that a dark table along the edge is wide and does not count as ink.
    """
    width = max(3, min(channel.shape) // 3)
    margin = width // 2 + 1
    smooth = sign * ndimage.gaussian_filter(channel, max(channel.shape) / 800)
    closed = ndimage.grey_closing(np.pad(smooth, margin, mode="edge"), (width, width), mode="nearest")
    paper = closed[margin:-margin, margin:-margin]
    ink = (paper - smooth) / (abs(paper) + 64)  # a shadow dims the ink as well
    return ink - np.median(ink)


def faintest(ink: np.ndarray) -> float:
    """The least ink above the paper's grain: five standard deviations, estimated from the median."""
    return max(0.03, 5 * 1.48 * np.median(abs(ink)))


def threshold(ink: np.ndarray) -> float:
    """Halfway between the mean ink below and above it, so that lines fainter than a digit fall below."""
    values = ink[ink > faintest(ink)]
    middle = values.mean() if len(values) else np.inf
    for _ in range(20):
        above = values > middle
        if above.any():
            middle = (values[above].mean() + values[~above].mean()) / 2
    return middle


def find_lines(mask: np.ndarray) -> np.ndarray:
    """The horizontal ruled lines in `mask` without the strokes that cross them, as staff lines are removed from scores.

    A line is thin and crosses the page. Where it is thicker than elsewhere, a stroke crosses it.
    """
    width = mask.shape[1]
    length = max(6, width // 50)
    runs = ndimage.grey_opening(ndimage.grey_closing(mask, (1, length // 2)), (1, length))
    columns, count = ndimage.label(mask, [[0, 1, 0]] * 3)  # vertical runs of pixels
    thickness = np.bincount(columns.ravel(), minlength=count + 1)
    labels, _ = ndimage.label(runs, np.ones((3, 3)))
    lengths, erase = [], np.zeros(count + 1, dtype=bool)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        length = box[1].stop - box[1].start
        touched = np.unique(columns[box][(labels[box] == number) & mask[box]])
        if length > 0.2 * width and (thin := np.median(thickness[touched])) < length / 40:
            lengths.append(length)
            erase[touched[thickness[touched] <= thin + 2]] = True
    third = sorted([0, 0, 0, *lengths])[-3]
    ruled = third > 0.6 * width or max(lengths, default=0) > 0.95 * width  # otherwise a line may be a digit's bar
    return erase[columns] & ruled


def spans(boxes: list) -> np.ndarray:
    """Height and width of each box, [N, 2]."""
    return np.array([[side.stop - side.start for side in box] for box in boxes]).reshape(-1, 2)


def keep_strokes(mask: np.ndarray) -> np.ndarray:
    """`mask` without specks, and without what lies along the image's edge unless there is nothing else."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = spans(ndimage.find_objects(labels)).max(axis=1, initial=0)
    rim = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    along = np.bincount(rim, minlength=count + 1)[1:] > 0.2 * sizes
    least = max(8, max(mask.shape) / 25)
    if (sizes[~along] >= least).any():
        sizes[along] = 0
    largest = sizes.max(initial=0)
    keep = (sizes > 0.15 * largest) & (largest >= least)
    return np.concatenate([[False], keep])[labels]


def join_strokes(mask: np.ndarray) -> np.ndarray:
    """Number the digits from left to right. Strokes that nearly touch, or that `same_digit` joins, are one digit."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    longest = spans(ndimage.find_objects(labels)).max(initial=0)
    labels = ndimage.label(ndimage.maximum_filter(mask, 2 * max(1, round(longest / 25)) + 1))[0] * mask
    boxes = dict(enumerate(ndimage.find_objects(labels), 1))
    pairs = itertools.combinations(boxes, 2)
    while pair := next(((a, b) for a, b in pairs if same_digit(boxes[a], boxes[b], longest)), None):
        labels[labels == pair[1]] = pair[0]
        boxes = {number: box for number, box in enumerate(ndimage.find_objects(labels), 1) if box}
        pairs = itertools.combinations(boxes, 2)
    sizes = dict(zip(boxes, spans([*boxes.values()]).max(axis=1, initial=0)))
    order = [n for n in sorted(boxes, key=lambda n: boxes[n][1].start) if sizes[n] > 0.4 * max(sizes.values())]
    return sum((number * (labels == n) for number, n in enumerate(order, 1)), np.zeros_like(labels))


def same_digit(a: Box, b: Box, longest: int) -> bool:
    """Whether two boxes hold strokes of one digit: one is small and close to the other, or close above it.

    Examples are the bar of a 5 and the halves of a broken 8. Digits side by side have about the same height.
    longest: the size of the largest stroke.
    """
    down, aside = (max(x.start, y.start) - min(x.stop, y.stop) for x, y in zip(a, b))  # below 0 if they overlap
    low, narrow = spans([a, b]).min(axis=0)
    if low < longest / 2:
        return max(down, aside) < 0.25 * longest
    return down < 0.2 * longest and -aside > 0.5 * narrow


def resemblance(channel: np.ndarray, mask: np.ndarray) -> float:
    """How much `mask` looks like ink: the root of a stroke's length in widths, times the contrast at its outline.

    A quarter of the outline may be less sharp, because shadows cross it.
    """
    window = tuple(slice(max(0, side.start - 3), side.stop + 3) for side in ndimage.find_objects(mask.astype(int))[0])
    mask, channel = mask[window], channel[window]
    outline = mask ^ ndimage.minimum_filter(mask, 3)
    step = np.percentile(ndimage.morphological_gradient(channel, 5)[outline], 25)
    return (mask.sum() / ndimage.label(mask)[1]) ** 0.5 / stroke_width(mask) * step


def stroke_width(mask: np.ndarray) -> float:
    """The pixels of a line of width w are w / 4 from its edge on average."""
    return 4 * ndimage.distance_transform_edt(mask)[mask].mean()


def cut_out(ink: np.ndarray, mask: np.ndarray, box: Box) -> np.ndarray:
    """One digit's ink from 0 (paper) to 1, cropped to the digit; strokes thinner than MNIST's are thickened."""
    size = spans([box]).max()
    skirt = max(2, size // 30)  # width of the paler border around the mask
    window = tuple(slice(side.start, side.stop + 8 * skirt) for side in box)
    ink, mask, faint = np.pad(ink, 4 * skirt)[window], np.pad(mask, 4 * skirt)[window], faintest(ink)
    full = np.percentile(ink[mask], 90)
    least = min(2 * faint / full, 0.4)
    ink = ((ink / full - least) / (0.9 - least)).clip(0, 1) * ndimage.maximum_filter(mask, 2 * skirt + 1)
    if (missing := round((size / 9 - stroke_width(mask)) / 2)) > 0:
        y, x = np.mgrid[-missing : missing + 1, -missing : missing + 1]
        ink = ndimage.maximum_filter(ink, footprint=np.hypot(y, x) <= missing + 0.2)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
