"""How many photos of handwriting are read correctly: rendered pages, with all that can spoil a photo, and real photos.

python benchmarks/photo.py --data-dir data  # keeps the pages in runs/pages
python benchmarks/photo.py --real FOLDER    # real photos, listed in FOLDER/labels.csv: file,label,kind

Rendered: each of 300 of MNIST's test digits is put on a page of 600x600 pixels, once for each condition. Every picture
is read as `evaluate.py weights/cnn.pt --image` reads it, and by ten lines with Otsu's threshold for comparison.
Refused: an error message instead of a number, which is right for the label "refuse". With --record, the rows go into
benchmarks/results/photo.json, from which tables.py makes the table in docs/results.md.
"""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import load
from engine import flags
from engine.errors import DataError, run_script
from engine.provenance import environment
from evaluate import read_number, read_picture
from measures.trained import classify, load_model
from photos import open_image
from photos.pieces import centre, trim

RESULTS = ROOT / "benchmarks" / "results" / "photo.json"
PAGE = 600
Y, X = np.mgrid[:PAGE, :PAGE]
EDGES = (Y, PAGE - Y, X, PAGE - X)  # of each pixel, the distance from each edge of the page
WHITE, BLACK = (245, 243, 238), (35, 35, 45)  # paper and ink


# What a page is made of: `ink` [H, W] from 0 to 1, and colours [H, W, 3] from 0 to 255 --------------------------------


def enlarge(digit, size):
    """An MNIST digit as ink with smooth edges, [size, size]."""
    large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip((np.asarray(large) / 255 - 0.25) / 0.5, 0, 1)


def row(inks, rng, gaps, slope=0.0):
    """Digits beside each other, `gaps` pixels apart (least, most), each higher than its left neighbour if it slants."""
    page, left = np.zeros((PAGE, PAGE)), 0
    for ink in map(trim, inks):
        top = round(PAGE / 2 - slope * left - ink.shape[0] / 2 + rng.uniform(-4, 4))
        page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        left += ink.shape[1] + rng.integers(*gaps)
    return trim(page)


def place(ink, rng, margin=40):
    """Put the ink at a random place of a page."""
    ink = trim(ink)
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
    across = (Y + slope * X + rng.uniform(0, distance)) % distance
    return np.clip(width / 2 + 0.5 - abs(across - distance / 2), 0, 1)


def grain(rng, strength, smooth=1.0):
    """The paper's grain, or a sensor's noise, [H, W, 1]."""
    noise = ndimage.gaussian_filter(rng.standard_normal((PAGE, PAGE)), smooth)
    return strength * (noise / noise.std())[..., None]


# The conditions: each makes a page of a digit's ink -------------------------------------------------------------------


def clean(ink, rng):
    return paint(place(ink, rng))


def dark_edge(ink, rng):
    """The page ends within the photo; a dark table shows on one side, or on two."""
    page = paint(place(ink, rng, margin=130))
    table = np.zeros((PAGE, PAGE))
    for edge in rng.permutation(4)[: rng.integers(1, 3)]:
        table[EDGES[edge] < rng.uniform(10, 110) + rng.uniform(-0.03, 0.03) * (X + Y)] = 1
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


def thin_pen(ink, rng):
    """Only the middle of each stroke is left, 3 pixels wide."""
    depth = ndimage.distance_transform_edt(ink > 0.5)
    ridge = (depth > 0) & (depth >= ndimage.maximum_filter(depth, 3) - 0.5)
    return clean(ndimage.gaussian_filter(ndimage.binary_dilation(ridge, np.ones((3, 3))).astype(float), 0.7), rng)


def thick_marker(ink, rng):
    """8 pixels wider."""
    return clean(ndimage.maximum_filter(ink, footprint=np.hypot(*np.mgrid[-4:5, -4:5]) <= 4), rng)


def in_a_box(ink, rng):
    """A rectangle around the digit, drawn with the same ink."""
    page = place(ink, rng, margin=80)
    rows, columns = page.any(1).nonzero()[0], page.any(0).nonzero()[0]
    left, top, right, bottom = (
        side + sign * rng.integers(12, 50)
        for side, sign in ((columns[0], -1), (rows[0], -1), (columns[-1], 1), (rows[-1], 1))
    )
    frame = Image.new("L", (PAGE, PAGE))
    corners = [(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)) for x in (left, right) for y in (top, bottom)]
    for a, b in ((0, 1), (1, 3), (3, 2), (2, 0)):
        ImageDraw.Draw(frame).line([corners[a], corners[b]], 255, int(rng.integers(3, 11)))
    return paint(np.maximum(page, np.asarray(frame) / 255))


def cell(ink, rng):
    """The picture is cut out of a table: the four lines of the cell run along its edges."""
    page, lines = place(ink, rng, margin=110), np.zeros((PAGE, PAGE))
    for depth in EDGES:
        across, slope = X + Y - np.minimum(depth, PAGE - depth), rng.uniform(-0.02, 0.02)
        lines[abs(depth + slope * across - rng.uniform(20, 80)) < rng.uniform(2, 10)] = 1
    return paint(np.maximum(page, ndimage.gaussian_filter(lines, 1)))


def shows_through(ink, rng):
    """The writing on the back of the sheet, mirrored, can be seen."""
    return mix(place(ink, rng), paint(place(ink[:, ::-1], rng), colour=(222, 219, 213)), BLACK)


def fold(ink, rng):
    """A dark crease across the page."""
    return clean(ink, rng) * (1 - 0.4 * np.exp(-(((ramp(rng) - rng.uniform(-0.4, 0.4)) / 0.01) ** 2)))[..., None]


def slanting_row(inks, rng):
    return clean(row(inks, rng, (15, 50), rng.uniform(0.1, 0.4) * rng.choice([-1, 1])), rng)


def close_together(inks, rng):
    return clean(row(inks, rng, (1, 8)), rng)


CONDITIONS: dict[str, Callable] = {
    "clean": clean,
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
    "thin pen": thin_pen,
    "thick marker": thick_marker,
    "in a box": in_a_box,
    "cell with its lines": cell,
    "slanting row": slanting_row,
    "digits close together": close_together,
    # Made when the reader was finished; "low light" then changed its threshold.
    "white on blue": lambda ink, rng: paint(place(ink, rng), (40, 75, 160), (235, 240, 250)) + grain(rng, 4),
    "shows through": shows_through,
    "fold": fold,
    "motion blur": lambda ink, rng: ndimage.uniform_filter1d(clean(ink, rng), 15, axis=rng.integers(2)),
    "low light": lambda ink, rng: 0.15 * clean(ink, rng) + grain(rng, 4),
    "far away": lambda ink, rng: clean(ndimage.zoom(ink, 0.25, order=1), rng),
}
ROWS = {"slanting row": 4, "digits close together": 3}  # on each page; of the other conditions, one


def render(digits: Any, labels: list[int], folder: Path, condition: str, seed: int = 0) -> list[tuple[Path, str]]:
    """A page for each digit, beside which the digits that follow make a row. Returns the files, and what they show."""
    count, pages = ROWS.get(condition, 1), []
    for i in range(len(digits)):
        rng, own = np.random.default_rng([seed, i]), [(i + k) % len(digits) for k in range(count)]
        inks = [enlarge(digits[k], 150 if count == 1 else 100) for k in own]
        page = CONDITIONS[condition](inks[0] if count == 1 else inks, rng)
        shown = "".join(str(labels[k]) for k in own)
        pages.append((folder / f"{condition.replace(' ', '-')}-{i}-{shown}.jpg", shown))
        Image.fromarray(page.clip(0, 255).round().astype(np.uint8)).save(pages[-1][0], quality=90)
    return pages


# Reading --------------------------------------------------------------------------------------------------------------


def otsu(path: Path, model: Any) -> str:
    """The baseline's answer: Otsu's threshold, each component fitted into 20x20, its centre of mass in the middle."""
    grey = np.asarray(open_image(path, 1000).convert("L"), np.float32)
    numbers, edges = np.histogram(grey, 256)
    below, sums = numbers.cumsum(), (numbers * edges[:-1]).cumsum()
    means, rest = sums / below.clip(1), (sums[-1] - sums) / (below[-1] - below).clip(1)
    dark = grey < edges[(below * (below[-1] - below) * (means - rest) ** 2).argmax() + 1]
    labels, _ = ndimage.label(dark if dark.mean() < 0.5 else ~dark, np.ones((3, 3)))
    boxes = ndimage.find_objects(labels)
    tall = max((box[0].stop - box[0].start for box in boxes), default=0)
    kept = [k for k, box in enumerate(boxes) if box[0].stop - box[0].start > 0.4 * tall]
    images = [centre(labels[boxes[k]] == k + 1) for k in sorted(kept, key=lambda k: boxes[k][1].start)]
    return "".join(map(str, classify(model, np.stack(images) / 255).argmax(1).tolist())) if images else "refuse"


def count(pictures: Iterable[tuple[Path, str]]) -> dict[str, int]:
    """How many pictures were read right, wrong, refused, and unsure; and right by Otsu's threshold."""
    torch.set_num_threads(1)
    model, counts = load_model("weights/cnn.pt"), dict.fromkeys(("right", "wrong", "refused", "unsure", "otsu"), 0)
    for path, label in pictures:
        try:
            found = read_number(model, read_picture(model, path))[1]
        except DataError:
            found = "refuse"
        kind = "right" if found == label else {"refuse": "refused"}.get(found, "wrong")
        counts["unsure" if "unsure" in found else kind] += 1
        if found != label:
            print(f"{path}: read as {found}", file=sys.stderr)
        counts["otsu"] += otsu(path, model) == label
    return counts


def real_pictures(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """Of each kind in labels.csv, the files and what they show."""
    kinds: dict[str, list[tuple[Path, str]]] = {}
    with (folder / "labels.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            kinds.setdefault(line["kind"], []).append((folder / line["file"], line["label"]))
    return kinds


def rendered_pages(data_dir: str, number: int) -> dict[str, list[tuple[Path, str]]]:
    """Of each condition, the pages of the same digits, in runs/pages, and what they show."""
    images, labels = load("mnist", data_dir, train=False)
    chosen, folder = np.random.default_rng(0).choice(len(images), number, replace=False), Path("runs", "pages")
    folder.mkdir(parents=True, exist_ok=True)
    digits = images[chosen, 0].numpy(), labels[chosen].tolist(), folder
    return {condition: render(*digits, condition) for condition in CONDITIONS}


def main() -> None:
    parser = flags.ArgumentParser("photo.py", __doc__)
    add = parser.add_argument
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--real", metavar="FOLDER", type=Path, help="real photos instead of rendered pages")
    add("--count", type=flags.number(int, 1), default=300, help="digits")
    add("--record", action="store_true", help="write the rows to benchmarks/results/photo.json")
    args = parser.parse_args()
    kinds = real_pictures(args.real) if args.real else rendered_pages(args.data_dir, args.count)
    rows = {}
    print(f"{'':24} {'right':>7} {'wrong':>7} {'refused':>7} {'unsure':>7} {'otsu':>7}")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name, counts in zip(kinds, pool.map(count, kinds.values())):
            rows[name] = counts
            print(f"{name:24} {' '.join(f'{value:7}' for value in counts.values())}", flush=True)
    if args.record:
        kept = json.loads(RESULTS.read_text())
        kept["real" if args.real else "rendered"] = {"rows": rows, **environment()}
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
