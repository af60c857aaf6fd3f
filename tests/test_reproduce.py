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
    reproduce.RESULTS.write_text('{"second": {"test_accuracy_mean": 0, "test_errors": [0], "published": "99 %"}}')
    monkeypatch.setattr(reproduce, "ROWS", {"first": FIRST, "second": SECOND, "light": OWN})
    monkeypatch.setattr(reproduce, "ASSETS", {tmp_path / "kept.csv": ("light", "metrics.csv")})
    return Namespace(command=None, seeds=1, jobs=1, data_dir="data", output_dir=tmp_path, record=False)


@pytest.fixture
def in_this_process(monkeypatch):
    """Scripts run in this process, which saves seconds."""

    def start(_, *commands, env=None):
        for script, *words in commands:
            importlib.import_module(Path(script).stem).main([*map(str, words)])
        return Namespace(wait=lambda: 0)

    monkeypatch.setattr(reproduce, "start", start)


@pytest.mark.slow
def test_a_rows_second_stage_continues_the_same_seeds_first(args, in_this_process, tmp_path, capsys):
    args.record = True
    reproduce.run_row("second", args)
    options = json.loads((tmp_path / "second-0" / "config.json").read_text())["options"]
    assert options["first_stage"] == str(tmp_path / "first-0")
    rows = json.loads(reproduce.RESULTS.read_text())
    assert (rows["second"]["command"], rows["second"]["published"]) == (f"python {SECOND}", "99 %")
    assert [rows[name]["epochs_trained"] for name in ("first", "second")] == [[1], [1]]
    assert "reference: 99 %\n" in capsys.readouterr().out


def test_without_record_the_recorded_value_is_printed_and_kept(args, in_this_process, tmp_path, capsys):
    recorded = {"test_accuracy_mean": 0.9, "test_accuracy_sd": 0.0123, "test_errors": [30, 40], "published": ""}
    reproduce.RESULTS.write_text(json.dumps({"light": recorded}))
    reproduce.run_row("light", args)
    metrics = json.loads((tmp_path / "light-0/evaluation/metrics.json").read_text())
    output = capsys.readouterr().out
    assert f" {100 * metrics['test_accuracy']:.2f} %\n" in output
    assert "recorded: 90.00 ± 1.23 %\n" in output
    assert json.loads(reproduce.RESULTS.read_text()) == {"light": recorded}
    assert not (tmp_path / "kept.csv").exists()

    args.record = True
    reproduce.run_row("light", args)
    assert json.loads(reproduce.RESULTS.read_text())["light"]["test_errors"] == [metrics["test_errors"]]
    assert (tmp_path / "kept.csv").is_file()


@pytest.mark.slow
def test_a_command_of_ones_own_runs_over_seeds_and_resumes(args, tmp_path, monkeypatch, capfd):
    words = ["--seeds", "2", "--jobs", "2", "--output-dir", str(tmp_path / "runs"), "--command", OWN]
    reproduce.main(words)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [re.sub("-[0-9a-f]{8}-", "-", folder.name) for folder in folders] == [
        f"classifier-dataset-digits-model-mlp-epochs-1-lr-1e-3-{seed}" for seed in (0, 1)
    ]
    options = [json.loads((folder / "config.json").read_text())["options"] for folder in folders]
    assert [(each["seed"], each["lr"], each["model"]) for each in options] == [(0, 1e-3, "mlp"), (1, 1e-3, "mlp")]

    # The command that it prints plots the runs.
    (printed,) = re.findall("benchmarks/compare.py (.*)", capfd.readouterr().out)
    compare.main([*shlex.split(printed), "--output", str(tmp_path / "plot.png")])
    assert f"{folders[0]} and 1 more" in capfd.readouterr().out

    # Again: what is finished is not trained again, and says so.
    shutil.rmtree(folders[1] / "evaluation")
    monkeypatch.setattr("engine.provenance.code_fingerprint", lambda script: {})
    reproduce.main(words)
    output, errors = capfd.readouterr()
    assert f"{folders[0]} is finished" in output
    assert "run already finished at epoch 1" in output
    assert "train_classifier.py changed since" in errors


def test_three_epochs_of_each_row_that_continues_no_other_are_timed_eagerly(
    args, in_this_process, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reproduce, "MINUTES", tmp_path / "minutes.json")
    monkeypatch.setattr(reproduce, "ROWS", {"light": f"{OWN} --amp --compile", "second": "train_gan.py --resume light"})
    reproduce.main(["--minutes", "--record"])
    measured, output = json.loads(reproduce.MINUTES.read_text()), capsys.readouterr().out
    assert list(measured["seconds"]) == ["light"]
    assert len(measured["seconds"]["light"]) == 3
    assert measured["threads"] == 1
    assert f"light: {measured['seconds']['light']} seconds an epoch" in output
    assert "compiling" not in output
    assert not (tmp_path / "light").exists()


def test_a_seed_that_was_evaluated_before_its_end_is_not_finished():
    for epoch, options, finished in ((1, {"patience": None}, False), (2, {}, True), (1, {"patience": 1}, False)):
        checkpoint = {"epoch": epoch, "options": {"epochs": 2, "dry_run": False, **options}}
        assert reproduce.is_finished(checkpoint) == finished


def test_every_command_has_a_folder_of_its_own():
    commands = ["train_gan.py", "train_gan.py --amp", "train_gan.py --lr 1", "train_gan.py --lr 1 --amp"]
    commands += [f"train_gan.py --betas {'0.5 ' * 50}{last}" for last in ("0.9", "0.99")]
    commands += ["train_classifier.py --start-from runs/a", "train_classifier.py --start-from a"]
    names = [reproduce.folder_name(command.split()) for command in commands]
    assert len(set(names)) == len(commands)
    assert all(len(name) <= 120 and "/" not in name for name in names)


def test_another_command_under_a_used_name_has_folders_of_its_own_and_a_name_is_no_word_of_it(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(reproduce, "ROWS", {})
    monkeypatch.setattr(reproduce, "train", lambda tasks, _: seen.append(tasks[0][2]) or [])
    monkeypatch.setattr(reproduce, "read_run", lambda folder: None)
    monkeypatch.setattr(reproduce, "print_table", lambda settings: None)
    for lr in ("1e-3", "2e-3"):
        reproduce.main(["fast", "--seeds", "1", "--command", f"train_classifier.py --model mlp --lr {lr}"])
    assert seen[0] != seen[1]
    for name in ("train_gan.py", "mlp"):  # of this command, and of the row above
        with pytest.raises(SystemExit, match="2"):
            reproduce.main([name, "--command", "train_gan.py"])
        assert f"{name} is a word of a command; use another name for the row" in capsys.readouterr().err


def test_measures_that_are_older_than_the_run_are_measured_again(args, in_this_process, tmp_path):
    reproduce.run_row("light", args)
    measures = tmp_path / "light-0" / "evaluation" / "metrics.json"
    measures.write_text(json.dumps({**json.loads(measures.read_text()), "epochs": 0, "test_accuracy": 0.01}))
    reproduce.run_row("light", args)
    assert json.loads(measures.read_text())["test_accuracy"] > 0.1


@pytest.mark.parametrize(
    "command", ["python train_gan.py", "train_gan.py --dataset 'my digits", "train_gan.py --seed=7", "", None]
)
def test_a_command_that_is_no_training_and_none_without_a_row_are_usage_errors(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main([] if command is None else ["--command", command])
    assert ("name a row; --list prints them" if command is None else "--command") in capsys.readouterr().err


@pytest.mark.parametrize(("own", "threads"), [(None, "2"), ("3", "3")])
def test_seeds_side_by_side_share_the_threads_unless_the_user_sets_them_and_after_a_failure_no_more_begin(
    args, monkeypatch, own, threads
):
    seen = []
    start = lambda *_, env: seen.append(env["OMP_NUM_THREADS"]) or Namespace(wait=lambda: 1)  # noqa: E731
    monkeypatch.setattr(reproduce, "start", start)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    args.jobs, args.seeds = 4, 9
    with pytest.raises(UserError, match="stopped"):
        reproduce.run_row("light", args)
    assert seen == [threads] * 4


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
    monkeypatch.setattr(reproduce, "BANDS", tmp_path / "quick.json")
    band = {"command": OWN, "metric": "test_accuracy"}
    reproduce.BANDS.write_text(json.dumps({"light": band}))
    accuracies = [0.9, 0.92, 0.91]
    monkeypatch.setattr(reproduce, "train", lambda tasks, _: [{"test_accuracy": accuracies[task[1]]} for task in tasks])
    assert reproduce.quick(Namespace(**{**vars(args), "record": True}))
    low, high = pytest.approx(0.86), pytest.approx(0.96)
    assert json.loads(reproduce.BANDS.read_text()) == {"light": {**band, "low": low, "high": high}}
    accuracies[0] = 0.85
    assert not reproduce.quick(args)
    assert "light: test_accuracy 0.8500, band 0.8600 to 0.9600" in capsys.readouterr().out
