"""How the cost of the lecture's MLP grows: with the batch, with the width of its layers, with the number of images.

python benchmarks/scaling.py --data-dir data
python benchmarks/scaling.py --data-dir data --images 60000    # without the larger sets, which need 9 GB of disk

The curves show the time of a training step per image, eager and compiled, beside the least that the machine allows
(see benchmarks/speed.py), the median of several turns in which the two alternate. Each set of images is then trained
on twice, in a process of its own: once held in memory by `datasets.Batches`, once read from a file by the
StreamedBatches of docs/extending.md. Larger sets repeat MNIST. Writes benchmarks/results/scaling-DEVICE.json and .png.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import speed
import train_classifier
import utils
from datasets import Batches, load
from engine.device import pick_device
from engine.provenance import environment
from models import CLASSIFIERS
from models.mlp import MLP

ROOT = Path(__file__).resolve().parent.parent
BATCHES = [16, 32, 64, 256, 1024, 4096]
WIDTHS = [1, 2, 4, 8]
STEPS = 200  # of training on sets of images
LOOPS = {"eager": ["--no-cuda-graph"], "compiled": ["--compile"]}


class WideMLP(MLP):
    """The lecture's MLP, whose hidden layers are `width` times as wide."""

    def __init__(self, width, activation=nn.functional.relu, batch_norm=False, classes=10):
        super().__init__(activation, classes=classes)
        sizes = [28 * 28, 256 * width, 128 * width, 64 * width, classes]
        self.linear1, self.linear2, self.linear3, self.linear4 = map(nn.Linear, sizes[:-1], sizes[1:])


def curve(settings, device, data_dir, turns):
    """Microseconds per image of each loop and of the limit, for each (batch size, width)."""
    rows = []
    for batch_size, width in settings:
        CLASSIFIERS["wide"] = partial(WideMLP, width)
        speed.CASES["wide"] = (train_classifier, ["--model", "wide", "--batch-size", str(batch_size)])
        steps = min(60_000, 200 * batch_size, 400_000 // width) // batch_size
        epochs, times, last = {}, {name: [] for name in LOOPS}, {}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            for name, flags in LOOPS.items():
                epochs[name], cost = speed.ours("wide", device, flags, data_dir, f"{folder}/{name}", steps)
            for turn in range(turns + 1):
                for name, epoch in epochs.items():
                    started = time.perf_counter()
                    last[name] = epoch()
                    if turn:  # the first one warms up, and compiles
                        times[name].append(1e6 * (time.perf_counter() - started) / (steps * batch_size))
        limit = cost["flops"] / speed.product_rate(device) + cost["bytes"] / speed.copy_rate(device)
        row = {"batch_size": batch_size, "width": width, "limit": 1e6 * limit / batch_size, "losses": {}}
        for name in LOOPS:
            row[name] = statistics.median(times[name])
            row["losses"][name] = last[name]["loss"]
        rows.append(row)
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def streamed_batches():
    """The class StreamedBatches, as docs/extending.md shows it."""
    text = (ROOT / "docs" / "extending.md").read_text("utf-8")
    scope = {}
    exec(re.search(r"```python\n(# datasets/streamed.py\n.*?)```", text, re.DOTALL)[1], scope)
    return scope["StreamedBatches"]


def write_images(path, count, data_dir):
    """A .npy file of so many images, which repeat MNIST's; returns their labels."""
    images, labels = load("mnist", data_dir)
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 1, 28, 28))
    for start in range(0, count, len(images)):
        file[start : start + len(images)] = images[: count - start].numpy()
    file.flush()
    return labels.repeat(-(-count // len(images)))[:count]


def train_on(held, path, labels, device, folder, pipe):
    """In a process of its own: what training on these images costs, with batches of 256."""
    with contextlib.redirect_stdout(sys.stderr):
        script, args = speed.parse("mlp batch 32", ["--batch-size", "256"], device, folder)
        args.classes = [str(digit) for digit in range(10)]
        before = own_memory()
        if held:
            batches = Batches(torch.from_numpy(np.load(path)), labels, args.batch_size, device)
        else:
            batches = streamed_batches()(path, labels, args.batch_size, device)
        state, train_step, _ = script.build(args, torch.device(device), batches)
        run = utils.Run(args, state)
        run.meter = utils.Meter()
        step = utils.make_step(run, train_step, batches)
        waits, times = [], []
        for epoch in range(4):
            started = time.perf_counter()
            source = (batches.rows if held else batches.epoch)(epoch)
            step(*next(source))
            waits.append(time.perf_counter() - started)
            started = time.perf_counter()
            for batch in itertools.islice(source, STEPS):
                step(*batch)
            times.append(time.perf_counter() - started)
        image = 1e6 * statistics.median(times[1:]) / (STEPS * args.batch_size)
        pipe.send({"memory": own_memory() - before, "first_batch": statistics.median(waits[1:]), "image": image})


def own_memory():
    """Bytes that this process holds, without the pages of files that the system would take back."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def sources(counts, device, data_dir):
    """For each number of images, what training costs: held in memory, and read from a file."""
    context, rows = multiprocessing.get_context("spawn"), []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npy"
            labels = write_images(path, count, data_dir)
            for held in (True, False):
                here, there = context.Pipe()
                arguments = (held, path, labels, device, f"{folder}/{held}", there)
                context.Process(target=train_on, args=arguments).start()
                there.close()
                rows.append({"images": count, "source": "memory" if held else "file", **here.recv()})
                print(rows[-1], flush=True)
    return rows


def draw(batches, widths, images, path):
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, rows, key in ((left, batches, "batch_size"), (middle, widths, "width")):
        for name, style in (("eager", "o-"), ("compiled", "o-"), ("limit", "k--")):
            axis.plot([row[key] for row in rows], [row[name] for row in rows], style, label=name)
        axis.set(xscale="log", yscale="log", ylabel="µs per image")
        axis.set_xticks([row[key] for row in rows], [row[key] for row in rows])
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend()
    left.set_xlabel("batch size, the lecture's width")
    middle.set_xlabel("times the lecture's width, batch size 32")
    for source in ("memory", "file"):
        rows = [row for row in images if row["source"] == source]
        right.plot([row["images"] for row in rows], [row["memory"] / 1e9 for row in rows], "o-", label=f"from {source}")
        for row in rows:
            place = (row["images"], row["memory"] / 1e9)
            right.annotate(f"{row['image']:.0f} µs", place, (-8, 6), textcoords="offset points", ha="right")
    right.set(xscale="log", yscale="log", xlabel="images, batch size 256", ylabel="GB of memory (µs per image)")
    right.set_xlim(min(row["images"] for row in images) / 4)
    right.margins(y=0.15)
    right.yaxis.set_major_formatter("{x:g}")
    right.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--turns", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--images", type=int, nargs="+", default=[60_000, 10**6, 10**7], help="sizes of the sets")
    args = parser.parse_args()
    pick_device(args.device)  # the machine's limit is measured with its settings too
    batches = curve([(size, 1) for size in BATCHES], args.device, args.data_dir, args.turns)
    widths = curve([(32, width) for width in WIDTHS], args.device, args.data_dir, args.turns)
    images = sources(args.images, args.device, args.data_dir)
    path = ROOT / "benchmarks" / "results" / f"scaling-{args.device}"
    result = {"batches": batches, "widths": widths, "images": images, "turns": args.turns, **environment()}
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(batches, widths, images, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
