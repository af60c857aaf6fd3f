"""The short forms of `python tests/reliability.py`."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and kills them")


def reliability(*flags, cwd):
    command = [sys.executable, str(ROOT / "tests" / "reliability.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_anywhere_and_resumed_gives_the_same_run(tmp_path):
    assert "| all |  | 24 | 24 |" in reliability("kills", "--count", 24, cwd=tmp_path)


@pytest.mark.slow
def test_a_signal_anywhere_saves_and_says_how_to_resume(tmp_path):
    table = reliability("signals", "--count", 12, cwd=tmp_path)
    assert "| 130 |" in table
    assert "| 143 |" in table


@pytest.mark.slow
def test_the_loss_of_any_saved_part_is_noticed(tmp_path):
    """The control of the tests above."""
    table = reliability("dropped", cwd=tmp_path)
    parts = ["model", "generator", "discriminator", "optimizer_d", "schedule_g", "ema", "random cpu", "meter sums"]
    for part in (*parts, "meter counts", "meter reported", "history", "curve"):
        assert f"{part} | yes |" in table
    assert table.count("| no |") == table.count("| nothing | no |") == 3


def test_every_change_of_a_file_is_noticed(tmp_path, data_dir):
    rows = reliability("changes", "--count", 8, "--data-dir", data_dir, cwd=tmp_path).splitlines()[2:]
    assert len(rows) == 2 * (2 + 8)  # cut short, one byte changed; two checkpoints, MNIST's four files raw and gzipped
    assert all(row.endswith("| 0 |") for row in rows)
