"""What several test files call."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import datasets
import train_classifier
from datasets import Batches
from engine import products
from engine.checkpoint import TABLES, seal
from engine.table import Table

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ["--dataset", "digits", "--device", "cpu"]
SHAPES = ["circle", "square", "triangle"]


# Processes are forked from one that has imported torch already, which saves each of them some seconds.
PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "tqdm", "matplotlib.figure", "sklearn.datasets"])


def run(script, *flags, cwd, code=0, before=None):
    """Run a script of the repository as a process; returns its output and errors after checking the exit status.

    before: called in that process first.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("output", "errors")]
        command = (str(ROOT / script), [*map(str, flags)], str(cwd))
        process = PROCESSES.Process(target=run_here, args=(*command, *files, before))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
        output, errors = (file.read_text() for file in files)
    assert process.exitcode == code, output + errors
    return output, errors


def run_here(script, flags, folder, output, errors, before):
    os.chdir(folder)
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(ROOT))
    products.WORTH = 0.0  # as in conftest.py
    if before:
        before()
    runpy.run_path(script, run_name="__main__")


def train(*flags):
    """train_classifier.py in this process, which saves the seconds that a new one costs."""
    train_classifier.main([str(flag) for flag in flags])


def few_digits(count):
    """Let the digits be their first `count` images."""
    whole = datasets.load_digits
    datasets.load_digits = lambda train: [part[:count] for part in whole(train)]


def act_at(at, act=lambda: os.kill(os.getpid(), signal.SIGKILL)):
    """Have training call `act` when it comes to the batch `at`, (epoch, number)."""
    whole = Batches.rows

    def rows(self, epoch, start=0):
        for i, batch in enumerate(whole(self, epoch, start), start):
            if self.shuffle and (epoch, i) == at:
                act()
            yield batch

    Batches.rows = rows


class Killed(BaseException):
    """What SIGKILL is to a process, for a training within this one: nothing handles it."""


@contextmanager
def killed_at(at):
    """Within this, a training must come to the batch `at`, (epoch, number), and ends there as if it were killed."""
    whole = Batches.rows

    def kill():
        raise Killed

    act_at(at, kill)
    try:
        yield
    except Killed:
        return
    finally:
        Batches.rows = whole
    raise AssertionError(f"it never came to {at}")


def load(path):
    """A checkpoint, with its tables as rows."""
    checkpoint = torch.load(path, weights_only=True)
    return {**checkpoint, **{name: list(Table(checkpoint[name])) for name in TABLES if name in checkpoint}}


def tensors(state, name=""):
    """Yield (name, tensor) for every tensor in nested dicts."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{name}.{key}")


def same(a, b):
    """Whether two checkpoints hold equal tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Weights, optimizer, schedule, EMA, random state, position, history; and the table, byte for byte."""
    for name in sorted({path.name for path in a.glob("*.pt")} - {"previous.pt"}):
        first, second = (load(folder / name) for folder in (a, b))
        for key in first.keys() - {"options", "seconds"}:  # save_interval may differ, and time does
            assert same(first[key], second[key]), key
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


def assert_close(a, b):
    """All state of two runs: weights, optimizers, schedules, EMA; and the metrics of each epoch."""
    first, second = (load(folder / "checkpoint.pt") for folder in (a, b))
    others = dict(tensors(second["state"]))
    for name, value in tensors(first["state"]):
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(first["history"], second["history"], rtol=1e-3, atol=1e-3)


def save_sealed(checkpoint, path):
    """Write a checkpoint that only differs in content from one of the repository's own."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(seal(checkpoint))


def assert_one_line(errors, *parts):
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    for part in parts:
        assert str(part) in errors


def draw_shape(name, random):
    """A dark shape on light, in two colours, of a random size, at a random place, a little turned."""
    width = int(random.choice([40, 64, 96]))
    height = width * 3 // 4
    radius = height * random.uniform(0.25, 0.45)
    x, y = (random.uniform(radius, side - radius) for side in (width, height))
    light, dark = (tuple(random.integers(*limits, 3).tolist()) for limits in ((150, 256), (0, 100)))
    image = Image.new("RGB", (width, height), light)
    if name == "circle":
        ImageDraw.Draw(image).ellipse([x - radius, y - radius, x + radius, y + radius], fill=dark)
    else:
        sides, turn = (4, 45) if name == "square" else (3, 0)
        turn += random.uniform(-17, 17)
        ImageDraw.Draw(image).regular_polygon((x, y, radius), sides, rotation=turn, fill=dark)
    return image


def draw_shapes(folder, counts, names=SHAPES):
    """Shapes in folder/PART/NAME, or in folder/NAME. counts: part ("" for no such level) -> images of each class."""
    random = np.random.default_rng(0)
    for part, count in counts.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                draw_shape(name, random).save(folder / part / name / f"{i}.png")
    return folder
