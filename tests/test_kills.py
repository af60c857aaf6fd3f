"""The short form of `python tests/kills.py`."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and kills them")
def test_killed_anywhere_and_resumed_gives_the_same_run(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), "--kills", "24"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | | 24 | 24 |" in done.stdout
