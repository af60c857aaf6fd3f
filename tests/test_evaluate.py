"""evaluate.py as its user runs it: numbers, plots, samples, and the user's own images."""

import json
import os

import numpy
import pytest
import torch
from helpers import DIGITS, load, save_sealed, train
from PIL import Image

import evaluate
import train_cgan
import train_gan
import train_likelihood
from datasets import binarise
from datasets import load as load_data
from datasets.binarise import TEST_SEED
from engine.checkpoint import load_checkpoint
from engine.errors import UserError
from engine.folder import lock
from measures.samples import sample_images
from models import KINDS
from models.mlp import MLP
from models.vae import VAE


def call(*flags):
    """evaluate.py in this process."""
    return evaluate.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A dry run of the MLP, evaluated once; its metrics are in `evaluation`."""
    folder = tmp_path_factory.mktemp("small") / "run"
    train(*DIGITS, "--model", "mlp", "--dry-run", "--output-dir", folder)
    call(folder)
    return folder


def metrics_of(folder):
    return json.loads((folder / "evaluation" / "metrics.json").read_text())


def test_the_first_command_learns_and_the_report_says_how_well(tmp_path, capsys):
    """The README's first command, with three of its sixty epochs."""
    train(*DIGITS, "--recipe", "best", "--epochs", 3, "--output-dir", tmp_path / "run")
    call(tmp_path / "run")
    output = capsys.readouterr().out
    folder = tmp_path / "run" / "evaluation"
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["dataset"], metrics["model"], metrics["epochs"]) == ("digits", "cnn", 3)
    assert metrics["test_accuracy"] >= 0.8  # by chance 0.1
    assert f"test accuracy {metrics['test_accuracy']:.2%}: {metrics['test_errors']} errors in 360 images" in output
    assert f"{metrics['per_class']['7']['f1-score']:.4f}" in output
    plots = {"confusion_matrix.png", "mistakes.png", "filters.png"}
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "predictions.csv"} | plots
    for name in plots:
        Image.open(folder / name).verify()
        assert name in output.splitlines()[-1]


def test_the_ema_of_the_best_epoch_is_what_is_evaluated(tmp_path):
    flags = ["--recipe", "best", "--model", "mlp", "--epochs", 1, "--val-size", 50]
    train(*DIGITS, *flags, "--output-dir", tmp_path / "run")
    best = load(tmp_path / "run" / "best.pt")
    ema = best["state"]["ema"]["model"]["linear1.weight"]
    assert not torch.equal(ema, best["state"]["model"]["linear1.weight"])
    ema += 1  # so that it is not that of checkpoint.pt
    save_sealed(best, tmp_path / "run" / "best.pt")
    assert torch.equal(evaluate.load_model(tmp_path / "run").linear1.weight, ema)


def test_a_script_of_ones_own_is_evaluated_by_the_kind_of_its_runs(small_run, tmp_path, monkeypatch):
    checkpoint, options = load(small_run / "checkpoint.pt"), evaluate.load_model(small_run).options
    assert options["kind"] == "classifier"
    checkpoint["options"].update(script="distill.py", kind="student")  # a kind of one's own
    save_sealed(checkpoint, tmp_path / "mine" / "checkpoint.pt")
    with pytest.raises(UserError, match=r"mine is of the unknown kind student; models/.*: add it to KINDS there"):
        call(tmp_path / "mine")
    monkeypatch.setitem(KINDS, "student", ("model", lambda options: MLP()))
    assert call(tmp_path / "mine") == metrics_of(small_run)


def test_every_changed_or_missing_byte_of_a_checkpoint_is_detected_and_what_is_none(small_run, tmp_path):
    whole = (small_run / "checkpoint.pt").read_bytes()
    copy = tmp_path / "copy.pt"
    places = [*range(10), *range(len(whole) - 40, len(whole)), *torch.randint(len(whole), (50,)).tolist()]
    changed = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    for content in (*changed, b"", whole[: len(whole) // 2], whole[:-1]):
        copy.write_bytes(content)
        with pytest.raises(UserError, match=r"copy\.pt"):
            load_checkpoint(copy)
    for content in (5, {"options": 1}, [torch.zeros(2)]):  # with a valid SHA-256 of their own
        save_sealed(content, copy)
        with pytest.raises(UserError, match=r"copy\.pt"):
            load_checkpoint(copy)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_foreign_file_is_executed(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    save_sealed({"options": Canary()}, path)
    for command in (lambda: call(path.parent), lambda: train("--resume", path.parent)):
        with pytest.raises(UserError, match=r"run/\w+\.pt "):
            command()
    assert not (tmp_path / "executed").exists()


def test_a_table_of_predictions_begins_with_the_most_confident_mistakes(small_run):
    lines = (small_run / "evaluation" / "predictions.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    wrong = [row for row in rows if row[1] != row[2]]
    assert len(wrong) == metrics_of(small_run)["test_errors"] > 0
    assert rows[: len(wrong)] == wrong
    assert [row[3] for row in wrong] == sorted((row[3] for row in wrong), reverse=True)
    labels = load_data("digits", None, train=False)[1].tolist()
    assert {int(row[0]): int(row[1]) for row in rows} == dict(enumerate(labels))


@pytest.mark.parametrize(("batch", "where"), [(0, "epoch 1"), (3, "epoch 1 and 3 batches of the next")])
def test_evaluating_says_that_a_run_is_still_training_was_a_dry_run_or_ends_within_an_epoch(
    small_run, tmp_path, capsys, batch, where
):
    save_sealed({**load(small_run / "checkpoint.pt"), "batch": batch}, tmp_path / "run" / "checkpoint.pt")
    held = lock(tmp_path / "run")
    call(tmp_path / "run")
    held.release()
    said = ["is a dry run of a few steps; its results mean nothing"]
    said += [f"was saved within an epoch; these are the results of {where}"] * bool(batch)
    said += [f"is still training; these are the results of {where}"]
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert shown == [f"warning: {tmp_path / 'run'} {words}" for words in said]
    assert metrics_of(tmp_path / "run").get("batch", 0) == batch


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """A run of each training script of generators, after two steps."""
    folder = tmp_path_factory.mktemp("generators")
    for name, script in (("gan", train_gan), ("cgan", train_cgan)):
        script.main([*DIGITS, "--dry-run", "--output-dir", str(folder / name)])
    return folder


@pytest.mark.parametrize("name", [pytest.param("gan", marks=pytest.mark.slow), "cgan"])
def test_a_generator_is_measured_beside_real_images(generators, name, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SAMPLES", 1000)
    call(generators / name)
    output = capsys.readouterr().out
    folder = generators / name / "evaluation"
    metrics = metrics_of(generators / name)
    values = {
        "parzen_log_likelihood", "parzen_standard_error", "parzen_sigma", "fid", "kid", "precision", "recall",
        "density", "coverage", "class_histogram", "class_kl",
    }  # fmt: skip
    if name == "cgan":
        values |= {"conditional_accuracy", "class_coverage"}
    for part in (metrics, metrics["real"]):
        assert values | {"images"} == part.keys() - {
            "dataset",
            "epochs",
            "noise_seed",
            "real",
            "parameters",
            "sampling_seconds",
        }
        assert sum(part["class_histogram"]) == pytest.approx(1)
    assert metrics["fid"] > 10 * metrics["real"]["fid"]
    for value in values:
        assert value in output
    assert f"{'fid':24}{metrics['fid']:10.4g}{metrics['real']['fid']:10.4g}\n" in output
    plots = {"interpolation-seed0.png": 10, "nearest_training_images.png": 2}
    if name == "cgan":
        plots["same_noise-seed0.png"] = 10
    for plot, rows in plots.items():
        assert Image.open(folder / plot).height == rows * 56


def test_samples_come_from_the_seed_alone_and_as_raw_values(generators):
    """The noise is none that training uses; the image shows the values as they are."""
    folder = generators / "cgan" / "evaluation"
    for seed in ("4", "3"):
        call(generators / "cgan", "--samples", "20", "--digit", "7", "--seed", seed)
    first = numpy.load(folder / "samples-20-digit7-seed3.npz")
    assert not numpy.array_equal(numpy.load(folder / "samples-20-digit7-seed4.npz")["images"], first["images"])
    assert first["labels"].tolist() == [7] * 20
    own = torch.Generator().manual_seed(2**31 + 3)
    assert numpy.array_equal(first["z"], torch.rand(20, 100, generator=own))
    generator = evaluate.load_model(generators / "cgan")
    assert numpy.array_equal(evaluate.sample(generator, 20, digit=7, seed=3)[:, 0].numpy(), first["images"])
    with torch.no_grad():
        by_hand = generator(torch.from_numpy(first["z"]), torch.full((20,), 7))
    assert numpy.allclose(by_hand[:, 0].numpy(), first["images"], atol=1e-6)
    grid = numpy.asarray(Image.open(folder / "samples-20-digit7-seed3.png"))
    assert grid.shape == (4 * 56, 5 * 56)
    assert (grid[:56:2, 56:112:2] == numpy.round(first["images"][1] * 255)).all()
    assert Image.open(folder / "interpolation-digit7-seed3.png").height == 10 * 56
    assert not (folder / "samples-20-digit7-seed3").exists()


@pytest.mark.parametrize(
    ("flags", "labels", "columns"),
    [(["--digit", "7", "8", "--columns", "2", "--separate"], [7, 7, 7, 8, 8, 8], 2), ([], [0, 1, 3, 5, 6, 8], 3)],
)
def test_samples_are_of_the_classes_asked_for_in_so_many_columns_or_one_by_one(generators, flags, labels, columns):
    call(generators / "cgan", "--samples", "6", *flags)
    name = f"samples-6{'-digit7-8' if flags else ''}-seed0"
    samples = numpy.load(generators / "cgan" / "evaluation" / f"{name}.npz")
    assert samples["labels"].tolist() == labels
    assert Image.open(generators / "cgan" / "evaluation" / f"{name}.png").width == columns * 56
    paths = sorted((generators / "cgan" / "evaluation" / name).glob("*"))
    assert [path.name for path in paths] == [f"{i:05}.png" for i in range(6 if flags else 0)]
    for path, image in zip(paths, samples["images"]):
        assert (numpy.asarray(Image.open(path)) == numpy.round(image * 255)).all()


def test_the_plane_of_a_vae_with_two_latent_dimensions_is_mapped(tmp_path, monkeypatch):
    flags = [*DIGITS, "--dry-run", "--latent", "2", "--output-dir", str(tmp_path / "run")]
    train_likelihood.main(flags)
    given, scored = [], []
    monkeypatch.setattr(evaluate, "SAMPLES", 20)
    monkeypatch.setattr(evaluate, "print_measures", lambda *_: None)  # which the test above has shown
    monkeypatch.setattr(evaluate, "nearest_images", lambda x, images: given.append(len(images)) or x)
    beside = lambda *sets: given.extend([len(sets[2][0]), len(sets[3][0])]) or {"real": {}}  # noqa: E731
    monkeypatch.setattr(evaluate, "beside_real_images", beside)
    monkeypatch.setattr(VAE, "log_likelihood", lambda self, x: scored.append(x) or torch.zeros(len(x)))
    monkeypatch.setattr(evaluate, "sample_images", lambda *told: given.append(told[2]) or sample_images(*told))
    call(tmp_path / "run", "--seed", 3)
    assert given == [3, 1437, 1437, 360], "noise of the seed; beside training, training and test images"
    assert torch.equal(torch.cat(scored), binarise(load_data("digits", None, train=False)[0], TEST_SEED) / 255)
    seen = numpy.asarray(Image.open(tmp_path / "run" / "evaluation" / "plane.png"))[::2, ::2] / 255
    network = evaluate.load_model(tmp_path / "run")
    z = torch.tensor([[-1.64485, 1.64485]])  # the first and the last twentieth: top right
    assert seen.shape == (280, 280)
    assert numpy.allclose(seen[:28, -28:], network.decode(z)[0, 0].detach(), atol=0.01)


def test_a_run_that_is_missing_here_is_not_replaced_by_one_of_the_clone(small_run, monkeypatch):
    monkeypatch.setattr("engine.checkpoint.ROOT", small_run.parent)
    with pytest.raises(UserError, match="does not exist"):
        evaluate.load_model(small_run.name)


def test_flags_that_do_not_fit_the_run_are_refused(generators, small_run):
    for folder, flags, words in [
        (small_run, ["--samples", "5", "--digit", "7"], "is a classifier; --samples needs a run of a generator"),
        (generators / "gan", ["--samples", "5", "--digit", "7"], "trained without labels; --digit needs"),
        (generators / "gan", ["--image", "x.png"], "is a generator; --image needs a run of a classifier"),
        (generators / "gan", ["--dataset", "digits"], "is a generator; --dataset needs a run of a classifier"),
        (generators / "cgan", ["--samples", "5", "--digit", "10"], "^digit 10: there is no such class; choose from 0"),
    ]:
        with pytest.raises(UserError, match=words):
            call(folder, *flags)
    for flags in (["--digit", "7"], ["--columns", "2"], ["--separate"], ["--samples", "0"],
                  ["--image", "x.png", "--dataset", "digits"]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            call(generators / "cgan", *flags)
