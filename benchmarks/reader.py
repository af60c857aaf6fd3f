"""Train the network of photos/reader.py, which tells a digit from everything else, and write weights/reader.npz.

python benchmarks/reader.py --data-dir data    # a quarter of an hour on one core

It is trained on MNIST's training images, drawn with other pens and distorted; on drawn 1s with a flag and 7s with a
bar, as in Europe, of which MNIST has few; and on what is no digit: digits that touch, parts of digits, frames, lines,
blobs. All are made into images like the pieces of a photo.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import load
from engine import flags
from engine.errors import run_script
from photos.pieces import normalise, trim
from photos.reader import WEIGHTS, Network
from weights import write_sums

SIZE = 112  # pixels of a canvas
DIGITS, EUROPEAN, OTHERS = 42_000, 12_000, 24_000
EPOCHS, BATCH = 5, 256


# Strokes --------------------------------------------------------------------------------------------------------------


def large(digit):
    return Image.fromarray(digit).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def bend(canvas, rng, most=1.0):
    """Turn, shear and stretch a canvas."""
    angle, shear, stretch = rng.normal(0, (0.1, 0.12, 0.12)) * most
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = 1.15 * turn @ [[np.exp(stretch), shear], [0, np.exp(-stretch)]]
    shift = SIZE / 2 * (1 - matrix.sum(1))
    values = np.column_stack([matrix, shift]).ravel().tolist()
    return canvas.transform((SIZE, SIZE), Image.Transform.AFFINE, values, Image.Resampling.BILINEAR)


def pen(canvas, rng):
    """The mask of a canvas, its strokes thinner or thicker, half of them with ragged edges."""
    grey = np.asarray(canvas, np.float32)
    if (ragged := rng.choice([0, 20, 40], p=[0.5, 0.35, 0.15])) > 0:
        noise = Image.fromarray(rng.normal(0, ragged, (28, 28)).astype(np.float32))
        grey = grey + np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    mask, wider = grey > rng.uniform(70, 170), rng.choice([-2, -1, 0, 1, 2, 4], p=[0.1, 0.15, 0.35, 0.2, 0.1, 0.1])
    if wider > 0:
        return ndimage.distance_transform_edt(~mask) <= wider
    thin = ndimage.distance_transform_edt(mask) > -wider if wider < 0 else mask
    return thin if thin.sum() > 0.5 * mask.sum() else mask


def stroke(canvas, points, width, smooth=0):
    """Draw a line through points, with its corners cut twice if it is smooth."""
    points = np.asarray(points, float)
    for _ in range(smooth):
        cut = [0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]]
        points = np.concatenate([points[:1], np.stack(cut, 1).reshape(-1, 2), points[-1:]])
    draw = ImageDraw.Draw(canvas)
    draw.line([*map(tuple, points)], 255, width, joint="curve")
    for x, y in points:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)


# Digits ---------------------------------------------------------------------------------------------------------------


def from_mnist(image, label, rng):
    canvas = large(image)
    if label == 7 and rng.random() < 0.3:  # with a bar across its stem
        rows = np.flatnonzero(np.asarray(canvas).max(1) > 127)
        y = rows[0] + np.ptp(rows) * rng.uniform(0.42, 0.65)
        x, tilt = np.flatnonzero(np.asarray(canvas)[int(y)] > 80).mean(), rng.normal(0, 3)
        left, right = rng.uniform(9, 24, 2)
        stroke(canvas, [(x - left, y + tilt), (x + right, y - tilt)], int(rng.integers(5, 10)))
    mask = pen(bend(canvas, rng), rng)
    if rng.random() < 0.1:  # cut off a little, as beside a neighbour
        y, x = np.nonzero(mask)
        across = x * np.cos(angle := rng.uniform(0, 2 * np.pi)) + y * np.sin(angle)
        far = across > np.quantile(across, rng.uniform(0.94, 1))
        mask[y[far], x[far]] = False
    return mask


def european_one(rng):
    """A stem with a flag, sometimes with a foot."""
    canvas, width = Image.new("L", (SIZE, SIZE)), int(rng.integers(4, 13))
    top, bottom = np.array([60 + rng.normal(0, 6), 22]), np.array([58 + rng.normal(0, 8), 92])
    angle, length = np.radians(rng.uniform(28, 68)), rng.uniform(14, 46)
    end = top + length * np.array([-np.cos(angle), np.sin(angle)])
    stroke(canvas, [end, (top + end) / 2 + rng.normal(0, 2.5, 2), top], width, 2)
    stroke(canvas, [top, (top + bottom) / 2 + rng.normal(0, 2, 2), bottom], width, 2)
    if rng.random() < 0.3:
        left, right = ((sign * rng.uniform(10, 26), rng.normal(0, 3)) for sign in (-1, 1))
        stroke(canvas, bottom + np.array([left, right]), width)
    return canvas


def european_seven(rng):
    """A top that may be wavy or begin with a serif, a stem, and mostly a bar across it."""
    canvas, width = Image.new("L", (SIZE, SIZE)), int(rng.integers(4, 13))
    left, right, top = 26 + abs(rng.normal(0, 10)), 80 + rng.normal(0, 5), 24 + rng.normal(0, 3)
    wave, reach = rng.choice([0, rng.uniform(4, 40)]), right - left
    points = np.array([(left, top + 11), (left + 3, top), (left + 0.35 * reach, top + 0.8 * wave),
                       (left + 0.55 * reach, top + wave), (right, top)]) + rng.normal(0, 2.5, (5, 2))  # fmt: skip
    stroke(canvas, points if wave or rng.random() < 0.5 else points[1:], width, 2)
    corner, foot = points[-1], np.array([rng.uniform(34, 80), 92])
    stroke(canvas, [corner, (foot + corner) / 2 + rng.normal(0, 4, 2), foot], width, 2)
    if wave > 14 or rng.random() < 0.65:
        at, tilt = corner + (foot - corner) * rng.uniform(0.4, 0.78), rng.normal(0, 4)
        stroke(canvas, at + np.array([(-rng.uniform(10, 30), tilt), (rng.uniform(10, 30), -tilt)]), width)
    return canvas


# What is no digit -----------------------------------------------------------------------------------------------------


def neighbours(images, rng):
    """Two or three digits that touch, or nearly."""
    page, left = np.zeros((SIZE, 4 * SIZE), bool), 0
    for image in images[rng.integers(len(images), size=rng.choice([2, 2, 3]))]:
        digit = trim(pen(bend(large(image), rng), rng))
        size = [max(1, round(rng.uniform(0.65, 1) * length)) for length in digit.shape[::-1]]
        digit = np.asarray(Image.fromarray(digit).resize(size))
        top = int(np.clip(SIZE / 2 - size[1] / 2 + rng.normal(0, 6), 0, SIZE - size[1]))
        page[top : top + size[1], left : left + size[0]] |= digit
        left = max(0, left + size[0] + int(rng.integers(-14, 12)))
    return page


def part(images, rng):
    """Half of a digit, if it is wide; others may look like a one or a nought."""
    mask = trim(pen(bend(large(images[rng.integers(len(images))]), rng), rng))
    mask = mask.T if (upright := rng.random() < 0.4) else mask
    cut = int(rng.uniform(0.35, 0.65) * len(mask))
    half = mask[:cut] if rng.random() < 0.5 else mask[cut:]
    half = trim(half) if half.any() else half
    half = half.T if upright else half
    return half if half.shape[1] > 0.75 * half.shape[0] else np.zeros((1, 1), bool)


def with_dirt(images, rng):
    """A digit with a blob beside it, or with a line across."""
    page, (y, x) = Image.new("L", (2 * SIZE, SIZE)), rng.integers(8, 100, 2)
    page.paste(bend(large(images[rng.integers(len(images))]), rng), (SIZE // 2, 0))
    mask, size = np.asarray(page) > 127, int(rng.integers(6, 22))
    if rng.random() < 0.4:
        x = int(rng.choice([rng.integers(30, 50), rng.integers(155, 175)]))
        mask, blob = mask.copy(), ndimage.gaussian_filter(rng.normal(size=(size, size)), size / 5) > 0
        mask[y : y + size, x : x + size] |= blob[: SIZE - y]
        return mask
    width, tilt = int(rng.integers(2, 7)), rng.normal(0, 3)
    stroke(page, [(rng.uniform(10, 80), y - tilt), (rng.uniform(144, 214), y + tilt)], width)
    if rng.random() < 0.4:
        stroke(page, [(60 + x, 2), (60 + x + tilt, SIZE - 2)], width)
    return np.asarray(page) > 127


def frame(images, rng):
    """Two to four sides of a frame, whose lines may cross, sometimes with a digit in it."""
    canvas, width = Image.new("L", (SIZE, SIZE)), int(rng.integers(2, 12))
    (top, left), (bottom, right) = rng.integers(4, 40, 2), rng.integers(72, 108, 2)
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    first, full, out = rng.integers(4), rng.random() < 0.6, rng.integers(0, 14) * (rng.random() < 0.5)
    for side in range(4):
        a, b = corners[(first + side) % 4], corners[(first + side + 1) % 4]
        if side < 2 or full or rng.random() < 0.4:
            stroke(canvas, [a - np.sign(b - a) * out, b + np.sign(b - a) * out], width)
    if full and rng.random() < 0.5:
        size = int(rng.integers(30, 70))
        digit = large(images[rng.integers(len(images))]).resize((size, size))
        canvas.paste(255, (int(left + rng.integers(0, 20)), int(top + rng.integers(0, 20))), digit)
    return np.asarray(canvas.rotate(rng.uniform(-8, 8))) > 127


def bar_or_blob(images, rng):
    if rng.random() < 0.4:
        canvas, tilt = Image.new("L", (SIZE, SIZE)), rng.uniform(-20, 20)
        stroke(canvas, [(8, 56 + tilt), (104, 56 - tilt)], int(rng.integers(2, 12)))
        return np.asarray(canvas) > 127
    noise = ndimage.gaussian_filter(rng.normal(size=(56, 56)), rng.uniform(1, 9))
    labels, _ = ndimage.label(noise > np.quantile(noise, rng.uniform(0.5, 0.9)))
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if rng.random() < 0.5 else labels > 0


OTHER = (neighbours, neighbours, neighbours, part, part, with_dirt, with_dirt, frame, frame, bar_or_blob)


def masks(images, labels, rng):
    """Yields each mask with its class; 10 is no digit."""
    for i in rng.permutation(len(images))[:DIGITS]:
        yield from_mnist(images[i], labels[i], rng), labels[i]
    for i in range(EUROPEAN):
        draw, label = ((european_one, 1), (european_seven, 7))[i % 2]
        yield pen(bend(draw(rng), rng, 0.7), rng), label
    for i in range(OTHERS):
        yield OTHER[i % len(OTHER)](images, rng), 10


def examples(images, labels, rng):
    """Images uint8 [N, 1, 28, 28] and their classes [N]."""
    made = [(normalise(trim(mask)), label) for mask, label in masks(images, labels, rng) if mask.sum() > 100]
    return torch.from_numpy(np.stack([image for image, _ in made])).unsqueeze(1), torch.tensor([y for _, y in made])


def train(images, labels):
    torch.manual_seed(0)
    network = Network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, EPOCHS * (len(images) // BATCH))
    for epoch in range(EPOCHS):
        right = 0
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            batch = torch.roll(images[rows], torch.randint(-1, 2, (2,)).tolist(), (2, 3)) / 255
            logits = network(batch.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows], label_smoothing=0.02).backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == labels[rows]).sum().item()
        print(f"epoch {epoch + 1}: training accuracy {right / len(images):.2%}", flush=True)
    return network.eval()


def main() -> None:
    parser = flags.ArgumentParser("reader.py", __doc__)
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST")
    args = parser.parse_args()
    images, labels = load("mnist", args.data_dir, train=True)
    made = examples(images[:, 0].numpy(), labels.tolist(), np.random.default_rng(0))
    print(f"{len(made[0])} examples", flush=True)
    network = train(*made)
    np.savez_compressed(WEIGHTS, **{name: value.half().numpy() for name, value in network.state_dict().items()})
    write_sums()
    images, labels = load("mnist", args.data_dir, train=False)
    with torch.no_grad():
        answers = torch.cat([network(part / 255) for part in images.split(1000)]).argmax(1)
    accuracy = (answers == labels).double().mean()
    print(f"wrote {WEIGHTS}, {WEIGHTS.stat().st_size / 1e6:.2f} MB: {accuracy:.2%} on MNIST's test images")


if __name__ == "__main__":
    run_script(main)
