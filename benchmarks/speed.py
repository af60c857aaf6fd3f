"""Steps per second of this repository's loop against the ordinary loop that a student would write.

python benchmarks/speed.py --data-dir data

Same networks, batch size and data. Each loop runs in a process of its own; the two take turns, so that a noisy machine
slows both alike, and the ratio of each turn counts. Writes results/speed.json.
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_classifier
import utils
from datasets import Batches, load
from datasets.mnist import find_idx, part_stems
from models import CLASSIFIERS

CASES = {  # name -> flags of train_classifier.py
    "mlp batch 32": ["--model", "mlp"],
    "cnn batch 32": ["--model", "cnn"],
    "cnn batch 32 --amp": ["--model", "cnn", "--amp"],
}


def ordinary_loader(data_dir, folder, batch_size, steps):
    """torchvision's MNIST, unpacked below `folder`, in a DataLoader."""
    for stem in part_stems("MNIST", "train") + part_stems("MNIST", "t10k"):
        source, target = find_idx(Path(data_dir) / stem), Path(folder) / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    data = MNIST(folder, train=True, transform=transform)
    return DataLoader(Subset(data, range(batch_size * steps)), batch_size=batch_size, shuffle=True)


def ordinary_epoch(model, optimizer, loader):
    losses, accuracies = [], []
    for images, labels in loader:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accuracies.append((logits.argmax(1) == labels).float().mean().item())


def ordinary(flags, data_dir, folder, steps):
    """A function that runs the steps in the ordinary loop."""
    args = parse(flags, folder)
    torch.manual_seed(0)
    model = CLASSIFIERS[args.model]()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=args.betas)
    loader = ordinary_loader(data_dir, folder, args.batch_size, steps)
    return lambda: ordinary_epoch(model, optimizer, loader)


def ours(flags, data_dir, folder, steps):
    """A function that runs the steps in this repository's loop."""
    args = parse(flags, folder)
    device = utils.pick_device("cpu")
    images, labels = load("mnist", data_dir)
    count = args.batch_size * steps
    batches = Batches(images[:count], labels[:count], args.batch_size, device, low=args.black)
    state, train_step, _ = train_classifier.build(args, device, len(batches))
    run = utils.Run(args, state)

    def epoch():
        utils.train_epoch(run, train_step, batches, signals=[])
        run.end_epoch({})

    return epoch


def parse(flags, folder):
    with contextlib.redirect_stdout(None):
        flags = [*flags, "--device", "cpu", "--output-dir", str(Path(folder) / "run")]
        return utils.parse_args(train_classifier.get_args_parser(), train_classifier.RECIPES, argv=flags)[0]


def work(prepare, arguments, pipe):
    """In a process of its own: time one turn whenever the pipe asks for it."""
    with contextlib.redirect_stdout(None):
        epoch = prepare(*arguments)
        while pipe.recv():
            started = time.perf_counter()
            epoch()
            pipe.send(time.perf_counter() - started)


def compare(flags, data_dir, folder, steps, turns):
    """Milliseconds a step of the ordinary loop and of ours, a pair for each turn."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for prepare in (ordinary, ours):
        here, there = context.Pipe()
        arguments = (flags, data_dir, tempfile.mkdtemp(dir=folder), steps)
        context.Process(target=work, args=(prepare, arguments, there), daemon=True).start()
        pipes.append(here)
    pairs = []
    for turn in range(turns + 1):
        pair = []
        for pipe in pipes:
            pipe.send(True)
            pair.append(1000 * pipe.recv() / steps)
        if turn:  # the first one warms up
            pairs.append(pair)
    for pipe in pipes:
        pipe.send(False)
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each loop in a turn (default: 300)")
    parser.add_argument("--turns", type=int, default=9, help="turns (default: 9)")
    args = parser.parse_args()
    rows = {}
    for name, flags in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            pairs = compare(flags, args.data_dir, folder, args.steps, args.turns)
        ratios = sorted(first / second for first, second in pairs)
        rows[name] = {
            "ordinary_ms": statistics.median(pair[0] for pair in pairs),
            "ours_ms": statistics.median(pair[1] for pair in pairs),
            "ratio_median": statistics.median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
        }
    print(f"\n{'':20} {'ordinary':>9} {'ours':>9} {'ratio':>7}   of {args.turns} turns with {args.steps} steps")
    for name, row in rows.items():
        print(
            f"{name:20} {row['ordinary_ms']:6.2f} ms {row['ours_ms']:6.2f} ms {row['ratio_median']:6.2f}x  "
            f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        )
    result = {"rows": rows, "steps": args.steps, "turns": args.turns, **utils.environment()}
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "speed.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
