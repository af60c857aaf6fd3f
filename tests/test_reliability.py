"""The short forms of `python benchmarks/reliability.py`."""

import csv
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and kills them")


def reliability(*flags, cwd):
    """The rows that it prints; it exits with 1 unless every trial passed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.reader(done.stdout.splitlines()))
    assert all(times == passed for *_, times, passed in rows)
    return [what for _, _, what, _, _ in rows]


@pytest.mark.slow
def test_killed_anywhere_and_resumed_gives_the_same_run(tmp_path):
    assert len(reliability("kills", "--count", 12, cwd=tmp_path)) == 12


@pytest.mark.slow
def test_a_signal_anywhere_saves_and_says_how_to_resume(tmp_path):
    sent = " ".join(reliability("signals", "--count", 6, cwd=tmp_path))
    assert "SIGTERM" in sent
    assert "SIGINT" in sent


@pytest.mark.slow
def test_the_loss_of_any_saved_part_is_detected(tmp_path):
    """The control experiment of the tests above."""
    rows = reliability("dropped", cwd=tmp_path)
    assert rows.count("without nothing") == 3
    parts = ("model", "generator", "discriminator", "optimizer_d", "schedule_g", "ema")
    assert {f"without state {part}" for part in parts} | {"without history", "without ranks 0 random cpu"} <= set(rows)


def test_every_change_of_a_file_is_detected(tmp_path, data_dir):
    rows = reliability("changes", "--count", 8, "--data-dir", data_dir, cwd=tmp_path)
    assert len(rows) == 2 * (2 + 4)  # cut short, one byte changed; two checkpoints, two files raw and gzipped
