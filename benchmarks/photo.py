"""How many photographed digits are read correctly: MNIST's test digits on paper, with all that can spoil a photo.

python benchmarks/photo.py --data-dir data
python benchmarks/photo.py --data-dir data --condition "ruled paper" --save pages    # one condition, with its pages

Each of 300 digits is put on a page, 150 of 600 pixels large, once for each condition. The page is saved as a file, read
by `read_photo`, and classified by the reference classifier. A page that `read_photo` rejects counts as an error.
docs/results.md shows what it prints.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import load
from engine import flags
from engine.errors import run_script
from measures.reference import load_reference
from photos import read_photo

PAGE, DIGIT = 600, 150
DISC = np.hypot(*np.mgrid[-4:5, -4:5]) <= 4
WHITE, BLACK = (245, 243, 238), (35, 35, 45)  # paper and ink


# What a page is made of: `ink` [H, W] from 0 to 1, and colours [H, W, 3] from 0 to 255 --------------------------------


def enlarge(digit, size=DIGIT):
    """An MNIST digit as ink with smooth edges, [size, size]."""
    large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip((np.asarray(large) / 255 - 0.25) / 0.5, 0, 1)


def place(ink, rng, margin=40):
    """Put the ink at a random place of a page."""
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = (rng.integers(margin, PAGE - margin - side) for side in ink.shape)
    page = np.zeros((PAGE, PAGE))
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return page


def mix(ink, under, colour):
    """Paint with `colour` over what is there, one colour or colours [H, W, 3]."""
    return under + ink[..., None] * (np.array(colour) - under)


def paint(ink, paper=WHITE, colour=BLACK):
    return mix(ink, np.full((*ink.shape, 3), paper, float), colour)


def ramp(rng):
    """Distance of each pixel from a line through the page's middle in a random direction, from about -1 to 1."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : PAGE * 1j, -1 : 1 : PAGE * 1j]
    return (x * math.cos(angle) + y * math.sin(angle)) / (abs(math.cos(angle)) + abs(math.sin(angle)))


def stripes(distance, width, rng, slope):
    """Parallel lines across the page, almost level, as [H, W] from 0 to 1."""
    y, x = np.mgrid[:PAGE, :PAGE]
    across = (y + slope * x + rng.uniform(0, distance)) % distance
    return np.clip(width / 2 + 0.5 - abs(across - distance / 2), 0, 1)


def grain(rng, strength, smooth=1.0):
    """The paper's grain, or a sensor's noise, [H, W, 1]."""
    noise = ndimage.gaussian_filter(rng.standard_normal((PAGE, PAGE)), smooth)
    return strength * (noise / noise.std())[..., None]


# The conditions: each makes a page of a digit's ink -------------------------------------------------------------------


def clean(ink, rng):
    return paint(place(ink, rng))


def specks(ink, rng):
    """Forty spots of dirt, anywhere, of up to 3 pixels' radius."""
    page = clean(ink, rng)
    for _ in range(40):
        radius, level = rng.uniform(0.5, 3), rng.uniform(0, 200)
        top, left = rng.integers(PAGE - 7, size=2)
        page[top : top + 7, left : left + 7][np.hypot(*np.mgrid[-3:4, -3:4]) < radius] = level
    return page


def dark_edge(ink, rng):
    """The page ends within the photo; a dark table shows on one side, or on two."""
    page = paint(place(ink, rng, margin=130))
    table = np.zeros((PAGE, PAGE))
    y, x = np.mgrid[:PAGE, :PAGE]
    for side in rng.permutation(4)[: rng.integers(1, 3)]:
        depth = (y, PAGE - y, x, PAGE - x)[side]
        table[depth < rng.uniform(10, 110) + rng.uniform(-0.03, 0.03) * (x + y)] = 1
    return mix(ndimage.gaussian_filter(table, 1), page, rng.uniform(20, 90, 3))


def ruled_paper(ink, rng):
    slope = rng.uniform(-0.03, 0.03)
    lines = stripes(rng.uniform(28, 45), 2, rng, slope)
    return mix(place(ink, rng), paint(lines, colour=(120, 150, 205)), BLACK)


def squared_paper(ink, rng):
    slope, distance = rng.uniform(-0.03, 0.03), rng.uniform(20, 32)
    across, down = (stripes(distance, 1.5, rng, slope) for _ in range(2))
    grey = (140, 150, 165)
    return mix(place(ink, rng), mix(down.T, paint(across, colour=grey), grey), BLACK)


def dark_lines(ink, rng):
    """Ruled paper whose lines are as dark as the ink, but thinner."""
    lines = stripes(rng.uniform(28, 45), 2, rng, rng.uniform(-0.03, 0.03))
    return paint(np.maximum(lines, place(ink, rng)))


def shadow(ink, rng):
    """A shadow takes half of the light from a part of the page. Its edge may run through the digit."""
    edge = (ramp(rng) - rng.uniform(-0.4, 0.4)) / rng.uniform(0.01, 0.2)
    return clean(ink, rng) * (0.75 + 0.25 * np.tanh(edge))[..., None]


def pencil(ink, rng):
    """A grey not much darker than the paper, broken by its grain."""
    broken = place(ink, rng) * (0.8 + grain(rng, 0.15)[..., 0]).clip(0, 1)
    return paint(broken, (228, 226, 220), (150, 150, 155)) + grain(rng, 2)


def coloured(ink, rng):
    """Any paper and any ink whose brightness differs by 60 or more."""
    while True:
        paper, colour = rng.uniform(0, 255, (2, 3))
        if abs((paper - colour) @ (0.299, 0.587, 0.114)) >= 60:
            return paint(place(ink, rng), paper, colour)


def chalk(ink, rng):
    """Light and broken strokes on a board with smears."""
    board = grain(rng, 8, 30) + grain(rng, 3) + (45, 70, 58)
    broken = place(ink, rng) * (0.8 + grain(rng, 0.2)[..., 0]).clip(0, 1)
    return mix(broken, board, (225, 228, 220))


def near_the_edge(ink, rng):
    """The digit stands 2 to 8 pixels from one edge of the page, or from two."""
    page = place(ink, rng)
    for axis in rng.permutation(2)[: rng.integers(1, 3)]:
        drawn = page.any(1 - axis).nonzero()[0]
        gap = rng.integers(2, 9)
        page = np.roll(page, rng.choice([gap - drawn[0], PAGE - 1 - gap - drawn[-1]]), axis)
    return paint(page)


def thin_pen(ink, rng):
    """Only the middle of each stroke is left, 3 pixels wide."""
    depth = ndimage.distance_transform_edt(ink > 0.5)
    ridge = (depth > 0) & (depth >= ndimage.maximum_filter(depth, 3) - 0.5)
    return clean(ndimage.gaussian_filter(ndimage.binary_dilation(ridge, np.ones((3, 3))).astype(float), 0.7), rng)


CONDITIONS: dict[str, Callable] = {
    "clean": clean,
    "specks": specks,
    "dark edge": dark_edge,
    "ruled paper": ruled_paper,
    "squared paper": squared_paper,
    "dark lines": dark_lines,
    "gradient": lambda ink, rng: clean(ink, rng) * (0.75 + 0.25 * ramp(rng))[..., None],  # the light falls to half
    "shadow": shadow,
    "noise": lambda ink, rng: clean(ink, rng) + grain(rng, 12, 0.5),
    "blur": lambda ink, rng: ndimage.gaussian_filter(clean(ink, rng), (4, 4, 0)),
    "pencil": pencil,
    "coloured": coloured,
    "chalk": chalk,
    "near the edge": near_the_edge,
    "thin pen": thin_pen,
    "thick marker": lambda ink, rng: clean(ndimage.maximum_filter(ink, footprint=DISC), rng),  # 8 pixels wider
    "jpeg at quality 30": clean,  # this and the next are special only in how the file is saved
    "turned by its exif tag": clean,
}


def save(page, path, condition, rng):
    image, exif = Image.fromarray(page.clip(0, 255).round().astype(np.uint8)), Image.Exif()
    if "exif" in condition:
        turn, exif[0x0112] = [(90, 6), (180, 3), (270, 8)][rng.integers(3)]
        image = image.rotate(turn, expand=True)
    image.save(path, quality=30 if "jpeg" in condition else 90, exif=exif)


def measure(digits: Any, labels: list[int], folder: str, seed: int, condition: str) -> str:
    """How many of the digits are read correctly in this condition, read wrong, and rejected."""
    reference, make, wrong, rejected = load_reference("cpu"), CONDITIONS[condition], 0, 0
    for i, (digit, label) in enumerate(zip(digits, labels)):
        rng, path = np.random.default_rng([seed, i]), Path(folder) / f"{condition.replace(' ', '-')}-{i}-{label}.jpg"
        save(make(enlarge(digit), rng), path, condition, rng)
        try:
            read = reference.read(read_photo(path) / 255)[1].tolist()
            if read != [label]:
                wrong += 1
                print(f"{path.name}: read as {', '.join(map(str, read))}", file=sys.stderr)
        except OSError as reason:
            rejected += 1
            print(reason, file=sys.stderr)
    accuracy = 1 - (wrong + rejected) / len(digits)
    error = math.sqrt(accuracy * (1 - accuracy) / len(digits))
    return f"{accuracy:7.1%} ± {error:.1%}  {wrong} wrong, {rejected} rejected"


def main(argv: list[str] | None = None) -> None:
    parser = flags.ArgumentParser("photo.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--count", type=positive, default=300, help="digits")
    add("--seed", type=flags.number(int, 0), default=0, help="of the choice and the pages")
    add("--condition", choices=list(CONDITIONS), help="only this one")
    add("--processes", type=positive, default=os.cpu_count(), help="at a time")
    add("--save", metavar="DIR", help="keep the pages in this folder")
    args = parser.parse_args(argv)
    images, labels = load("mnist", args.data_dir, train=False)
    chosen = np.random.default_rng(args.seed).choice(len(images), args.count, replace=False)
    original = load_reference("cpu").read(images[chosen] / 255)[1] == labels[chosen]
    print(f"{'MNIST itself':24} {original.double().mean():7.1%}")
    names = [args.condition] if args.condition else list(CONDITIONS)
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        folder = args.save or temporary
        Path(folder).mkdir(exist_ok=True)
        digits = images[chosen, 0].numpy(), labels[chosen].tolist(), folder, args.seed
        for name, row in zip(names, pool.map(partial(measure, *digits), names)):
            print(f"{name:24} {row}", flush=True)


if __name__ == "__main__":
    run_script(main)
