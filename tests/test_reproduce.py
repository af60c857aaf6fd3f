"""benchmarks/reproduce.py: seeds of a row or of one's own command, resumed, printed, and recorded with --record."""

import contextlib
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
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers import ROOT

import compare
import reproduce
from engine.errors import UserError

FIRST = "train_classifier.py --dataset digits --recipe paper --epochs 1"
SECOND = "benchmarks/maxout_paper.py --dataset digits --epochs 1 --first-stage first"
OWN = "python train_classifier.py --dataset digits --model mlp --epochs 1 --lr 1e-3"


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    rows = {"first": (FIRST, ""), "second": (SECOND, "99 %"), "wrong": (f"{FIRST} --lr x", "")}
    rows["light"] = (OWN.removeprefix("python "), "")
    monkeypatch.setattr(reproduce, "ROWS", rows)
    monkeypatch.setattr(reproduce, "KEPT", {("light", "seconds.csv"): tmp_path / "kept.csv"})
    return Namespace(seeds=1, jobs=1, data_dir="data", output_dir=tmp_path, record=False)


@pytest.fixture
def calls(monkeypatch):
    """Scripts run in this process, one after the other, which saves seconds; (script, environment) of each call."""
    calls = []

    def call(command, env):
        script = Path(command[1])
        calls.append((script.name, env))
        importlib.import_module(script.stem).main(command[2:])
        return Namespace(wait=lambda: 0)

    def submit(function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    @contextlib.contextmanager
    def pool(jobs):
        yield Namespace(submit=submit, shutdown=lambda cancel_futures: None)

    monkeypatch.setattr(reproduce, "subprocess", Namespace(Popen=call))
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", pool)
    monkeypatch.setattr("engine.plots.save_figure", lambda figure, path: None)
    return calls


def test_a_rows_second_stage_continues_the_same_seeds_first(args, calls, tmp_path):
    args.record = True
    (tmp_path / "first-0").mkdir()
    for name in ("config.json", "best.pt", "checkpoint.pt.tmp"):  # of a run that was killed before its first checkpoint
        (tmp_path / "first-0" / name).touch()
    reproduce.run_row("second", args)
    options = json.loads((tmp_path / "second-0" / "config.json").read_text())["options"]
    assert options["first_stage"] == str(tmp_path / "first-0")
    rows = json.loads(reproduce.RESULTS.read_text())
    assert (rows["second"]["command"], rows["second"]["published"]) == (f"python {SECOND}", "99 %")
    assert [rows[name]["epochs_trained"] for name in ("first", "second")] == [[1], [1]]
    assert "test_errors" in rows["second"]

    # An interruption between training and evaluation: nothing is trained again.
    shutil.rmtree(tmp_path / "first-0" / "evaluation")
    calls.clear()
    reproduce.run_row("first", args)
    assert [script for script, _ in calls] == ["train_classifier.py", "evaluate.py"]
    assert json.loads(reproduce.RESULTS.read_text()) == rows


def test_without_record_the_recorded_value_is_printed_and_kept(args, calls, tmp_path, capsys):
    recorded = {"test_accuracy_mean": 0.9, "test_accuracy_sd": 0.0123, "test_errors": [30, 40]}
    reproduce.RESULTS.write_text(json.dumps({"light": recorded}))
    before = reproduce.RESULTS.read_bytes()
    reproduce.run_row("light", args)
    accuracy = json.loads((tmp_path / "light-0/evaluation/metrics.json").read_text())["test_accuracy"]
    output = capsys.readouterr().out
    assert f"light, 1 seed\n  test_accuracy {accuracy:.2%}".replace("%", " %") in output  # no ± of one seed
    assert "%, recorded 90.00 ± 1.23 % with 2 seeds\n" in output
    assert reproduce.RESULTS.read_bytes() == before
    assert not (tmp_path / "kept.csv").exists()

    args.record = True
    reproduce.run_row("light", args)
    assert json.loads(reproduce.RESULTS.read_text())["light"]["test_accuracy_mean"] == accuracy
    assert (tmp_path / "kept.csv").is_file()


def test_a_command_of_ones_own_runs_over_seeds(args, calls, tmp_path, monkeypatch, capsys):
    args.seeds = 2
    reproduce.run_command(OWN, args)
    name = "classifier-dataset=digits-model=mlp-epochs=1-lr=1e-3"
    folders = [tmp_path / f"{name}-{seed}" for seed in (0, 1)]
    options = [json.loads((folder / "config.json").read_text())["options"] for folder in folders]
    assert [(each["seed"], each["lr"], each["model"]) for each in options] == [(0, 1e-3, "mlp"), (1, 1e-3, "mlp")]
    output = capsys.readouterr().out
    assert re.search(rf"{name}, 2 seeds\n  test_accuracy \d+\.\d\d ± \d+\.\d\d %\n  seconds of training .* ± ", output)
    assert sorted({path.name for path in tmp_path.iterdir()}) == [folder.name for folder in folders]  # no results.json

    # Printed as it is: the command that plots the runs.
    (printed,) = re.findall("python benchmarks/compare.py (.*)", output)
    compare.main([*shlex.split(printed), "--output", str(tmp_path / "plot.png")])
    assert f"{tmp_path / name} (2 seeds)" in capsys.readouterr().out

    # Again: what is finished is not trained again, and says so.
    calls.clear()
    shutil.rmtree(folders[1] / "evaluation")
    reproduce.run_command(OWN, args)
    assert [script for script, _ in calls] == ["train_classifier.py", "evaluate.py"]
    assert f"{folders[0]} is finished" in capsys.readouterr().out
    monkeypatch.setattr("engine.provenance.code_fingerprint", lambda script: {})
    reproduce.run_command(OWN, args)
    assert "train_classifier.py changed since" in capsys.readouterr().err


def test_every_command_has_a_folder_of_its_own():
    commands = ["train_gan.py", "train_gan.py --amp", "train_gan.py --lr 1", "train_gan.py --lr 1 --amp"]
    commands += [f"train_gan.py --betas {'0.5 ' * 50}{last}" for last in ("0.9", "0.99")]
    commands += ["train_classifier.py --start-from runs/a", "train_classifier.py --start-from a"]
    names = [reproduce.folder_name(command.split()) for command in commands]
    assert len(set(names)) == len(commands)
    assert names[:4] == ["gan", "gan-amp", "gan-lr=1", "gan-lr=1-amp"]
    for name in names:
        assert len(name) <= 120
        assert "/" not in name


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((command, "must begin with a training script") for command in ("", "python", "evaluate.py runs/a", "--lr 1")),
        *((f"train_gan.py {flag}", f"must not hold {re.split('[ =]', flag)[0]}, ")
          for flag in ("--seed 3", "--output-dir=a", "--data-dir a", "--resume a", "--auto-resume")),
    ],
)  # fmt: skip
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


def test_the_measures_of_a_likelihood_model_are_beside_the_recorded_ones(tmp_path, capsys):
    (tmp_path / "seconds.csv").write_text("epoch,seconds\n1,2.0\n2,3.0\n")
    recorded = {"seeds": [{"log_likelihood": -81.24, "fid": 0.05}]}
    reproduce.print_seeds("rnn", [tmp_path], [{"log_likelihood": -80.123, "fid": 0.06}], recorded)
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "rnn, 1 seed",
        "  log_likelihood -80.12 nats, recorded -81.24 nats with 1 seed",
        "  fid 0.0600, recorded 0.0500 with 1 seed",
        "  seconds of training 5.0",
    ]


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
    assert "stopped and saved; resume with: python train_classifier.py --resume" in output
    assert output.endswith("reproduce.py: interrupted\n")


def test_a_run_of_another_command_is_not_taken_for_a_seed(args, calls, monkeypatch):
    reproduce.run_row("light", args)
    monkeypatch.setitem(reproduce.ROWS, "light", (f"{OWN.removeprefix('python ')} --epochs 2", ""))
    with pytest.raises(UserError, match=r"light-0 was trained with epochs=1, not epochs=2; delete it"):
        reproduce.run_row("light", args)


def test_seeds_of_different_commits_are_a_warning(args, calls, tmp_path, capsys):
    args.record, args.seeds = True, 2
    reproduce.run_row("light", args)
    assert "the seeds differ" not in capsys.readouterr().out
    config = json.loads((tmp_path / "light-1" / "config.json").read_text())
    (tmp_path / "light-1" / "config.json").write_text(json.dumps({**config, "commit": "another"}))
    reproduce.run_row("light", args)
    assert "warning: the seeds differ in commit; the row names that of seed 0" in capsys.readouterr().out


@pytest.fixture
def quick(args, monkeypatch, tmp_path):
    """Two short forms, of which the second needs MNIST; `accuracies` of their seeds."""
    args.data_dir = tmp_path  # which has no MNIST
    monkeypatch.setattr(reproduce, "BANDS", tmp_path / "quick.json")
    forms = {"light": (OWN.removeprefix("python "), "test_accuracy"), "mnist": ("train_gan.py", "fid")}
    monkeypatch.setattr(reproduce, "QUICK", forms)
    accuracies = [0.9, 0.92, 0.91]
    monkeypatch.setattr(reproduce, "run_seed", lambda command, seed, *_: {"test_accuracy": accuracies[seed]})
    return accuracies


def test_bands_are_twice_the_range_of_three_seeds_on_either_side(args, quick):
    band = {"command": "", "metric": "fid", "low": 1, "high": 2}
    reproduce.BANDS.write_text(json.dumps({"mnist": band}))
    args.record = True
    reproduce.quick(args)
    bands = json.loads(reproduce.BANDS.read_text())
    assert bands["mnist"] == band  # it was not measured
    assert (bands["light"]["low"], bands["light"]["high"]) == (pytest.approx(0.86), pytest.approx(0.96))


def test_a_short_form_outside_its_band_fails(args, quick, capsys):
    reproduce.BANDS.write_text(json.dumps({"light": {"low": 0.8, "high": 0.95}}))
    assert reproduce.quick(args)
    quick[0] = 0.79
    assert not reproduce.quick(args)
    output = capsys.readouterr().out
    assert "mnist: skipped, there is no MNIST" in output
    assert "light: test_accuracy 0.7900, band 0.8000 to 0.9500" in output


def test_the_pinned_bands_are_those_of_the_short_forms():
    bands = json.loads(reproduce.BANDS.read_text())
    assert {name: (band["command"], band["metric"]) for name, band in bands.items()} == reproduce.QUICK


@pytest.mark.parametrize("words", [["no-row"], ["mlp-lecture", "--quick"]])
def test_names_that_are_not_rows_are_a_usage_error(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(words)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_seed_that_fails_is_one_line(args):
    args.record = True
    with pytest.raises(UserError, match=r"train_classifier\.py stopped"):
        reproduce.run_row("wrong", args)
    assert not reproduce.RESULTS.exists()
