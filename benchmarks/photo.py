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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
WHITE, BLACK = (245, 243, 238), (35, 35, 45)  # paper and ink


# What a page is made of: `ink` [H, W] from 0 to 1, and colours [H, W, 3] from 0 to 255 --------------------------------


def enlarge(digit, size=DIGIT):
    """An MNIST digit with smooth edges, [size, size]."""
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
    """Paint with `colour` over what is there."""
    return under + ink[..., None] * (np.array(colour) - under)


def paint(ink, paper=WHITE, colour=BLACK):
    return mix(ink, np.broadcast_to(np.array(paper, float), (*ink.shape, 3)), colour)


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


# The conditions: each makes a page of one digit -----------------------------------------------------------------------


def clean(digit, rng):
    return paint(place(enlarge(digit), rng))


def specks(digit, rng):
    """Forty spots of dirt, anywhere, of up to 3 pixels' radius."""
    page = clean(digit, rng)
    for _ in range(40):
        radius, level = rng.uniform(0.5, 3), rng.uniform(0, 200)
        spot = np.hypot(*np.mgrid[-3:4, -3:4]) < radius
        top, left = rng.integers(PAGE - 7, size=2)
        page[top : top + 7, left : left + 7][spot] = level
    return page


def dark_edge(digit, rng):
    """The page ends within the photo; a dark table shows on one side, or on two."""
    page = place(enlarge(digit), rng, margin=130)
    table = np.zeros((PAGE, PAGE), bool)
    y, x = np.mgrid[:PAGE, :PAGE]
    for side in rng.permutation(4)[: rng.integers(1, 3)]:
        depth = (y, PAGE - y, x, PAGE - x)[side]
        table |= depth < rng.uniform(10, 110) + rng.uniform(-0.03, 0.03) * (x + y)
    return mix(ndimage.gaussian_filter(table.astype(float), 1), paint(page), rng.uniform(20, 90, 3))


def ruled_paper(digit, rng):
    slope = rng.uniform(-0.03, 0.03)
    page = mix(stripes(rng.uniform(28, 45), 2, rng, slope), paint(np.zeros((PAGE, PAGE))), (120, 150, 205))
    return mix(place(enlarge(digit), rng), page, BLACK)


def squared_paper(digit, rng):
    slope, distance = rng.uniform(-0.03, 0.03), rng.uniform(20, 32)
    page = mix(stripes(distance, 1.5, rng, slope), paint(np.zeros((PAGE, PAGE))), (140, 150, 165))
    page = mix(stripes(distance, 1.5, rng, slope).T, page, (140, 150, 165))
    return mix(place(enlarge(digit), rng), page, BLACK)


def dark_lines(digit, rng):
    """Ruled paper whose lines are as dark as the ink, but thinner."""
    lines = stripes(rng.uniform(28, 45), 2, rng, rng.uniform(-0.03, 0.03))
    return paint(np.maximum(lines, place(enlarge(digit), rng)))


def gradient(digit, rng):
    """The light falls to half across the page."""
    return clean(digit, rng) * (0.75 + 0.25 * ramp(rng))[..., None]


def shadow(digit, rng):
    """A shadow takes half of the light from a part of the page. Its edge may run through the digit."""
    edge = (ramp(rng) - rng.uniform(-0.4, 0.4)) / rng.uniform(0.01, 0.2)
    return clean(digit, rng) * (0.75 + 0.25 * np.tanh(edge))[..., None]


def noise(digit, rng):
    return clean(digit, rng) + grain(rng, 12, 0.5)


def blur(digit, rng):
    return ndimage.gaussian_filter(clean(digit, rng), (4, 4, 0))


def pencil(digit, rng):
    """A grey not much darker than the paper, broken by its grain."""
    ink = place(enlarge(digit), rng) * (0.8 + grain(rng, 0.15)[..., 0]).clip(0, 1)
    return paint(ink, (228, 226, 220), (150, 150, 155)) + grain(rng, 2)


def coloured(digit, rng):
    """Any paper and any ink whose brightness differs by 60 or more."""
    while True:
        paper, ink = rng.uniform(0, 255, (2, 3))
        if abs((paper - ink) @ (0.299, 0.587, 0.114)) >= 60:
            return paint(place(enlarge(digit), rng), paper, ink)


def chalk(digit, rng):
    """Light and broken strokes on a board with smears."""
    board = paint(np.zeros((PAGE, PAGE)), (45, 70, 58)) + grain(rng, 8, 30) + grain(rng, 3)
    ink = place(enlarge(digit), rng) * (0.8 + grain(rng, 0.2)[..., 0]).clip(0, 1)
    return mix(ink, board, (225, 228, 220))


def near_the_edge(digit, rng):
    """The digit stands 2 to 8 pixels from one edge of the page, or from two."""
    page = place(enlarge(digit), rng)
    for axis in rng.permutation(2)[: rng.integers(1, 3)]:
        drawn = page.any(1 - axis).nonzero()[0]
        gap = rng.integers(2, 9)
        page = np.roll(page, rng.choice([gap - drawn[0], PAGE - 1 - gap - drawn[-1]]), axis)
    return paint(page)


def thin_pen(digit, rng):
    """Only the middle of each stroke is left, 3 pixels wide."""
    depth = ndimage.distance_transform_edt(enlarge(digit) > 0.5)
    ridge = (depth > 0) & (depth >= ndimage.maximum_filter(depth, 3) - 0.5)
    return paint(
        place(ndimage.gaussian_filter(ndimage.binary_dilation(ridge, np.ones((3, 3))).astype(float), 0.7), rng)
    )


def thick_marker(digit, rng):
    """Strokes 8 pixels wider."""
    y, x = np.mgrid[-4:5, -4:5]
    return paint(place(ndimage.maximum_filter(enlarge(digit), footprint=np.hypot(x, y) <= 4), rng))


CONDITIONS = {
    function.__name__.replace("_", " "): function
    for function in (
        clean, specks, dark_edge, ruled_paper, squared_paper, dark_lines, gradient, shadow, noise, blur, pencil,
        coloured, chalk, near_the_edge, thin_pen, thick_marker,
    )
}  # fmt: skip
SAVED = {"jpeg at quality 30": clean, "turned by its exif tag": clean}  # special only in how the file is saved


def save(page, path, condition, rng):
    image = Image.fromarray(page.clip(0, 255).round().astype(np.uint8))
    exif = Image.Exif()
    if "exif" in condition:
        turn, tag = [(90, 6), (180, 3), (270, 8)][rng.integers(3)]
        image = image.rotate(turn, expand=True)
        exif[0x0112] = tag
    image.save(path, quality=30 if "jpeg" in condition else 90, exif=exif)


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(digits: Any, labels: list[int], folder: str, seed: int, condition: str) -> dict[str, float]:
    """How many of the digits are read correctly in this condition, read wrong, and rejected."""
    reference, make, wrong, rejected = load_reference("cpu"), {**CONDITIONS, **SAVED}[condition], 0, 0
    for i, (digit, label) in enumerate(zip(digits, labels)):
        rng, path = np.random.default_rng([seed, i]), Path(folder) / f"{condition.replace(' ', '-')}-{i}-{label}.jpg"
        save(make(digit, rng), path, condition, rng)
        try:
            read = reference.read(read_photo(path) / 255)[1].tolist()
            wrong += read != [label]
            problem = f"{path.name}: read as {', '.join(map(str, read))}" if read != [label] else ""
        except OSError as reason:
            rejected, problem = rejected + 1, str(reason)
        if problem:
            print(problem, file=sys.stderr)
    accuracy = 1 - (wrong + rejected) / len(digits)
    error = math.sqrt(accuracy * (1 - accuracy) / len(digits))
    return {"accuracy": accuracy, "standard_error": error, "wrong": wrong, "rejected": rejected}


def main(argv: list[str] | None = None) -> None:
    parser = flags.ArgumentParser("photo.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--count", type=positive, default=300, help="digits")
    add("--seed", type=flags.number(int, 0), default=0, help="of the choice and the pages")
    add("--condition", choices=[*CONDITIONS, *SAVED], help="only this one")
    add("--processes", type=positive, default=os.cpu_count(), help="at a time")
    add("--save", metavar="DIR", help="keep the pages in this folder")
    args = parser.parse_args(argv)
    images, labels = load("mnist", args.data_dir, train=False)
    chosen = np.random.default_rng(args.seed).choice(len(images), args.count, replace=False)
    original = load_reference("cpu").read(images[chosen] / 255)[1] == labels[chosen]
    print(f"{'MNIST itself':24} {original.double().mean():7.1%}")
    names = [args.condition] if args.condition else [*CONDITIONS, *SAVED]
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(args.processes) as pool:
        folder = args.save or temporary
        Path(folder).mkdir(exist_ok=True)
        digits = images[chosen, 0].numpy(), labels[chosen].tolist(), folder, args.seed
        for name, row in zip(names, pool.map(partial(measure, *digits), names)):
            print(
                "{:24} {accuracy:7.1%} ± {standard_error:.1%}  {wrong} wrong, {rejected} rejected".format(name, **row),
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
