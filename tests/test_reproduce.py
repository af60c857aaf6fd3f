"""benchmarks/reproduce.py: seeds of a row or of one's own command, resumed, printed, and recorded with --record."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import ROOT

import compare
import reproduce
from engine.errors import UserError

FIRST = "train_classifier.py --dataset digits --recipe paper --epochs 1"
SECOND = "benchmarks/maxout_paper.py --dataset digits --epochs 1 --first-stage first"
OWN = "train_classifier.py --dataset digits --model mlp --epochs 1 --lr 1e-3"


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    rows = {"first": FIRST, "second": SECOND, "light": OWN}
    monkeypatch.setattr(reproduce, "ROWS", rows)
    monkeypatch.setattr(reproduce, "PUBLISHED", {"second": "99 %"})
    monkeypatch.setattr(reproduce, "KEPT", {"light": {"seconds.csv": tmp_path / "kept.csv"}})
    return Namespace(seeds=1, jobs=1, data_dir="data", output_dir=tmp_path, record=False)


@pytest.fixture
def calls(monkeypatch):
    """Scripts run in this process, which saves seconds; the script of each call."""
    calls = []

    def call(command, env):
        script = Path(command[1])
        calls.append(script.name)
        importlib.import_module(script.stem).main(command[2:])
        return Namespace(wait=lambda: 0)

    run_all = lambda tasks, args: [reproduce.run_seed(*task, args, []) for task in tasks]  # noqa: E731
    monkeypatch.setattr(reproduce, "subprocess", Namespace(Popen=call))
    monkeypatch.setattr(reproduce, "run_all", run_all)  # its threads would not get signals
    monkeypatch.setattr("engine.plots.save_figure", lambda figure, path: None)
    return calls


@pytest.mark.slow
def test_a_rows_second_stage_continues_the_same_seeds_first(args, calls, tmp_path):
    args.record = True
    reproduce.run_row("second", args)
    options = json.loads((tmp_path / "second-0" / "config.json").read_text())["options"]
    assert options["first_stage"] == str(tmp_path / "first-0")
    rows = json.loads(reproduce.RESULTS.read_text())
    assert (rows["second"]["command"], rows["second"]["published"]) == (f"python {SECOND}", "99 %")
    assert [rows[name]["epochs_trained"] for name in ("first", "second")] == [[1], [1]]
    assert "test_errors" in rows["second"]


def test_without_record_the_recorded_value_is_printed_and_kept(args, calls, tmp_path, capsys):
    recorded = {"test_accuracy_mean": 0.9, "test_accuracy_sd": 0.0123, "test_errors": [30, 40]}
    reproduce.RESULTS.write_text(json.dumps({"light": recorded}))
    reproduce.run_row("light", args)
    accuracy = json.loads((tmp_path / "light-0/evaluation/metrics.json").read_text())["test_accuracy"]
    assert f"  test_accuracy {100 * accuracy:.2f} %, recorded 90.00 ± 1.23 %\n" in capsys.readouterr().out
    assert json.loads(reproduce.RESULTS.read_text()) == {"light": recorded}
    assert not (tmp_path / "kept.csv").exists()

    args.record = True
    reproduce.run_row("light", args)
    assert json.loads(reproduce.RESULTS.read_text())["light"]["test_accuracy_mean"] == accuracy
    assert (tmp_path / "kept.csv").is_file()


@pytest.mark.slow
def test_a_command_of_ones_own_runs_over_seeds_and_resumes(args, calls, tmp_path, monkeypatch, capsys):
    args.seeds = 2
    reproduce.run_command(f"python {OWN}", args)
    name = "classifier--dataset-digits--model-mlp--epochs-1--lr-1e-3"
    folders = [tmp_path / f"{name}-{seed}" for seed in (0, 1)]
    options = [json.loads((folder / "config.json").read_text())["options"] for folder in folders]
    assert [(each["seed"], each["lr"], each["model"]) for each in options] == [(0, 1e-3, "mlp"), (1, 1e-3, "mlp")]
    output = capsys.readouterr().out
    assert re.search(rf"{name}, 2 seeds\n  test_accuracy \d+\.\d\d ± \d+\.\d\d %\n  seconds of training .* ± ", output)
    assert sorted({path.name for path in tmp_path.iterdir()}) == [folder.name for folder in folders]  # no results.json

    # The command that it prints plots the runs.
    (printed,) = re.findall("python benchmarks/compare.py (.*)", output)
    compare.main([*shlex.split(printed), "--output", str(tmp_path / "plot.png")])
    assert f"{tmp_path / name} (2 seeds)" in capsys.readouterr().out

    # Again: what is finished is not trained again, and says so.
    shutil.rmtree(folders[1] / "evaluation")
    reproduce.run_command(OWN, args)
    output = capsys.readouterr().out
    assert f"{folders[0]} is finished" in output
    assert "run already finished at epoch 1" in output
    monkeypatch.setattr("engine.provenance.code_fingerprint", lambda script: {})
    reproduce.run_command(OWN, args)
    assert "train_classifier.py changed since" in capsys.readouterr().err


def test_every_command_has_a_folder_of_its_own():
    commands = ["train_gan.py", "train_gan.py --amp", "train_gan.py --lr 1", "train_gan.py --lr 1 --amp"]
    commands += [f"train_gan.py --betas {'0.5 ' * 50}{last}" for last in ("0.9", "0.99")]
    commands += ["train_classifier.py --start-from runs/a", "train_classifier.py --start-from a"]
    names = [reproduce.folder_name(command.split()) for command in commands]
    assert len(set(names)) == len(commands)
    assert all(len(name) <= 120 and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "must begin with a training script"),
        ("train_gan.py --dataset 'my digits", "cannot be read: No closing quotation"),
        ("evaluate.py runs/a", "must begin with a training script"),
        ("train_gan.py --seed 3", "must not hold --seed"),
        ("train_gan.py --output-dir=a", "must not hold --output-dir"),
    ],
)
def test_a_command_that_is_no_training_or_sets_what_each_seed_gets_is_one_line(args, command, message):
    with pytest.raises(UserError, match=message):
        reproduce.run_command(command, args)


@pytest.mark.parametrize(("own", "threads"), [(None, "2"), ("3", "3")])
def test_threads_are_shared_among_jobs_unless_the_user_sets_them(args, monkeypatch, own, threads):
    seen = []
    call = lambda command, env: seen.append(env["OMP_NUM_THREADS"]) or Namespace(wait=lambda: 1)  # noqa: E731
    monkeypatch.setattr(reproduce, "subprocess", Namespace(Popen=call))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    args.jobs = 4
    with pytest.raises(UserError, match="stopped"):
        reproduce.run_command(OWN, args)
    assert seen == [threads]


def test_after_a_seed_that_failed_no_other_is_begun(args, monkeypatch):
    begun = []

    def run_seed(command, seed, *_):
        begun.append(seed)
        raise UserError(f"seed {seed}")

    monkeypatch.setattr(reproduce, "run_seed", run_seed)
    args.seeds = 9
    with pytest.raises(UserError, match="seed 0"):
        reproduce.run_row("first", args)
    assert len(begun) < 9


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_kill_ends_the_training_too_and_it_is_saved(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "reproduce.py"), "--output-dir", str(tmp_path), "--seeds", "1"]
    command = "train_classifier.py --dataset digits --model mlp --epochs 1000000"
    with subprocess.Popen([*script, "--command", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if line.startswith(b"epoch 3/"):
                break
        process.terminate()
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped and saved; resume with: the same command" in output
    assert output.endswith("reproduce.py: interrupted\n")


def test_short_forms_are_compared_with_bands_of_twice_the_range_of_three_seeds(args, monkeypatch, tmp_path, capsys):
    args.data_dir = tmp_path  # which has no MNIST
    monkeypatch.setattr(reproduce, "BANDS", tmp_path / "quick.json")
    monkeypatch.setattr(reproduce, "QUICK", {"light": (OWN, "test_accuracy"), "mnist": ("train_gan.py", "fid")})
    accuracies = [0.9, 0.92, 0.91]
    monkeypatch.setattr(reproduce, "run_seed", lambda command, seed, *_: {"test_accuracy": accuracies[seed]})
    band = {"command": "", "metric": "fid", "low": 1, "high": 2}
    reproduce.BANDS.write_text(json.dumps({"mnist": band}))
    assert reproduce.quick(Namespace(**{**vars(args), "record": True}))
    bands = json.loads(reproduce.BANDS.read_text())
    assert bands["mnist"] == band  # it was not measured
    assert (bands["light"]["low"], bands["light"]["high"]) == (pytest.approx(0.86), pytest.approx(0.96))
    accuracies[0] = 0.85
    assert not reproduce.quick(args)
    output = capsys.readouterr().out
    assert "mnist: skipped, there is no MNIST" in output
    assert "light: test_accuracy 0.8500, band 0.8600 to 0.9600" in output


def test_the_pinned_bands_are_those_of_the_short_forms():
    bands = json.loads((ROOT / "benchmarks" / "results" / "quick.json").read_text())
    assert {name: (band["command"], band["metric"]) for name, band in bands.items()} == reproduce.QUICK
