"""benchmarks/reproduce.py: seeds of a row or of a command of one's own, resumed, printed, and recorded if asked to."""

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
import threading
import time
from argparse import Namespace
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers import ROOT

import compare
import reproduce
from engine.errors import UserError

FIRST = "train_classifier.py --dataset digits --recipe paper --epochs 1"
OWN = "python train_classifier.py --dataset digits --model mlp --epochs 1 --lr 1e-3"


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    rows = {"first": (FIRST, ""), "second": (f"{FIRST} --second-stage first", "99 %"), "wrong": (f"{FIRST} --lr x", "")}
    rows["light"] = (OWN.removeprefix("python "), "")
    monkeypatch.setattr(reproduce, "ROWS", rows)
    monkeypatch.setattr(reproduce, "KEPT", {"light": {"seconds.csv": tmp_path / "kept.csv"}})
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
    monkeypatch.setattr("engine.pictures.save_figure", lambda figure, path: None)
    return calls


def test_a_rows_second_stage_continues_the_same_seeds_first(args, calls, tmp_path):
    args.record = True
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


def test_without_record_the_recorded_figure_is_printed_and_kept(args, calls, tmp_path, capsys):
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


def test_a_command_of_ones_own_runs_over_seeds(args, calls, tmp_path, capsys):
    args.seeds = 2
    reproduce.run_command(OWN, args)
    name = "classifier-dataset=digits-model=mlp-epochs=1-lr=1e-3"
    folders = [tmp_path / f"{name}-{seed}" for seed in (0, 1)]
    options = [json.loads((folder / "config.json").read_text())["options"] for folder in folders]
    assert [(each["seed"], each["lr"], each["model"]) for each in options] == [(0, 1e-3, "mlp"), (1, 1e-3, "mlp")]
    output = capsys.readouterr().out
    assert re.search(rf"{name}, 2 seeds\n  test_accuracy \d+\.\d\d ± \d+\.\d\d %\n  seconds of training .* ± ", output)
    assert sorted({path.name for path in tmp_path.iterdir()}) == [folder.name for folder in folders]  # no results.json

    # Printed as it is: the command that draws the runs.
    (printed,) = re.findall("python benchmarks/compare.py (.*)", output)
    compare.main([*shlex.split(printed), "--output", str(tmp_path / "picture.png")])
    assert f"{tmp_path / name} (2 seeds)" in capsys.readouterr().out

    # Again: what is finished is not trained again, and says so.
    calls.clear()
    shutil.rmtree(folders[1] / "evaluation")
    reproduce.run_command(OWN, args)
    assert [script for script, _ in calls] == ["train_classifier.py", "evaluate.py"]
    assert f"{folders[0]} is finished" in capsys.readouterr().out


def test_a_finished_seed_of_other_code_is_said(args, calls, monkeypatch, capsys):
    reproduce.run_command(OWN, args)
    monkeypatch.setattr("engine.provenance.code_fingerprint", lambda script: {})
    reproduce.run_command(OWN, args)
    assert "train_classifier.py changed since" in capsys.readouterr().err


def test_every_command_has_a_folder_of_its_own():
    commands = ["train_gan.py", "train_gan.py --amp", "train_gan.py --lr 1", "train_gan.py --lr 1 --amp"]
    commands += [f"train_gan.py --betas {'0.5 ' * 50}{last}" for last in ("0.9", "0.99")]
    commands += ["train_classifier.py --second-stage runs/a", "train_classifier.py --second-stage a"]
    names = [reproduce.folder_name(command.split()) for command in commands]
    assert len(set(names)) == len(commands)
    assert names[:4] == ["gan", "gan-amp", "gan-lr=1", "gan-lr=1-amp"]
    for name in names:
        assert len(name) <= 120
        assert "/" not in name


@pytest.mark.parametrize("command", ["", "python", "evaluate.py runs/a", "train_nothing.py", "--model mlp"])
def test_a_command_that_is_no_training_is_one_line(args, command):
    with pytest.raises(UserError, match="must begin with a training script"):
        reproduce.run_command(command, args)


@pytest.mark.parametrize("flag", ["--seed 3", "--output-dir=a", "--data-dir a", "--resume a", "--auto-resume"])
def test_flags_that_every_seed_gets_are_refused(args, flag):
    with pytest.raises(UserError, match=f"must not hold {re.split('[ =]', flag)[0]}, "):
        reproduce.run_command(f"train_gan.py {flag}", args)


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
    begun, second_failed = [], threading.Event()

    def run_seed(command, seed, *_):
        begun.append(seed)
        if seed == 0:
            second_failed.wait()
            time.sleep(0.5)
        else:
            second_failed.set()
            raise UserError(f"seed {seed}")

    monkeypatch.setattr(reproduce, "run_seed", run_seed)
    args.seeds, args.jobs = 9, 2
    with pytest.raises(UserError, match="seed 1"):
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


def test_bands_that_are_not_measured_stay(args, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "BANDS", tmp_path / "quick.json")
    monkeypatch.setattr(reproduce, "QUICK", {"light": ("", "test_accuracy"), "mnist": ("", "fid")})
    monkeypatch.setitem(reproduce.ROWS, "mnist", ("train_gan.py", ""))
    monkeypatch.setattr(reproduce, "run_seed", lambda *_: {"test_accuracy": 0.9})
    band = {"flags": "", "metric": "fid", "low": 1, "high": 2}
    reproduce.BANDS.write_text(json.dumps({"mnist": band}))
    args.record, args.data_dir = True, tmp_path  # which has no MNIST
    reproduce.quick(args)
    assert json.loads(reproduce.BANDS.read_text())["mnist"] == band


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
