"""What several test files share."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process of the tests runs on each core already
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it in the background; processes inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

import datasets
from datasets import Batches
from engine import products

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir():
    """The folder that holds MNIST/raw: $DATA_DIR, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("DATA_DIR") or ROOT.parent / "shared" / "data").resolve()
    if not list(folder.glob("MNIST/raw/*-ubyte*")):
        pytest.skip(f"no MNIST in {folder}; set DATA_DIR to a folder that holds MNIST/raw")
    return folder


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test stands in an empty folder and draws the same random numbers, whichever tests ran before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Batches, "rows", Batches.rows)  # which helpers.act_at replaces
    monkeypatch.setattr(datasets, "load_digits", datasets.load_digits)  # which helpers.few_digits replaces
    monkeypatch.setattr(products, "WORTH", 0.0)  # no choice by time, which may not be the same twice
    torch.manual_seed(0)
