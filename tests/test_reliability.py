"""The short forms of `python benchmarks/reliability.py`."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and kills them")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count", "trials"),
    [
        pytest.param("kills", 12, 12, marks=pytest.mark.slow),
        pytest.param("signals", 6, 6, marks=pytest.mark.slow),
        ("damage", 8, 32),  # two checkpoints and two files of MNIST, cut short or changed
    ],
)
def test_a_run_survives(what, count, trials, data_dir, tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), what, "--count", str(count)]
    done = subprocess.run([*script, "--data-dir", data_dir], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, f"{what},{trials},{trials}\n"), done.stdout + done.stderr
