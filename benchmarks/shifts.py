"""The test errors of classifiers that see each image several times, moved by up to one pixel (test-time augmentation).

python benchmarks/shifts.py runs/reproduce/resnet-best-*

The answer is the class with the highest mean probability over one view, five (also one pixel up, down, left and right),
or nine (also diagonally).
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.nn.functional import pad

from datasets import load
from engine.errors import run_script
from evaluate import classify, load_model
from photos import to_pixels

SHIFTS = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
VIEWS = (1, 5, 9)


def shift(images, dx, dy):
    """Images [N, 1, H, W] moved by dx pixels to the right and dy pixels down, -1 to 1; what comes in is black."""
    height, width = images.shape[-2:]
    return pad(images, (1, 1, 1, 1))[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]


def count_errors(model, images, labels):
    """How many answers are wrong, for each number of views."""
    batches = images.split(1000)
    views = torch.stack([torch.cat([classify(model, shift(batch, *each)) for batch in batches]) for each in SHIFTS])
    return [(views[:n].mean(0).argmax(1) != labels).sum().item() for n in VIEWS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder of a classifier of MNIST")
    parser.add_argument("--data-dir", default="data", help="folder of MNIST")
    args = parser.parse_args()
    images, labels = load("mnist", args.data_dir, train=False)
    pixels = to_pixels(images)
    print(f"errors in {len(labels)} images, with 1, 5 and 9 views", flush=True)
    errors = []
    for run in args.runs:
        errors.append(count_errors(load_model(run), pixels, labels))
        print("".join(f"{count:8}" for count in errors[-1]), f" {run}", flush=True)
    print("".join(f"{statistics.mean(column):8.1f}" for column in zip(*errors)), " mean")


if __name__ == "__main__":
    run_script(main)
