"""benchmarks/compare.py: which runs make one setting, what is printed and plotted, errors on one line."""

import json
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from helpers import DIGITS, assert_one_line, few_digits, load, run, save_sealed, train

import compare
import datasets
import evaluate
from engine.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two settings of two seeds each; those of tanh are evaluated."""
    folder, whole = tmp_path_factory.mktemp("runs"), datasets.load_digits
    few_digits(700)
    for activation, lr, log_interval in (("relu", 2e-4, 100), ("tanh", 1e-3, 10)):
        for seed in (0, 1):
            flags = ["--model", "mlp", "--epochs", 2, "--activation", activation, "--lr", lr, "--seed", seed]
            flags += ["--log-interval", log_interval + seed]  # it makes no other setting
            train(*DIGITS, *flags, "--output-dir", folder / f"{activation}-{seed}")
            if activation == "tanh":
                evaluate.main([str(folder / f"{activation}-{seed}")])
    datasets.load_digits = whole
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them in the current folder, which a test may change."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("previous.pt", "*.png"))
    return tmp_path


def test_seeds_of_one_setting_are_mean_and_sd(runs, capsys):
    compare.main(["relu-0", "relu-1", "tanh-*", "tanh-0", "--output", "plot.png"])  # no shell has expanded the pattern
    header, *rows = capsys.readouterr().out.splitlines()
    rows, lines = rows[:2], rows[2:]
    assert {row.index("2.0 ± 0.0") for row in rows} == {header.index("epochs")}
    relu, tanh = (dict(zip(re.split("  +", header), re.split("  +", row))) for row in rows)
    assert [relu[""], tanh[""]] == ["relu-0 and 1 more", "tanh-0 and 1 more"]
    tested = [json.loads((runs / f"tanh-{i}/evaluation/metrics.json").read_text())["test_accuracy"] for i in (0, 1)]
    assert tanh["test_accuracy"] == f"{100 * statistics.mean(tested):.2f} ± {100 * statistics.stdev(tested):.2f} %"
    losses = [load(f"relu-{i}/checkpoint.pt")["history"][-1]["loss"] for i in (0, 1)]
    assert relu["loss"] == f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    assert "test_accuracy" not in relu
    assert lines == [
        "relu-0 and 1 more: lr=0.0002 activation=relu",
        "tanh-0 and 1 more: lr=0.001 activation=tanh",
        "wrote plot.png",
    ]


def test_a_result_measured_before_the_run_trained_on_is_left_out(runs):
    assert compare.read_run(Path("tanh-0")).values["test_accuracy"]
    for position in ({"epoch": 1}, {"batch": 3}):
        save_sealed({**load("tanh-0/checkpoint.pt"), **position}, runs / "tanh-0" / "best.pt")
        assert "test_accuracy" not in compare.read_run(Path("tanh-0")).values
    path = runs / "tanh-1" / "evaluation" / "metrics.json"
    for seed in (0, 5):  # of the noise: a row's samples have seed 0
        path.write_text(json.dumps({**json.loads(path.read_text()), "noise_seed": seed}))
        assert ("test_accuracy" in compare.read_run(Path("tanh-1")).values) == (seed == 0)


def test_what_evaluate_measured_of_a_file_and_a_second_run_of_a_seed_are_left_out(runs, capsys):
    (runs / "relu-weights" / "evaluation").mkdir(parents=True)
    shutil.copytree("relu-0", "relu-again")
    assert [len(setting) for setting in compare.read_settings(["relu-*"])] == [2]
    said = "relu-again: left out; it is the same seed of the same setting as relu-0\n"
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match=r"^relu-weights/checkpoint\.pt does not exist"):
        compare.read_settings(["relu-weights"])


def test_the_loss_of_an_rbm_or_of_grey_pixels_is_not_compared_with_a_likelihood():
    vae, rbm = fake([], []), fake([], [])
    for one, model in ((vae, "vae"), (rbm, "rbm")):
        one.history, one.values, one.options = [{"loss": 1.0}], {"loss": 1.0}, {"model": model}
    assert compare.shared_metrics([vae, rbm]) == []
    assert compare.shared_metrics([vae, vae]) == ["loss"]
    for binarise, shared in (("none", []), ("fixed", ["loss"])):
        rbm.options = {"model": "vae", "binarise": binarise}
        assert compare.shared_metrics([vae, rbm]) == shared


def test_parzens_log_likelihood_is_not_compared_with_a_models():
    gan, vae, name = fake([], []), fake([], []), "val_log_likelihood"
    for one, kind in ((gan, "gan"), (vae, "likelihood")):
        one.history, one.values, one.options = [{name: 1.0}], {name: 1.0}, {"kind": kind}
    assert compare.shared_metrics([gan, vae]) == []
    assert compare.shared_metrics([gan, gan]) == [name]


def test_other_devices_and_edited_code_are_other_settings(runs):
    shutil.copytree("relu-0", "again")
    checkpoint = load("again/checkpoint.pt")
    checkpoint["options"].update(seed=2, threads=2, products="torch")  # a run chooses the last two itself
    save_sealed(checkpoint, runs / "again" / "checkpoint.pt")
    twice = ["relu-*", "again", str(runs / "relu-0")]
    assert [len(setting) for setting in compare.read_settings(twice)] == [3]
    config = json.loads((runs / "relu-1" / "config.json").read_text())
    (runs / "relu-1" / "config.json").write_text(json.dumps({**config, "device": "cuda:0"}))
    checkpoint["code"]["train_classifier.py"] = "edited"
    save_sealed(checkpoint, runs / "again" / "checkpoint.pt")
    assert [len(setting) for setting in compare.read_settings(["relu-*", "again"])] == [1, 1, 1]


def fake(accuracies, seconds):
    rows = [{"epoch": i + 1, "accuracy": value} for i, value in enumerate(accuracies)]
    seconds = np.cumsum([0, *seconds]).tolist()
    return compare.SimpleNamespace(folder="run", history=rows, curve=[], seconds=seconds, values={})


def test_lines_are_means_and_bands_reach_from_the_lowest_to_the_highest():
    settings = [[fake([0.2, 0.6, 0.8], [1, 1, 1]), fake([0.4, 0.8], [3, 3])], [fake([0.5, 0.7, 0.9], [1, 1, 1])]]
    figure = compare.plot(settings, ["accuracy"])
    over_epochs, over_seconds = figure.axes
    line, other = over_epochs.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.3], [2, 0.7]])  # up to the last epoch that both have
    np.testing.assert_allclose(other.get_xydata(), [[1, 0.5], [2, 0.7], [3, 0.9]])
    np.testing.assert_allclose(over_seconds.lines[0].get_xydata(), [[2, 0.3], [4, 0.7]])
    band = over_epochs.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band.round(6)} == {(1, 0.2), (1, 0.4), (2, 0.6), (2, 0.8)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run and 1 more", "run"]


def test_the_plot_is_a_png_whose_folder_is_made(runs, capsys):
    compare.main(["relu-0", "--output", "new/folder/plot.png"])
    assert Path("new/folder/plot.png").is_file()
    with pytest.raises(SystemExit, match="2"):
        compare.main(["relu-0", "--output", "plot.pdf"])
    assert "--output plot.pdf: the plot is a PNG" in capsys.readouterr().err


def test_92_and_93_percent_lie_apart():
    rise = [0.1, 0.3, *[0.9] * 4]
    settings = [[fake([*rise, end, end], [1] * 8)] for end in (0.92, 0.93)]
    for axis in compare.plot(settings, ["accuracy"]).axes:
        low, high = axis.get_ylim()
        assert low < 0.92 < 0.93 < high
        assert 0.01 / (high - low) > 0.1
        assert [text.get_text() for text in axis.texts] == ["//"]  # the axis does not start at 0
    for axis in compare.plot([[fake([0.9, 0.5, 0.1, 0.05, 0.01], [1] * 5)]], ["accuracy"]).axes:
        assert axis.get_ylim()[0] < 0
        assert not axis.texts


def test_the_reports_within_epochs_are_plotted_and_different_losses_share_no_axis(runs, monkeypatch):
    figures = []
    monkeypatch.setattr(compare.plots, "save_figure", lambda figure, path: figures.append(figure))
    compare.main(["tanh-0", "tanh-1"])
    assert "tanh-0 and 1 more: test accuracy" in figures[0].legends[0].get_texts()[0].get_text()
    loss = figures[0].axes[0]
    assert loss.get_ylabel() == "loss"
    assert len(loss.lines[0].get_xdata()) > 2
    assert max(loss.lines[0].get_xdata()) == 2
    assert [axis.get_xlabel() for axis in figures[0].axes] == ["epoch"] * 2 + ["seconds of training"] * 2
    checkpoint = load("tanh-1/checkpoint.pt")
    checkpoint["options"]["loss"] = "mse"
    save_sealed(checkpoint, runs / "tanh-1" / "checkpoint.pt")
    compare.main(["tanh-0", "tanh-1"])
    assert {axis.get_ylabel() for axis in figures[1].axes} == {"accuracy"}


def test_a_metric_that_not_every_seed_has_leaves_its_cell_empty(runs):
    def rewrite(history):
        checkpoint = load("tanh-0/checkpoint.pt")
        save_sealed({**checkpoint, "history": history, "epoch": len(history)}, runs / "tanh-0" / "checkpoint.pt")

    rewrite([{"epoch": 1, "loss": 2.0, "val_loss": 3.0}])
    (setting,) = compare.read_settings(["tanh-0", "tanh-1"])
    assert compare.cell(setting, "epochs") == "1.5 ± 0.7"
    assert "±" in compare.cell(setting, "loss")
    assert compare.cell(setting, "val_loss") == compare.cell(setting, "accuracy") == ""
    rewrite([{"epoch": 1, "loss_d": 2.0}])
    with pytest.raises(UserError, match="no metric in common"):
        compare.main(["tanh-0", "tanh-1"])


@pytest.mark.parametrize("content", ["", "null", "[]", '{"epochs": 2, "fid": "x"}', "[" * 100_000])
def test_a_metrics_json_that_evaluate_did_not_write_is_one_line_that_names_it(runs, content):
    (runs / "tanh-0" / "evaluation").mkdir(exist_ok=True)
    (runs / "tanh-0" / "evaluation" / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"tanh-0.*metrics\.json.*evaluate\.py tanh-0"):
        compare.main(["tanh-0"])


def test_what_is_no_run_or_has_no_epoch_is_one_line(runs):
    (runs / "empty").mkdir()
    save_sealed({**load("relu-0/checkpoint.pt"), "history": []}, runs / "begun" / "checkpoint.pt")
    for name, reason in (
        ("missing", "there is no such run folder"),
        ("nothing-*", "there is no such run folder"),
        ("empty", "this is not a run"),
        ("begun", "has no finished epoch yet"),
    ):
        with pytest.raises(UserError, match=rf"^{name.replace('*', '.')}.*{reason}"):
            compare.main(["relu-0", name])
    assert not Path("compare.png").exists()
    _, errors = run("benchmarks/compare.py", "missing", cwd=runs, code=1)
    assert_one_line(errors, "compare.py: error: missing")
