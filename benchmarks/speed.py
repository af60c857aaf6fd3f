"""Milliseconds per step of this repository's loop, eager and compiled, beside the ordinary loop and JAX.

python benchmarks/speed.py --data-dir data                  # with one thread and with two
python benchmarks/speed.py --data-dir data --threads 1 --cases "mlp batch 32"
python benchmarks/speed.py --data-dir data --device cuda
python benchmarks/speed.py --data-dir data --profile        # where the time of our steps goes

The ordinary loop is that of pytorch/examples (classifiers) and of PyTorch-GAN (generators). Same networks, batch size,
optimizer and data. Each loop runs in a process of its own, pinned to so many cores; they take turns, so that a noisy
machine slows all alike, and the ratio of each turn counts. Each prints the loss of the very steps that were timed.
Beside them stands the least that a step could take on this machine: its matrix products at the rate of a product of two
1024 x 1024 matrices, and the optimizer's reads and writes at the rate of a copy. Writes speed-DEVICE.json and its
chart, or profile-DEVICE.txt, into benchmarks/results/. JAX takes part if it is installed: benchmarks/requirements.txt.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ordinary_loops
import train_cgan
import train_classifier
import train_gan
import utils
from datasets import Batches, load
from engine.device import pick_device
from engine.flags import parse_args
from engine.provenance import environment
from models import CLASSIFIERS, GANS
from models.cgan import ConditionalDiscriminator, ConditionalGenerator

CASES = {  # name -> training script and its flags
    "mlp batch 32": (train_classifier, ["--model", "mlp"]),
    "cnn batch 32": (train_classifier, ["--model", "cnn"]),
    "cnn batch 32 --amp": (train_classifier, ["--model", "cnn", "--amp"]),
    "maxout batch 100": (train_classifier, ["--recipe", "paper"]),
    "gan batch 16": (train_gan, []),
    "gan paper batch 100": (train_gan, ["--recipe", "paper"]),
    "cgan batch 16": (train_cgan, []),
    "cgan paper batch 100": (train_cgan, ["--recipe", "paper"]),
}
LOOPS = {  # device -> loop -> how it is prepared, and what with
    "cpu": {
        "ordinary": ("ordinary", 0),
        "ours": ("ours", []),
        "ours, compiled": ("ours", ["--compile"]),
        "JAX": ("in_jax", None),
    },
    "cuda": {
        "ordinary": ("ordinary", 0),
        "ordinary, 4 workers": ("ordinary", 4),
        "ours, eager": ("ours", ["--no-cuda-graph"]),
        "ours": ("ours", []),
        "ours, compiled": ("ours", ["--compile"]),
    },
}


def parse(case, flags, device, folder):
    """The script of a case, and its options without what the ordinary loop lacks."""
    script, own = CASES[case]
    with contextlib.redirect_stdout(None):
        flags = [*own, *flags, "--device", device, "--output-dir", str(Path(folder) / "run")]
        if script is not train_classifier:
            flags += ["--r1", "0"]
        args = parse_args(script.get_args_parser(), script.RECIPES, argv=flags)
    args.ema = args.max_norm = None
    return script, args


# The loops ------------------------------------------------------------------------------------------------------------


def ordinary(case, device, workers, data_dir, folder, steps):
    """A function that runs the steps in the ordinary loop, and None."""
    script, args = parse(case, [], device, folder)
    torch.manual_seed(0)
    transform = transforms.ToTensor()
    if script is train_classifier:
        transform = transforms.Compose([transform, transforms.Normalize((0.5,), (0.5,))])
        networks = [CLASSIFIERS[args.model]()]
    elif script is train_gan:
        networks = [network() for network in GANS[args.networks]]
    else:
        networks = [ConditionalGenerator(args.dropout_g), ConditionalDiscriminator(args.dropout_d)]
    networks = [network.to(device) for network in networks]
    if args.optimizer == "sgd":
        optimizers = [torch.optim.SGD(network.parameters(), args.lr, args.momentum) for network in networks]
    else:
        optimizers = [torch.optim.Adam(network.parameters(), args.lr, args.betas) for network in networks]
    loader = ordinary_loops.make_loader(data_dir, folder, transform, args.batch_size, steps, workers, device)
    if script is train_classifier:
        return lambda: ordinary_loops.train_classifier(*networks, *optimizers, loader, device), None
    return lambda: ordinary_loops.train_gan(
        *networks, *optimizers, loader, device, conditional=script is train_cgan
    ), None


def ours(case, device, flags, data_dir, folder, steps):
    """A function that runs the steps in this repository's loop, and what a step computes and moves."""
    script, args = parse(case, flags, device, folder)
    device = pick_device(device)
    images, labels = load("mnist", data_dir)
    count = args.batch_size * steps
    black = args.black if script is train_classifier else 0.0
    batches = Batches(images[:count], labels[:count], args.batch_size, device, black=black)
    state, train_step, _ = script.build(args, device, batches)
    run = utils.Run(args, state)
    run.meter = utils.Meter()
    with FlopCounterMode(display=False) as counter:
        train_step(*batches.take(next(batches.rows(0))))
    work = {"flops": counter.get_total_flops(), "bytes": sum(map(bytes_moved, run.optimizers()))}
    step = utils.make_step(run, train_step, batches)

    def epoch():
        utils.train_epoch(run, step, batches, signals=[])
        row = run.end_epoch(run.meter.means())
        run.meter.reset()
        return {name: row[name] for name in ("loss", "accuracy", "loss_d", "loss_g") if name in row}

    return epoch, work


def bytes_moved(optimizer):
    """Bytes that one update reads and writes: weights, gradients, and the optimizer's own tensors of their size."""
    own = {torch.optim.Adam: 2, torch.optim.AdamW: 2, torch.optim.SGD: 1}[type(optimizer)]
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return 4 * weights * (2 * (1 + own) + 1)


def in_jax(case, device, _, data_dir, folder, steps):
    """A function that runs the steps in JAX, and None."""
    import jax_loops

    _, args = parse(case, [], device, folder)
    images, labels = load("mnist", data_dir)
    count = args.batch_size * steps
    epoch = jax_loops.build(case, args, images[:count].flatten(1).numpy(), labels[:count].numpy())
    return lambda: epoch(torch.randperm(count).view(steps, args.batch_size).numpy()), None


# Measuring ------------------------------------------------------------------------------------------------------------


def work(prepare, threads, arguments, pipe):
    """In a process of its own: time one turn whenever the pipe asks for it."""
    with contextlib.redirect_stdout(None):
        torch.set_num_threads(threads or torch.get_num_threads())
        epoch, cost = globals()[prepare](*arguments)
        pipe.send(cost)
        while pipe.recv():
            started = time.perf_counter()
            metrics = epoch()
            pipe.send((time.perf_counter() - started, metrics))


def cores():
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def pin(own):
    """Let this process, and those that it starts, use these cores alone, where the system allows it."""
    torch.set_num_threads(len(own))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)


def compare(case, device, threads, data_dir, folder, steps, turns):
    """Milliseconds a step of each loop in each turn, the metrics of its last turn, and the machine's limit."""
    context = multiprocessing.get_context("spawn")
    pipes, times, metrics = {}, {name: [] for name in LOOPS[device]}, {}
    for name, (prepare, more) in LOOPS[device].items():
        pipes[name], there = context.Pipe()
        arguments = (case, device, more, data_dir, tempfile.mkdtemp(dir=folder), steps)
        # No daemon, since the ordinary loop's workers are its children.
        context.Process(target=work, args=(prepare, threads, arguments, there)).start()
        there.close()  # so that recv fails, instead of waiting for ever, where that process has died
    costs = [pipe.recv() for pipe in pipes.values()]
    cost = next(cost for cost in costs if cost)
    limits = []
    for turn in range(turns + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, metrics[name] = pipe.recv()
            if turn:  # the first one warms up, and compiles
                times[name].append(1000 * seconds / steps)
        limits.append(1000 * (cost["flops"] / product_rate(device) + cost["bytes"] / copy_rate(device)))
    for pipe in pipes.values():
        pipe.send(False)
    return times, metrics, statistics.median(limits[1:])


def product_rate(device):
    """Floating-point operations a second of a product of two 1024 x 1024 matrices."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    return 2 * 1024**3 / fastest(lambda: a @ b, device)


def copy_rate(device):
    """Bytes read and written a second by a copy of 64 MB."""
    source = torch.randn(16 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / fastest(lambda: target.copy_(source), device)


def fastest(run, device):
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def summary(times, metrics, limit):
    """Of each loop: median milliseconds, its metrics, and how often it fits into the time of the others."""
    loops = {}
    for name, own in times.items():
        loops[name] = {"ms": statistics.median(own), "metrics": metrics[name], "times_as_fast_as": {}}
        for other, theirs in times.items():
            ratios = sorted(theirs[i] / own[i] for i in range(len(own)))
            loops[name]["times_as_fast_as"][other] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return {"limit_ms": limit, "loops": loops}


def profiled(case, device, data_dir, folder, steps):
    """The operations that take most of our steps' time, as a table."""
    epoch, _ = ours(case, device, ["--no-cuda-graph"], data_dir, folder, steps)
    epoch()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        epoch()
    operations = profiler.key_averages()
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    total = sum(getattr(operation, own) for operation in operations)  # in microseconds
    lines = [f"{case}: {total / steps / 1000:.2f} ms a step in operations, {steps} steps"]
    for operation in sorted(operations, key=lambda operation: -getattr(operation, own))[:8]:
        spent, calls = getattr(operation, own), operation.count / steps
        share = f"{spent / steps / 1000:7.3f} ms {100 * spent / total:5.1f} %"
        lines.append(f"  {operation.key:40} {share} {calls:6.1f} calls")
    return "\n".join(lines)


def print_row(case, row):
    for name, loop in row["loops"].items():
        median, low, high = loop["times_as_fast_as"]["ordinary"]
        share = f"{100 * row['limit_ms'] / loop['ms']:4.0f} % of the machine's limit"
        reached = "  ".join(f"{name} {value:.4f}" for name, value in loop["metrics"].items())
        ratio = f"{median:6.2f}x ({low:.2f} to {high:.2f})"
        print(f"{case:31} {name:20} {loop['ms']:7.3f} ms a step {ratio} {share}  {reached}")
    print(flush=True)


def draw(rows, path):
    figure = Figure(figsize=(9, 0.9 * len(rows) + 1.5), layout="constrained")
    axis = figure.add_subplot()
    names = list(next(iter(rows.values()))["loops"])
    for i, name in enumerate(names):
        places = [place + 0.8 * (i + 0.5) / len(names) - 0.4 for place in range(len(rows))]
        axis.barh(places, [row["loops"][name]["ms"] for row in rows.values()], 0.8 / len(names), label=name)
    for place, row in enumerate(rows.values()):
        axis.vlines(row["limit_ms"], place - 0.4, place + 0.4, "black", label=None if place else "the machine's limit")
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="milliseconds a step", xscale="log")
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--device", choices=list(LOOPS), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--steps", type=int, default=150, help="steps of each loop in a turn (default: 150)")
    parser.add_argument("--turns", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of each loop (default: 1 2)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which (default: all)")
    parser.add_argument("--profile", action="store_true", help="only show where the time of our steps goes")
    args = parser.parse_args()
    pick_device(args.device)  # the machine's limit is measured with its settings too
    if args.profile:
        tables = []
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                tables.append(profiled(case, args.device, args.data_dir, folder, args.steps))
        machine = "{processor}, {threads} threads, gpu: {gpu}, torch {torch}".format(**environment())
        text = "\n\n".join([machine, *tables]) + "\n"
        (ROOT / "benchmarks" / "results" / f"profile-{args.device}.txt").write_text(text)
        print(text)
        return
    if importlib.util.find_spec("jax") is None:
        LOOPS["cpu"].pop("JAX")
    rows, allowed = {}, cores()
    for threads in args.threads if args.device == "cpu" else [0]:
        if threads:
            pin(allowed[:threads])  # the machine's limit is measured with them too
        for case in args.cases:
            name = f"{case}, {threads} thread{'s' * (threads > 1)}" if threads else case
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = summary(
                    *compare(case, args.device, threads, args.data_dir, folder, args.steps, args.turns)
                )
            print_row(name, rows[name])
    result = {"rows": rows, "steps": args.steps, "turns": args.turns, **environment()}
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / f"speed-{args.device}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, ROOT / "benchmarks" / "results" / f"speed-{args.device}.png")


if __name__ == "__main__":
    main()
