"""benchmarks/reproduce.py: a row of two stages, resuming after an interruption, and a seed that fails."""

import json
import shutil
import sys
import time
from argparse import Namespace

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import reproduce

from engine.errors import UserError

FIRST = "train_classifier.py --dataset digits --recipe paper --epochs 1"


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    rows = {"first": (FIRST, ""), "second": (f"{FIRST} --second-stage first", "99 %"), "wrong": (f"{FIRST} --lr x", "")}
    monkeypatch.setattr(reproduce, "ROWS", rows)
    return Namespace(seeds=1, jobs=1, data_dir="data", output_dir=tmp_path)


def test_a_rows_second_stage_continues_the_same_seeds_first(args, tmp_path):
    (tmp_path / "first-0").mkdir()
    for name in ("config.json", "best.pt", "checkpoint.pt.tmp"):  # of a run that was killed before its first checkpoint
        (tmp_path / "first-0" / name).touch()
    reproduce.run_row("second", args)
    options = json.loads((tmp_path / "second-0" / "config.json").read_text())["options"]
    assert options["second_stage"] == str(tmp_path / "first-0")
    rows = json.loads(reproduce.RESULTS.read_text())
    assert rows["second"]["command"] == f"python {FIRST} --second-stage first"
    assert rows["second"]["published"] == "99 %"
    assert [rows[name]["epochs_trained"] for name in ("first", "second")] == [[1], [1]]

    # An interruption between training and evaluation: nothing is trained again.
    metrics = (tmp_path / "first-0" / "metrics.csv").read_bytes()
    (tmp_path / "first-0" / "metrics.csv").unlink()
    shutil.rmtree(tmp_path / "first-0" / "evaluation")
    reproduce.run_row("first", args)
    assert (tmp_path / "first-0" / "metrics.csv").read_bytes() == metrics
    assert json.loads(reproduce.RESULTS.read_text()) == rows


def test_after_a_seed_that_failed_no_other_is_begun(args, monkeypatch):
    begun = []

    def run_seed(command, seed, *_):
        begun.append(seed)
        time.sleep(0.1)
        raise UserError(f"seed {seed}")

    monkeypatch.setattr(reproduce, "run_seed", run_seed)
    args.seeds = 5
    with pytest.raises(UserError, match="seed 0"):
        reproduce.run_row("first", args)
    assert len(begun) < 5


def test_a_seed_that_fails_is_one_line(args):
    with pytest.raises(UserError, match=r"train_classifier\.py stopped"):
        reproduce.run_row("wrong", args)
    assert not reproduce.RESULTS.exists()
