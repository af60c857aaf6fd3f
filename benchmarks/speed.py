"""How fast this repository trains, beside the loops that most people write (baseline_loops.py) and JAX (jax_loops.py).

python benchmarks/speed.py steps       # milliseconds per step, eager and compiled, with one thread and with two
python benchmarks/speed.py race        # seconds from the start of the process to 99 % of the test images
python benchmarks/speed.py profile     # which operations take the time of the eager step

docs/speed.md says how it is measured. steps writes speed-DEVICE.json into benchmarks/results/, from which
`python benchmarks/tables.py` makes the chart; profile writes profile-DEVICE.txt, and race prints what it measured.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize, ToTensor

import baseline_loops
import utils
from datasets import Batches, load
from engine import flags
from engine.device import pick_device
from engine.errors import run_script
from engine.products import Products, onednn
from engine.provenance import environment

RESULTS = ROOT / "benchmarks" / "results"
CASES = {
    "mlp batch 32": "train_classifier.py --model mlp",
    "cnn batch 32": "train_classifier.py --model cnn",
    "maxout batch 100": "train_classifier.py --recipe paper",
    "gan batch 16": "train_gan.py --r1 0",
    "gan large batch 128": "train_gan.py --recipe best --networks large --batch-size 128 --r1 0",
    "cgan batch 16": "train_cgan.py --r1 0",
}
LARGE = (1024, 1024)  # a matrix at whose size products reach the machine's rate
Epoch = Callable[[], dict[str, float]]  # runs the steps of one turn; returns their mean metrics
Row = dict[str, Any]


# The loops: each returns an Epoch, and what a step computes and moves ({}: `ours` says it) ----------------------------


def prepare(command: str, *more: str) -> tuple[Any, argparse.Namespace]:
    """The script of a command, and its options without what the baseline lacks: EMA, weight limits, schedule."""
    name, *own = command.split()
    script = importlib.import_module(name.removesuffix(".py"))
    with contextlib.redirect_stdout(None):
        args = flags.parse_args(script.get_args_parser(), script.RECIPES, script.VARIANTS, [*own, *more])
    args.ema = args.max_norm = None
    args.schedule = "constant"  # in turns of so few steps, --schedule maxout would change the momentum too often
    args.threads = torch.get_num_threads()
    return script, args


def in_memory(args: argparse.Namespace, data_dir: str, steps: int) -> Batches:
    images, labels = load("mnist", data_dir)
    count = args.batch_size * steps
    black = getattr(args, "black", 0.0)
    return Batches(images[:count], labels[:count], args.batch_size, pick_device(args.device), black=black)


def ours(command: str, device: str, more: list[str], data_dir: str, folder: str, steps: int) -> tuple[Epoch, Row]:
    """This repository's loop, without bar, schedules and saves."""
    script, args = prepare(command, *more, "--device", device, "--output-dir", f"{folder}/run")
    batches, epochs = in_memory(args, data_dir, steps), itertools.count()
    state, train_step, _ = script.build(args, pick_device(device), batches)
    run = utils.Run(args, state)
    step = utils.make_step(run, train_step, batches)
    with FlopCounterMode(display=False) as counter, Products() as recorded:
        train_step(*batches.take(next(batches.rows(0))))
    products: Counter[Any] = Counter()  # shapes of both matrices -> operations
    for (first, _), (second, _) in recorded.matrices:
        products[first, second] += count_flops(first, second)
    convolutions = counter.get_total_flops() - products.total()
    products[LARGE, LARGE] += convolutions  # as if they were large products
    cost = {"products": products, "bytes": sum(map(bytes_moved, run.optimizers()))}

    def epoch():
        for rows in batches.rows(next(epochs)):
            step(rows)
            run.batch += 1  # as in one long epoch, whose first step alone is compared with the recording
        metrics = run.meter.report()
        return {name: metrics[name] for name in ("loss", "accuracy", "loss_d", "loss_g") if name in metrics}

    return epoch, cost


def count_flops(a: Sequence[int], b: Sequence[int]) -> int:
    """Floating-point operations of the product of matrices with these shapes."""
    return 2 * a[0] * a[1] * b[1]


def bytes_moved(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that one update reads and writes: weights, gradients, and the optimizer's own tensors of their size."""
    own = {torch.optim.Adam: 2, torch.optim.AdamW: 2, torch.optim.SGD: 1}[type(optimizer)]
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return 4 * weights * (2 * (1 + own) + 1)


def float32_networks(command: str, device: str, data_dir: str, steps: int) -> tuple[Any, list[nn.Module], Batches]:
    """The options, networks and images of a case, for another loop."""
    script, args = prepare(command, "--device", device)
    batches = in_memory(args, data_dir, steps)
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
    rows = {name: beside(name, times, metrics[name]) for name in times}
    return {"limit_ms": statistics.median(limits[1:]), "loops": rows}


def beside(name: str, times: dict[str, list[float]], metrics: dict[str, float]) -> Row:
    """A loop's row. The first turn, which warms up and compiles, is not counted."""
    row: Row = {"ms": statistics.median(times[name][1:]), "metrics": metrics, "times_as_fast_as": {}}
    for other, theirs in times.items():
        ratios = sorted(b / a for a, b in zip(times[name][1:], theirs[1:]))
        row["times_as_fast_as"][other] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return row


def limit(cost: Row, device: str) -> float:
    """An estimate of the least seconds that a step could take on this machine.

    Its products, each by the library of torch that is fastest for its shape, and what its optimizers read and write, as
    one copy. On a GPU, where launching a small operation takes longer, at the rates of large ones.
    """

    def least(function: Callable, *arguments: Any) -> float:
        return min(timeit.repeat(lambda: (function(*arguments), wait()), number=1, repeat=20))

    gpu = device == "cuda"
    wait: Callable = torch.cuda.synchronize if gpu else bool
    source = torch.randn(16 * 2**20 if gpu else cost["bytes"] // 8, device=device)  # a copy reads and writes 8 bytes
    seconds = least(torch.empty_like(source).copy_, source) * cost["bytes"] / (8 * len(source))
    for shapes, flops in cost["products"].items():
        shapes = [LARGE, LARGE] if gpu else shapes
        pair = [torch.randn(shape, device=device) for shape in shapes]
        ways = [torch.mm] if gpu else [torch.mm, onednn]
        seconds += min(least(way, *pair) for way in ways) * flops / count_flops(*shapes)
    return seconds


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
        # On CUDA, each kernel is also an event of its own, besides the operation that launched it.
        averages = [each for each in profiler.key_averages() if each.device_type == DeviceType.CPU]
        operations = sorted(averages, key=lambda operation: -getattr(operation, own))
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
    print(json.dumps({"means": means, **environment()}))  # on one line: gpu.py keeps the last


WHAT = {"steps": steps, "race": race, "profile": profile_steps}


def main() -> None:
    parser = flags.ArgumentParser("speed.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("what", choices=list(WHAT), nargs="?", default="steps", help="what to measure")
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--device", choices=list(LOOPS), default="cpu", help="where to train")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="steps and profile: cases to time")
    add("--threads", type=positive, nargs="+", default=[1, 2], help="steps: threads of each loop")
    add("--steps", type=positive, default=150, help="steps and profile: steps of each loop in a turn")
    add("--turns", type=positive, default=7, help="steps: timed turns of each loop")
    add("--seeds", type=positive, default=5, help="race: runs of ours")
    add("--baseline-seeds", type=positive, default=5, help="race: runs of the baseline")
    args = parser.parse_args()
    pick_device(args.device)  # the machine's limit is measured with its settings too
    WHAT[args.what](args)


if __name__ == "__main__":
    run_script(main)
