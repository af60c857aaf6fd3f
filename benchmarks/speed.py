"""How fast this repository trains, beside the loops that most people write (baseline_loops.py) and JAX (jax_loops.py).

python benchmarks/speed.py steps       # milliseconds per step, eager and compiled, with one thread and with two
python benchmarks/speed.py race        # seconds from the start of the process to 99 % of the test images
python benchmarks/speed.py scaling     # the lecture's MLP: cost against batch size, width and number of images
python benchmarks/speed.py profile     # which operations take the time of the eager step

docs/speed.md says how it is measured. Into benchmarks/results/ go speed-DEVICE.json and the chart (steps), the chart of
scaling, and profile-DEVICE.txt. The others print what they measured.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize, ToTensor

import baseline_loops
import utils
from datasets import Batches, load
from engine import flags
from engine.device import pick_device
from engine.errors import run_script
from engine.provenance import environment
from models import CLASSIFIERS
from models.mlp import MLP

RESULTS = ROOT / "benchmarks" / "results"
CASES = {
    "mlp batch 32": "train_classifier.py --model mlp",
    "cnn batch 32": "train_classifier.py --model cnn",
    "cnn batch 32 --amp": "train_classifier.py --model cnn --amp",
    "maxout batch 100": "train_classifier.py --recipe paper",
    "gan batch 16": "train_gan.py --r1 0",
    "gan paper batch 100": "train_gan.py --recipe paper --r1 0",
    "cgan batch 16": "train_cgan.py --r1 0",
    "cgan paper batch 100": "train_cgan.py --recipe paper --r1 0",
}
Epoch = Callable[[], dict[str, float]]  # runs the steps of one turn; returns their mean metrics
Row = dict[str, Any]


class WideMLP(MLP):
    """The lecture's MLP, whose hidden layers are `width` times as wide."""

    def __init__(self, width, activation=nn.functional.relu, batch_norm=False, classes=10):
        super().__init__(activation, classes=classes)
        sizes = [28 * 28, 256 * width, 128 * width, 64 * width, classes]
        self.linear1, self.linear2, self.linear3, self.linear4 = map(nn.Linear, sizes[:-1], sizes[1:])


WIDTHS, BATCHES = [1, 2, 4, 8], [16, 32, 64, 256, 1024, 4096]
CLASSIFIERS.update({f"mlp-x{width}": partial(WideMLP, width) for width in WIDTHS})


# The loops: each returns an Epoch, and what a step computes and moves ({}: `ours` says it) ----------------------------


def prepare(command: str, *more: str) -> tuple[Any, argparse.Namespace]:
    """The script of a command, and its options without what the baseline lacks (EMA, weight limits; and R1 above)."""
    name, *own = command.split()
    script = importlib.import_module(name.removesuffix(".py"))
    with contextlib.redirect_stdout(None):
        args = flags.parse_args(script.get_args_parser(), script.RECIPES, argv=[*own, *more])
    args.ema = args.max_norm = None
    return script, args


def in_memory(args: argparse.Namespace, data_dir: str, steps: int) -> Batches:
    images, labels = load("mnist", data_dir)
    count = args.batch_size * steps
    black = getattr(args, "black", 0.0)
    return Batches(images[:count], labels[:count], args.batch_size, pick_device(args.device), black=black)


def start(script: Any, args: argparse.Namespace, batches: Any) -> tuple[utils.Run, Callable, Callable]:
    """The run, its train_step, and the step as the loop runs it, from row numbers to sums of metrics."""
    state, train_step, _ = script.build(args, pick_device(args.device), batches)
    run = utils.Run(args, state)
    run.meter = utils.Meter(run.device())
    return run, train_step, utils.make_step(run, train_step, batches)


def train_epoch(run: utils.Run, step: Callable, batches: Any, epoch: int) -> dict[str, float]:
    """One epoch of this repository's loop without bar, schedules and saves; returns the mean metrics."""
    for rows in batches.rows(epoch):
        step(rows)
    return run.meter.report()


def ours(command: str, device: str, more: list[str], data_dir: str, folder: str, steps: int) -> tuple[Epoch, Row]:
    """This repository's loop."""
    script, args = prepare(command, *more, "--device", device, "--output-dir", f"{folder}/run")
    batches, epochs = in_memory(args, data_dir, steps), itertools.count()
    run, train_step, step = start(script, args, batches)
    with FlopCounterMode(display=False) as counter:
        train_step(*batches.take(next(iter(batches.rows(0)))))
    cost = {"flops": counter.get_total_flops(), "bytes": sum(map(bytes_moved, run.optimizers()))}

    def epoch():
        metrics = train_epoch(run, step, batches, next(epochs))
        return {name: metrics[name] for name in ("loss", "accuracy", "loss_d", "loss_g") if name in metrics}

    return epoch, cost


def bytes_moved(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that one update reads and writes: weights, gradients, and the optimizer's own tensors of their size."""
    own = {torch.optim.Adam: 2, torch.optim.AdamW: 2, torch.optim.SGD: 1}[type(optimizer)]
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return 4 * weights * (2 * (1 + own) + 1)


def float32_networks(command: str, device: str, data_dir: str, steps: int) -> tuple[Any, list[nn.Module], Batches]:
    """The options, networks and images of a case, for another loop."""
    script, args = prepare(command, "--device", device)
    args.amp, batches = False, in_memory(args, data_dir, steps)
    state, _, _ = script.build(args, pick_device(device), batches)
    return args, [item for item in state.values() if isinstance(item, nn.Module)], batches


def baseline(command: str, device: str, workers: int, data_dir: str, folder: str, steps: int) -> tuple[Epoch, Row]:
    """The script's networks, in float32, in the loop that most people write."""
    args, networks, _ = float32_networks(command, device, data_dir, steps)
    classifies = hasattr(args, "model")
    make: Any = partial(torch.optim.Adam, lr=args.lr, betas=args.betas)
    if args.optimizer == "sgd":
        make = partial(torch.optim.SGD, lr=args.lr, momentum=args.momentum)
    transform = Compose([ToTensor(), Normalize((0.5,), (0.5,))]) if classifies else ToTensor()
    loader = baseline_loops.make_loader(data_dir, folder, transform, args.batch_size, steps, workers, device)
    train: Any = partial(baseline_loops.train_gan, conditional=args.kind == "cgan")
    train = baseline_loops.train_classifier if classifies else train
    return partial(train, *networks, *(make(network.parameters()) for network in networks), loader, device), {}


def in_jax(command: str, device: str, _: Any, data_dir: str, folder: str, steps: int) -> tuple[Epoch, Row]:
    import jax_loops

    args, networks, batches = float32_networks(command, device, data_dir, steps)
    epoch = jax_loops.build(args, networks, batches.images.flatten(1).numpy(), batches.labels.numpy())
    return lambda: epoch(torch.randperm(len(batches.images)).view(steps, args.batch_size).numpy()), {}


Loops = dict[str, tuple[Callable, Any]]  # loop -> what prepares it, and with what
LOOPS: dict[str, Loops] = {
    "cpu": {"baseline": (baseline, 0), "ours": (ours, []), "ours, compiled": (ours, ["--compile"]),
            "JAX": (in_jax, None)},
    "cuda": {"baseline": (baseline, 0), "baseline, 4 workers": (baseline, 4),
             "ours, eager": (ours, ["--no-cuda-graph"]), "ours": (ours, []), "ours, compiled": (ours, ["--compile"])},
}  # fmt: skip


# steps, profile -------------------------------------------------------------------------------------------------------


def spawn(function: Callable, *arguments: Any) -> Any:
    """Call `function(*arguments, pipe)` in a process of its own; returns the other end of the pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=function, args=(*arguments, there)).start()  # no daemon: a DataLoader has children
    there.close()  # so that recv fails, instead of waiting for ever, where that process has died
    return here


def time_turns(make: Callable, threads: int, arguments: tuple, pipe: Any) -> None:
    """In a process of its own: time one turn whenever the pipe asks for it."""
    with contextlib.redirect_stdout(None):
        torch.set_num_threads(threads or torch.get_num_threads())
        epoch, cost = make(*arguments)
        pipe.send(cost)
        while pipe.recv():
            started = time.perf_counter()
            metrics = epoch()
            pipe.send((time.perf_counter() - started, metrics))


def compare(command: str, loops: Loops, steps: int, args: argparse.Namespace, threads: int = 0) -> Row:
    """Of each loop: median milliseconds, its last metrics, and how many times as fast as each other loop it is."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for name, (make, more) in loops.items():
            arguments = (command, args.device, more, args.data_dir, tempfile.mkdtemp(dir=folder), steps)
            pipes[name] = spawn(time_turns, make, threads, arguments)
        cost = next(cost for cost in [pipe.recv() for pipe in pipes.values()] if cost)
        times: dict[str, list[float]] = {name: [] for name in pipes}
        metrics, limits = {}, []
        for _ in range(args.turns + 1):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds, metrics[name] = pipe.recv()
                times[name].append(1000 * seconds / steps)
            limits.append(1000 * limit(cost, args.device))
        for pipe in pipes.values():
            pipe.send(False)
    rows: dict[str, Row] = {}
    for name, (_, *own) in times.items():  # the first turn warms up, and compiles
        rows[name] = {"ms": statistics.median(own), "metrics": metrics[name], "times_as_fast_as": {}}
        for other, (_, *theirs) in times.items():
            ratios = sorted(b / a for a, b in zip(own, theirs))
            rows[name]["times_as_fast_as"][other] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return {"limit_ms": statistics.median(limits[1:]), "loops": rows}


def limit(cost: Row, device: str) -> float:
    """The least seconds a step could take on this machine."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    source = torch.randn(16 * 2**20, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if device == "cuda" else bool
    product = min(timeit.repeat(lambda: (a @ b, wait()), number=1, repeat=10))
    copy = min(timeit.repeat(lambda: (target.copy_(source), wait()), number=1, repeat=10))
    return cost["flops"] * product / (2 * 1024**3) + cost["bytes"] * copy / (2 * 4 * source.numel())


def steps(args: argparse.Namespace) -> None:
    loops = dict(LOOPS[args.device])
    if not importlib.util.find_spec("jax"):
        loops.pop("JAX", None)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    rows = {}
    for threads in args.threads if args.device == "cpu" else [0]:
        if threads:  # the limit is measured with them too
            torch.set_num_threads(threads)
            if cores:
                os.sched_setaffinity(0, cores[:threads])
        for case in args.cases:
            name = f"{case}, {threads} thread{'s' * (threads > 1)}" if threads else case
            rows[name] = compare(CASES[case], loops, args.steps, args, threads)
            for loop, row in rows[name]["loops"].items():
                ratio = "{:.2f}x ({:.2f} to {:.2f})".format(*row["times_as_fast_as"]["baseline"])
                print(f"{name:31} {loop:20} {row['ms']:7.3f} ms {ratio} {row['metrics']}", flush=True)
    results = {"rows": rows, "steps": args.steps, "turns": args.turns, **environment()}
    (RESULTS / f"speed-{args.device}.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_steps(rows).savefig(RESULTS / f"speed-{args.device}.png", dpi=120)


def plot_steps(rows: dict[str, Row]) -> Figure:
    figure = Figure(figsize=(9, 0.9 * len(rows) + 1.5), layout="constrained")
    axis = figure.add_subplot()
    names = list(next(iter(rows.values()))["loops"])
    for i, name in enumerate(names):
        places = [place + 0.8 * (i + 0.5) / len(names) - 0.4 for place in range(len(rows))]
        axis.barh(places, [row["loops"][name]["ms"] for row in rows.values()], 0.8 / len(names), label=name)
    for place, row in enumerate(rows.values()):
        axis.vlines(row["limit_ms"], place - 0.4, place + 0.4, "black", label="" if place else "the machine's limit")
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="milliseconds a step", xscale="log")
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def profile_steps(args: argparse.Namespace) -> None:
    """The operations that take most of the eager steps' time, as tables."""
    text = "{processor}, {threads} threads, gpu: {gpu}, torch {torch}\n".format(**environment())
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    own = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            epoch, _ = ours(CASES[case], args.device, ["--no-cuda-graph"], args.data_dir, folder, args.steps)
            epoch()
            with profile(activities=activities) as profiler:
                epoch()
        operations = sorted(profiler.key_averages(), key=lambda operation: -getattr(operation, own))
        total = sum(getattr(operation, own) for operation in operations)  # in microseconds
        text += f"\n{case}: {total / args.steps / 1000:.2f} ms a step in operations, {args.steps} steps\n"
        for operation in operations[:8]:
            spent = getattr(operation, own)
            fraction = f"{spent / args.steps / 1000:7.3f} ms {100 * spent / total:5.1f} %"
            text += f"  {operation.key:40} {fraction} {operation.count / args.steps:6.1f} calls\n"
    (RESULTS / f"profile-{args.device}.txt").write_text(text)
    print(text)


# race -----------------------------------------------------------------------------------------------------------------


def timed(*command: Any) -> tuple[float, str]:
    """Seconds that a Python process takes, and what it prints."""
    started = time.perf_counter()
    output = subprocess.check_output([sys.executable, *map(str, command)], text=True)
    return time.perf_counter() - started, output


def race(args: argparse.Namespace) -> None:
    rows: dict[str, list[Row]] = {"ours": [], "baseline": []}
    where = ["--data-dir", args.data_dir, "--device", args.device]
    for seed in range(max(args.seeds, args.baseline_seeds)):
        if seed < args.seeds:  # a fixed length; its test accuracy is measured afterwards
            with tempfile.TemporaryDirectory() as folder:
                recipe = ["--recipe", "fast", "--amp", "--seed", seed, "--output-dir", f"{folder}/run"]
                seconds, _ = timed(ROOT / "train_classifier.py", *recipe, *where)
                timed(ROOT / "evaluate.py", f"{folder}/run", *where)
                metrics = json.loads(Path(folder, "run", "evaluation", "metrics.json").read_text())
            rows["ours"].append({"seconds": seconds, "test_accuracy": metrics["test_accuracy"]})
        if seed < args.baseline_seeds:  # until the first epoch with 99.0 %
            seconds, output = timed(baseline_loops.__file__, args.data_dir, args.device, seed)
            rows["baseline"].append({"seconds": seconds, **json.loads(output)})
        print({name: own[-1] for name, own in rows.items() if own}, flush=True)
    means = {
        name: {key: statistics.mean(row[key] for row in own) for key in own[0]} for name, own in rows.items() if own
    }
    print(json.dumps({"means": means, **environment()}, indent=2))


# scaling --------------------------------------------------------------------------------------------------------------


def curve(batch_size: int, width: int, args: argparse.Namespace) -> Row:
    """Microseconds per image: eager, compiled, and at the limit."""
    command = f"train_classifier.py --model mlp-x{width} --batch-size {batch_size}"
    steps = min(60_000, 200 * batch_size, 400_000 // width) // batch_size
    loops = {"eager": (ours, ["--no-cuda-graph"]), "compiled": (ours, ["--compile"])}
    measured = compare(command, loops, steps, args)
    row = {"batch_size": batch_size, "width": width, "limit": 1000 * measured["limit_ms"] / batch_size}
    row |= {name: 1000 * measured["loops"][name]["ms"] / batch_size for name in loops}
    print(row, flush=True)
    return {**row, "losses": {name: measured["loops"][name]["metrics"]["loss"] for name in loops}}


def train_on(source: str, path: Path, labels: torch.Tensor, device: str, pipe: Any) -> None:
    """In a process of its own: what training on these images costs, with batches of 256."""
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        where = ["--device", device, "--output-dir", f"{folder}/run"]
        script, args = prepare(f"{CASES['mlp batch 32']} --batch-size 256", *where)
        before, times = own_memory(), []
        if source == "memory":
            batches = Batches(torch.from_numpy(np.load(path)), labels, 256, pick_device(device))
        else:  # the class StreamedBatches, as docs/extending.md shows it
            text = (ROOT / "docs" / "extending.md").read_text("utf-8")
            scope: Row = {}
            exec(re.findall(r"```python\n(# datasets/streamed.py\n.*?)```", text, re.DOTALL)[0], scope)
            batches = scope["StreamedBatches"](path, labels, 256, pick_device(device))
        _, _, step = start(script, args, batches)
        for epoch in range(4):  # the first one is not counted
            started, rows = time.perf_counter(), iter(batches.rows(epoch))
            step(next(rows))
            first = time.perf_counter()
            for each in itertools.islice(rows, 200):
                step(each)
            times.append((first - started, 1e6 * (time.perf_counter() - first) / (200 * 256)))
        wait, image = map(statistics.median, zip(*times[1:]))
        pipe.send({"memory": own_memory() - before, "first_batch": wait, "image": image})


def own_memory() -> int:
    """Bytes that this process holds, without the pages of files that the system would take back."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def scaling(args: argparse.Namespace) -> None:
    batches = [curve(size, 1, args) for size in BATCHES]
    widths = [curve(32, width, args) for width in WIDTHS]
    images, labels = load("mnist", args.data_dir)
    sets = []
    for count in args.images:  # repeating MNIST
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npy"
            file = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 1, 28, 28))
            for first in range(0, count, len(images)):
                file[first : first + len(images)] = images[: count - first].numpy()
            file.flush()
            for source in ("memory", "file"):
                repeated = labels.repeat(-(-count // len(images)))[:count]
                costs = spawn(train_on, source, path, repeated, args.device).recv()
                sets.append({"images": count, "source": source, **costs})
                print(sets[-1], flush=True)
    plot_scaling(batches, widths, sets).savefig(RESULTS / f"scaling-{args.device}.png", dpi=120)


def plot_scaling(batches: list[Row], widths: list[Row], sets: list[Row]) -> Figure:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, rows, key in ((left, batches, "batch_size"), (middle, widths, "width")):
        for name, style in (("eager", "o-"), ("compiled", "o-"), ("limit", "k--")):
            axis.plot([row[key] for row in rows], [row[name] for row in rows], style, label=name)
        axis.set(xscale="log", yscale="log", ylabel="µs per image")
        axis.set_xticks([row[key] for row in rows], [row[key] for row in rows])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend()
    left.set_xlabel("batch size, the lecture's width")
    middle.set_xlabel("times the lecture's width, batch size 32")
    for source in ("memory", "file"):
        places = [(row["images"], row["memory"] / 1e9, row["image"]) for row in sets if row["source"] == source]
        right.plot(*list(zip(*places))[:2], "o-", label=f"from {source}")
        for x, y, image in places:
            right.annotate(f"{image:.0f} µs", (x, y), (-8, 6), textcoords="offset points", ha="right")
    right.set(xscale="log", yscale="log", xlabel="images, batch size 256", ylabel="GB of memory (µs per image)")
    right.margins(0.2)
    right.yaxis.set_major_formatter("{x:g}")
    right.legend()
    return figure


WHAT = {"steps": steps, "race": race, "scaling": scaling, "profile": profile_steps}


def main(argv: list[str] | None = None) -> None:
    parser = flags.ArgumentParser("speed.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("what", choices=list(WHAT), nargs="?", default="steps", help="what to measure")
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--device", choices=list(LOOPS), default="cpu", help="where to train")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="of steps and profile")
    add("--threads", type=positive, nargs="+", default=[1, 2], help="steps: threads of each loop")
    add("--steps", type=positive, default=150, help="steps and profile: steps of each loop in a turn")
    add("--turns", type=positive, default=7, help="steps and scaling: turns")
    add("--seeds", type=positive, default=5, help="race: runs of ours")
    add("--baseline-seeds", type=positive, default=5, help="race: runs of the baseline")
    add("--images", type=positive, nargs="+", default=[60_000, 10**6, 10**7], help="scaling: sizes of the sets")
    args = parser.parse_args(argv)
    pick_device(args.device)  # the machine's limit is measured with its settings too
    WHAT[args.what](args)


if __name__ == "__main__":
    run_script(main)
