"""The experiments: each applies, trains, resumes with the same bits, can be captured or says why not, and evaluates."""

import csv
import importlib
import json
import os
import re
import shlex
import subprocess
from functools import partial, partialmethod

import helpers
import pytest
from helpers import ROOT, assert_same_run, run
from test_edits import use

from experiments import run as experiments

NAMES = experiments.names()
SHORT = ["--batch-size", "20", "--epochs", "2", "--log-interval", "1", "--device", "cpu"]


def play(copy, script, words):
    """In a process of its own: train a run, kill and resume another, capture a third; then evaluate the first."""
    use(copy)
    import torch._inductor

    import datasets
    import evaluate
    import utils
    from measures.watch import Watch
    from models.vae import VAE

    def nothing(*_, **__):
        return None

    # Few images, and nothing that costs seconds and is the same whatever the experiment: plots, FID, C++.
    load, helpers.Batches, evaluate.SAMPLES = datasets.load_digits, datasets.Batches, 20
    datasets.load_digits = lambda train: tuple(part[:150] for part in load(train))
    VAE.quick, VAE.log_likelihood, Watch.warn = {}, partialmethod(VAE.log_likelihood, samples=10), nothing
    for name in ("save", "plot_confusion", "plot_mistakes", "plot_filters", "print_measures"):
        setattr(evaluate, name, nothing)
    evaluate.beside_real_images, utils.save_plots = lambda *_: {"fid": 0, "real": {}}, nothing
    torch._inductor.compile = lambda graph, *_, **__: graph  # as it was traced, with every Python number fixed

    main = importlib.import_module(script.removesuffix(".py")).main
    words = [*words, *SHORT, *(["--val-size", "30"] if "--val-size" in words else [])]
    main([*words, "--output-dir", "whole"])
    with helpers.killed_at((1, 3)):
        main([*words, "--output-dir", "resumed", "--save-interval", "0"])
    main(["--resume", "resumed", "--save-interval", "60"])
    print("captured:")
    main([*words, "--output-dir", "captured", "--compile"])
    print("evaluated:")
    evaluate.main(["whole"])


def test_every_experiment_is_short_fits_the_code_and_says_what_it_is():
    assert len(NAMES) >= 30
    for name in NAMES:
        about, diff = experiments.read(name), ROOT / "experiments" / f"{name}.diff"
        assert {"paper", "command", "measure", "step", "expect"} <= about.keys(), name
        assert int(about["lines"]) <= 25, name
        assert "+++ b/engine/" not in diff.read_text(), name
        subprocess.run(["git", "apply", "--check", str(diff)], cwd=ROOT, check=True)


def test_every_experiment_was_measured_as_it_is():
    rows = json.loads(experiments.RESULTS.read_text())
    assert rows.keys() == set(NAMES)
    for name, row in rows.items():
        about = experiments.read(name)
        assert {key: row[key] for key in ("command", "measure")} == {key: about[key] for key in ("command", "measure")}
        assert len(row["without"]) == len(row["edited"]) == len(row["seeds"]) >= 3


def test_measuring_trains_a_baseline_too_once_for_all_that_share_it(tmp_path, monkeypatch):
    whole, trained, baselines = experiments.RESULTS.read_text(), [], {}
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.json")
    experiments.RESULTS.write_text(whole)
    monkeypatch.setattr(experiments, "values", lambda *each: trained.append(each[3].name) or [0.5])
    for name in ("mixup", "sam"):
        experiments.measure(name, tmp_path, [0], baselines)
    assert trained == ["baseline", "seed", "seed"]
    assert json.loads(experiments.RESULTS.read_text())["sam"]["without"] == [0.5]


def test_a_script_of_a_copy_does_not_see_the_repository_above_and_gets_the_callers_environment(tmp_path):
    (tmp_path / "say.py").write_text("import os; print(*map(os.environ.get, ('GIT_CEILING_DIRECTORIES', 'OWN')))")
    how = {"env": {**os.environ, "OWN": "3"}, "stdout": subprocess.PIPE, "text": True}
    with experiments.start(tmp_path, ["say.py"], **how) as process:
        assert process.communicate()[0].split() == [str(tmp_path.resolve().parent), "3"]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "mixup"]


@pytest.mark.parametrize("name", ["mixup", *SLOW])
def test_an_experiment_trains_resumes_is_captured_and_evaluated(tmp_path, name):
    about = experiments.read(name)
    experiments.apply(name, tmp_path / "code")
    script, *words = shlex.split(about["command"])
    before = partial(play, str(tmp_path / "code"), script, words)
    output, errors = run(tmp_path / "code" / "models" / "mlp.py", cwd=tmp_path / "code", before=before)
    assert not errors
    whole, resumed, captured = (tmp_path / "code" / run for run in ("whole", "resumed", "captured"))
    assert_same_run(whole, resumed)
    said = output.partition("captured:")[2].partition("evaluated:")[0]
    assert ("compiled in" in said) == (about["step"] == "captured"), said
    assert bool(re.search("every step runs eagerly|not compiled", said)) == (about["step"] != "captured"), said
    steps = list(zip(rows(whole / "curve.csv"), rows(captured / "curve.csv"), strict=True))
    for eager, replayed in steps[:12]:  # of both epochs; later, rounding may have grown
        assert replayed == pytest.approx(eager, rel=1e-2, abs=1e-3)
    metrics = json.loads((whole / "evaluation" / "metrics.json").read_text())
    assert about["measure"] in {**rows(whole / "metrics.csv")[-1], **metrics}


def rows(path):
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(path.open())]


@pytest.mark.slow
def test_one_command_applies_an_experiment_to_a_copy_and_trains_and_evaluates_there(tmp_path):
    script, folder = ROOT / "experiments" / "run.py", tmp_path / "runs" / "mixup"
    run(script, "mixup", "--dry-run", "--device", "cpu", cwd=tmp_path)
    assert (folder / "seed-0" / "evaluation" / "metrics.json").exists()
    assert (folder / "code" / "train_classifier.py").read_bytes() != (ROOT / "train_classifier.py").read_bytes()
    _, errors = run(script, "mixxup", cwd=tmp_path, code=2)
    assert "there is no experiment mixxup; choose from" in errors
    for words, said in ((["--seed=3"], "has its own --seed"), (["--measure", "--lr", "1"], "--measure takes no flags")):
        assert said in run(script, "mixup", *words, cwd=tmp_path, code=2)[1]
