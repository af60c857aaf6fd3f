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

import train_cgan
import train_classifier
import train_gan
import utils
from datasets import Batches, load
from datasets.mnist import find_idx, part_stems
from models import CLASSIFIERS, GANS
from models.cgan import ConditionalDiscriminator, ConditionalGenerator

CASES = {  # name -> training script and its flags
    "mlp batch 32": (train_classifier, ["--model", "mlp"]),
    "cnn batch 32": (train_classifier, ["--model", "cnn"]),
    "cnn batch 32 --amp": (train_classifier, ["--model", "cnn", "--amp"]),
    "gan batch 16": (train_gan, []),
    "cgan batch 16": (train_cgan, []),
}


def ordinary_loader(data_dir, folder, transform, batch_size, steps):
    """torchvision's MNIST, unpacked below `folder`, in a DataLoader."""
    for stem in part_stems("MNIST", "train") + part_stems("MNIST", "t10k"):
        source, target = find_idx(Path(data_dir) / stem), Path(folder) / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
    data = MNIST(folder, train=True, transform=transform)
    return DataLoader(Subset(data, range(batch_size * steps)), batch_size=batch_size, shuffle=True)


def ordinary_classifier(model, optimizer, loader):
    losses, accuracies = [], []
    for images, labels in loader:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accuracies.append((logits.argmax(1) == labels).float().mean().item())


def ordinary_gan(generator, discriminator, optimizer_g, optimizer_d, loader, conditional):
    metrics = []
    for images, labels in loader:
        given = [labels] if conditional else []
        fakes = generator(torch.rand(len(images), 100), *given)
        real = discriminator.probability(images, *given)
        fake = discriminator.probability(fakes.detach(), *given)
        loss_d = -(torch.log(real) + torch.log(1 - fake)).mean()
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()
        loss_g = -torch.log(discriminator.probability(fakes, *given)).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        metrics.append((loss_d.item(), loss_g.item(), real.mean().item(), fake.mean().item()))


def ordinary(case, data_dir, folder, steps):
    """A function that runs the steps in the ordinary loop."""
    script, args = parse(case, folder)
    torch.manual_seed(0)
    transform = transforms.ToTensor()
    if script is train_classifier:
        transform = transforms.Compose([transform, transforms.Normalize((0.5,), (0.5,))])
        networks = [CLASSIFIERS[args.model]()]
    elif script is train_gan:
        networks = [network() for network in GANS[args.networks]]
    else:
        networks = [ConditionalGenerator(), ConditionalDiscriminator()]
    optimizers = [torch.optim.Adam(network.parameters(), lr=args.lr, betas=args.betas) for network in networks]
    loader = ordinary_loader(data_dir, folder, transform, args.batch_size, steps)
    if script is train_classifier:
        return lambda: ordinary_classifier(*networks, *optimizers, loader)
    return lambda: ordinary_gan(*networks, *optimizers, loader, conditional=script is train_cgan)


def ours(case, data_dir, folder, steps):
    """A function that runs the steps in this repository's loop."""
    script, args = parse(case, folder)
    device = utils.pick_device("cpu")
    images, labels = load("mnist", data_dir)
    count = args.batch_size * steps
    low, more = (args.black, []) if script is train_classifier else (0.0, [images.float().mean(0).flatten() / 255])
    batches = Batches(images[:count], labels[:count], args.batch_size, device, low=low)
    state, train_step, _ = script.build(args, device, len(batches), *more)
    run = utils.Run(args, state)

    def epoch():
        utils.train_epoch(run, train_step, batches, signals=[])
        run.end_epoch({})

    return epoch


def parse(case, folder):
    script, flags = CASES[case]
    with contextlib.redirect_stdout(None):
        flags = [*flags, "--device", "cpu", "--output-dir", str(Path(folder) / "run")]
        return script, utils.parse_args(script.get_args_parser(), script.RECIPES, argv=flags)[0]


def work(prepare, arguments, pipe):
    """In a process of its own: time one turn whenever the pipe asks for it."""
    with contextlib.redirect_stdout(None):
        epoch = prepare(*arguments)
        while pipe.recv():
            started = time.perf_counter()
            epoch()
            pipe.send(time.perf_counter() - started)


def compare(case, data_dir, folder, steps, turns):
    """Milliseconds a step of the ordinary loop and of ours, a pair for each turn."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for prepare in (ordinary, ours):
        here, there = context.Pipe()
        arguments = (case, data_dir, tempfile.mkdtemp(dir=folder), steps)
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
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            pairs = compare(name, args.data_dir, folder, args.steps, args.turns)
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
