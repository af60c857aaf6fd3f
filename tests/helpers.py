"""What several test files call."""

import io
import subprocess
import sys
from pathlib import Path

import torch

import train_classifier
import utils

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ["--dataset", "digits", "--device", "cpu"]


def run(script, *flags, cwd, code=0):
    """Run a script of the repository as a process; returns its output and errors after checking the exit status."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def train(*flags):
    """train_classifier.py in this process, which saves the seconds that a new one costs."""
    train_classifier.main([str(flag) for flag in flags])


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two checkpoints hold equal tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def save_sealed(checkpoint, path):
    """Write a checkpoint that only differs in content from one of the repository's own."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(utils.seal(buffer.getvalue()))


def assert_one_line(errors, *parts):
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    for part in parts:
        assert str(part) in errors
