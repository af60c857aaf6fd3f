"""The experiments: each applies, trains, resumes with the same bits, can be captured or says why not, and evaluates."""

import csv
import importlib
import json
import re
import shlex
import sys
from functools import partial

import helpers
import pytest
from helpers import ROOT, assert_close, assert_same_run, killed_at, run
from test_edits import use

sys.path.insert(0, str(ROOT / "experiments"))
import run as experiments

NAMES = experiments.names()
SHORT = ["--batch-size", "20", "--epochs", "2", "--device", "cpu"]


def play(copy, script, words):
    """In a process of its own: train a run, kill and resume another, capture a third; then evaluate the first."""
    use(copy)
    import torch._inductor

    import datasets
    import evaluate
    import utils

    load, helpers.Batches, evaluate.SAMPLES = datasets.load_digits, datasets.Batches, 200
    datasets.load_digits = lambda train: tuple(part[: 290 if train else 120] for part in load(train))
    # Traced, with every Python number fixed, but not translated to C++, which takes a minute.
    torch._inductor.compile = lambda graph, *_, **__: graph
    utils.save_plots = evaluate.save = evaluate.plot_confusion = evaluate.plot_mistakes = evaluate.plot_filters = (
        lambda *_: None
    )
    main = importlib.import_module(script.removesuffix(".py")).main
    main([*words, *SHORT, "--output-dir", "whole"])
    with killed_at((1, 4)):
        main([*words, *SHORT, "--output-dir", "resumed", "--save-interval", "0"])
    main(["--resume", "resumed"])
    print("captured:")
    main([*words, *SHORT, "--output-dir", "captured", "--compile"])
    print("evaluated:")
    evaluate.main(["whole"])


def test_every_experiment_is_short_applies_and_says_what_it_is(tmp_path):
    assert len(NAMES) >= 30
    for name in NAMES:
        about = experiments.read(name)
        assert {"what", "paper", "command", "measure", "step", "expect"} <= about.keys(), name
        assert int(about["lines"]) <= 25, name
        assert re.match(r"captured$|eagerly \(.+\)$", about["step"])
        edited = {file for file in re.findall(r"^\+\+\+ b/(.*)", (ROOT / "experiments" / f"{name}.diff").read_text(), re.M)}
        assert not any(file.startswith("engine/") for file in edited), name


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_an_experiment_trains_resumes_is_captured_and_evaluated(tmp_path, name):
    about = experiments.read(name)
    experiments.apply(name, tmp_path / "code")
    script, *words = shlex.split(about["command"])
    before = partial(play, str(tmp_path / "code"), script, words)
    output, errors = run(tmp_path / "code" / "utils.py", cwd=tmp_path, before=before)
    assert not errors
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    captured = output.partition("captured:")[2].partition("evaluated:")[0]
    assert ("compiled in" in captured) == (about["step"] == "captured"), captured
    assert ("every step runs eagerly" in captured) == (about["step"] != "captured"), captured
    assert_close(tmp_path / "whole", tmp_path / "captured")
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").open()))
    metrics = json.loads((tmp_path / "whole" / "evaluation" / "metrics.json").read_text())
    assert about["measure"] in {**rows[-1], **metrics}
