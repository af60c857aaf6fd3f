"""evaluate.py as its user runs it: numbers, plots, samples, and the user's own images."""

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy
import pytest
import torch
from helpers import DIGITS, assert_one_line, load, run, save_sealed, train
from PIL import Image

import evaluate
import train_cgan
import train_gan
import train_likelihood
from datasets import load as load_data
from engine.checkpoint import load_checkpoint
from engine.errors import UserError
from engine.folder import lock
from models import KINDS
from models.mlp import MLP
from models.vae import VAE
from photos import read


def call(*flags):
    """evaluate.py in this process."""
    return evaluate.main([str(flag) for flag in flags])


@pytest.fixture
def small_run(tmp_path):
    train(*DIGITS, "--model", "mlp", "--dry-run", "--output-dir", tmp_path / "run")
    return tmp_path / "run"


def test_the_first_command_learns_and_the_report_says_how_well(tmp_path, capsys):
    """The README's first command, with three of its sixty epochs."""
    train(*DIGITS, "--recipe", "best", "--epochs", 3, "--output-dir", tmp_path / "run")
    call(tmp_path / "run")
    output = capsys.readouterr().out
    folder = tmp_path / "run" / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
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
    assert call(tmp_path / "mine") == call(small_run)


# Files that are not what they should be -------------------------------------------------------------------------------


def test_every_changed_or_missing_byte_of_a_checkpoint_is_detected(small_run, tmp_path):
    whole = (small_run / "checkpoint.pt").read_bytes()
    copy = tmp_path / "copy.pt"
    for place in [*range(10), *range(len(whole) - 40, len(whole)), *torch.randint(len(whole), (50,)).tolist()]:
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"copy\.pt"):
            load_checkpoint(copy)
    for length in [0, len(whole) // 2, len(whole) - 1]:
        copy.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"copy\.pt"):
            load_checkpoint(copy)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("sealed", [False, True])
def test_nothing_in_a_foreign_file_is_executed(tmp_path, sealed):
    canary, path = Canary(tmp_path / "executed"), tmp_path / "run" / "checkpoint.pt"
    if sealed:
        save_sealed({"options": canary}, path)
    else:
        path.parent.mkdir()
        path.write_bytes(pickle.dumps(canary))
    for command in (lambda: call(path.parent), lambda: train("--resume", path.parent)):
        with pytest.raises(UserError, match=r"run/\w+\.pt "):
            command()
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_and_one_of_another_network_get_one_line(small_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.* does not exist"):
        call(tmp_path / "empty")
    for content in (5, {"options": 1}, [torch.zeros(2)]):  # with a valid SHA-256 of their own
        save_sealed(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=r"other\.pt"):
            load_checkpoint(tmp_path / "other.pt")
    checkpoint = load(small_run / "checkpoint.pt")
    checkpoint["options"]["model"] = "cnn"
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    _, errors = run("evaluate.py", "run", cwd=tmp_path, code=1)
    assert_one_line(errors, "run", "models/")


# Images of the user's own -------------------------------------------------------------------------------------------


def as_drawn(image):
    """A 28x28 digit as somebody might draw it: large, off centre, black on white."""
    large = Image.fromarray(255 - image.numpy()).resize((200, 200), Image.Resampling.BICUBIC)
    paper = Image.new("L", (500, 320), 255)
    paper.paste(large, (230, 10))
    return paper


def test_photo_is_fitted_into_20_pixels_and_centred_by_mass(tmp_path):
    paper = Image.new("L", (300, 100), 255)
    paper.paste(0, (10, 20, 20, 80))  # a stroke 10 wide and 60 high
    paper.save(tmp_path / "one.png")
    ink = read(tmp_path / "one.png").images[0, 0] > 127
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    assert (rows.min(), rows.max()) == (4, 23)
    assert (columns.min(), columns.max()) in ((12, 14), (13, 15))


def test_image_prints_all_ten_probabilities_and_shows_what_was_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image, label = (part[3] for part in load_data("digits", None, train=False))
    as_drawn(image[0]).save("mine.png")
    call("weights/cnn.pt", "--image", "mine.png")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"mine.png: {label}"
    assert third == f"wrote to {Path('runs') / 'cnn-weights' / 'evaluation'}: seen.png"
    seen = numpy.asarray(Image.open("runs/cnn-weights/evaluation/seen.png"))
    caption, digit = seen[:15], seen[15::3, ::3]  # three times as large, below the file's name
    assert caption.max() > 128
    assert (digit == read("mine.png").images[0, 0].numpy()).all()
    values = [float(part.rstrip("%")) for part in second.split()[1::2]]
    assert len(values) == 10
    assert sum(values) == pytest.approx(100, abs=1)


def test_files_that_cannot_be_read_get_one_line_each(small_run, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    as_drawn(torch.zeros(28, 28, dtype=torch.uint8).fill_diagonal_(255)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-100])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "squeezed.png").write_bytes(gzip.compress((tmp_path / "good.png").read_bytes()))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 400 megapixels in 50 kB
    bad = ["bomb.png", "text.png", "blank.png", "cut.png", "folder.png", "squeezed.png", "missing.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.png")
        bad.append("fifo.png")
    output, errors = run("evaluate.py", "run", "--image", *bad, "good.png", cwd=tmp_path, code=1)
    assert output.startswith("good.png: ")
    for name, line in zip(["is a dry run", *bad], errors.splitlines(), strict=True):
        assert name in line


def write_page(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    as_drawn(image).save(path)


def test_a_folder_of_images_is_all_images_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, labels = load_data("digits", None, train=False)
    for name, i in (("b/2.png", 3), ("a.jpg", 5), ("b/.hidden.png", 3), ("c.png", 7)):
        write_page(Path("pages") / name, images[i, 0])
    Path("pages/notes.txt").write_text("notes")
    write_page(Path("last.png"), images[9, 0])
    call("weights/cnn.pt", "--image", "pages", "last.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pages: left out, in no class or not read as images: 1 .txt"
    named = [("pages/a.jpg", 5), ("pages/b/2.png", 3), ("pages/c.png", 7), ("last.png", 9)]
    assert lines[1:-1:2] == [f"{name}: {labels[i]}" for name, i in named]


# On other images ----------------------------------------------------------------------------------------------------


def test_a_network_is_scored_on_another_labelled_folder_and_its_mistakes_are_named(tmp_path, monkeypatch, capsys):
    """Photos and images of 28x28, of some of the classes; one is in the wrong folder, one is blank."""
    monkeypatch.chdir(tmp_path)
    images, labels = load_data("digits", None, train=False)
    chosen = [i for i in range(40) if labels[i] in (3, 5, 7)]
    for i in chosen:
        write_page(Path(f"mine/{labels[i]}/{i}.png"), images[i, 0])
    Image.fromarray(images[chosen[0], 0].numpy()).save(f"mine/{labels[chosen[0]]}/small.png")
    write_page(Path("mine/3/wrong.png"), images[labels.tolist().index(7), 0])
    metrics = call("weights/cnn.pt", "--dataset", "mine")
    assert metrics["dataset"] == "mine"
    assert metrics["test_images"] == len(chosen) + 2
    assert metrics["test_errors"] == 1
    folder = Path("runs/cnn-weights/evaluation/mine")
    rows = (folder / "predictions.csv").read_text().splitlines()
    assert rows[0] == "image,class,predicted,probability"
    assert rows[1].startswith("mine/3/wrong.png,3,7,0.")
    assert len(rows) == len(chosen) + 3
    assert not (folder.parent / "metrics.json").exists()  # the results on the run's own dataset stay
    Path("mine/x").mkdir()
    with pytest.raises(OSError, match=r"mine has classes that the network does not know \(x\); remove them"):
        call("weights/cnn.pt", "--dataset", "mine")
    assert call("weights/cnn.pt", "--dataset", "digits")["test_images"] == 360


def test_a_table_of_predictions_begins_with_the_most_confident_mistakes(small_run):
    metrics = call(small_run)
    lines = (small_run / "evaluation" / "predictions.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    wrong = [row for row in rows if row[1] != row[2]]
    assert len(wrong) == metrics["test_errors"] > 0
    assert rows[: len(wrong)] == wrong
    assert [row[3] for row in wrong] == sorted((row[3] for row in wrong), reverse=True)
    labels = load_data("digits", None, train=False)[1].tolist()
    assert {int(row[0]): int(row[1]) for row in rows} == dict(enumerate(labels))


def test_evaluating_says_that_a_run_is_still_training_or_was_a_dry_run(small_run, capsys):
    call(small_run)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {small_run} is a dry run of a few steps; its results mean nothing"]
    held = lock(small_run)
    call(small_run / "checkpoint.pt")
    words = f"{small_run / 'checkpoint.pt'} is still training; these are the results of epoch 1"
    assert f"warning: {words}" in capsys.readouterr().err.splitlines()
    held.release()


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
    metrics = json.loads((folder / "metrics.json").read_text())
    values = {
        "parzen_log_likelihood", "parzen_standard_error", "parzen_sigma", "fid", "kid", "precision", "recall",
        "density", "coverage", "class_histogram", "class_kl",
    }  # fmt: skip
    if name == "cgan":
        values |= {"conditional_accuracy", "class_coverage"}
    for part in (metrics, metrics["real"]):
        assert values | {"images"} == part.keys() - {"dataset", "epochs", "real", "parameters", "sampling_seconds"}
        assert sum(part["class_histogram"]) == pytest.approx(1)
    assert metrics["fid"] > 10 * metrics["real"]["fid"]
    for value in values:
        assert value in output
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


def test_samples_are_also_written_one_by_one(generators, capsys):
    folder = generators / "cgan" / "evaluation"
    call(generators / "cgan", "--samples", "12", "--separate")
    assert "samples-12-seed0/" in capsys.readouterr().out.splitlines()[-1]
    images = numpy.load(folder / "samples-12-seed0.npz")["images"]
    paths = sorted((folder / "samples-12-seed0").iterdir())
    assert [path.name for path in paths] == [f"{i:05}.png" for i in range(12)]
    assert (numpy.stack([Image.open(path) for path in paths]) == numpy.round(images * 255)).all()


@pytest.mark.parametrize(
    ("flags", "labels", "columns"),
    [(["--digit", "7", "8", "--columns", "2"], [7, 7, 7, 8, 8, 8], 2), ([], [0, 1, 3, 5, 6, 8], 3)],
)
def test_samples_are_of_the_classes_asked_for_in_so_many_columns(generators, flags, labels, columns):
    call(generators / "cgan", "--samples", "6", *flags)
    name = f"samples-6{'-digit7-8' if flags else ''}-seed0"
    assert numpy.load(generators / "cgan" / "evaluation" / f"{name}.npz")["labels"].tolist() == labels
    assert Image.open(generators / "cgan" / "evaluation" / f"{name}.png").width == columns * 56


def test_the_plane_of_a_vae_with_two_latent_dimensions_is_mapped(tmp_path, monkeypatch):
    flags = [*DIGITS, "--dry-run", "--latent", "2", "--output-dir", str(tmp_path / "run")]
    train_likelihood.main(flags)
    monkeypatch.setattr(evaluate, "SAMPLES", 100)
    monkeypatch.setattr(VAE, "log_likelihood", lambda self, images: torch.zeros(len(images)))
    call(tmp_path / "run")
    seen = numpy.asarray(Image.open(tmp_path / "run" / "evaluation" / "plane.png"))[::2, ::2] / 255
    network = evaluate.load_model(tmp_path / "run")
    z = torch.tensor([[-1.64485, 1.64485]])  # the first and the last twentieth: top right
    assert seen.shape == (280, 280)
    assert numpy.allclose(seen[:28, -28:], network.decode(z)[0, 0].detach(), atol=0.01)
    with pytest.raises(UserError, match="the model rbm has no option --latent; omit it"):
        train_likelihood.main([*DIGITS, "--dry-run", "--latent", "2", "--model", "rbm"])


def test_flags_that_do_not_fit_the_run_are_refused(generators, small_run):
    for folder, flags, words in [
        (small_run, ["--samples", "5", "--digit", "7"], "is a classifier; --samples needs a run of a generator"),
        (generators / "gan", ["--samples", "5", "--digit", "7"], "trained without labels; --digit needs"),
        (generators / "gan", ["--image", "x.png"], "is a generator; --image needs a run of a classifier"),
        (generators / "gan", ["--dataset", "digits"], "is a generator; --dataset needs a run of a classifier"),
        (generators / "cgan", ["--samples", "5", "--digit", "10"], "--digit 10: there is no such class; choose from 0"),
    ]:
        with pytest.raises(UserError, match=words):
            call(folder, *flags)
    for flags in (["--digit", "7"], ["--samples", "0"]):
        with pytest.raises(SystemExit, match="2"):
            call(generators / "cgan", *flags)
