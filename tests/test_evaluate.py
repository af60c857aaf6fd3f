"""evaluate.py as its user runs it: numbers, pictures, samples, and pictures of the user's own."""

import gzip
import json
import os
import pickle

import numpy
import pytest
import torch
from helpers import DIGITS, assert_one_line, load, run, save_sealed, train
from PIL import Image

import evaluate
import train_cgan
import train_gan
from datasets import load as load_data
from engine.checkpoint import load_checkpoint
from engine.errors import UserError
from measures.classifier import classification_measures
from models import CLASSIFIERS
from photos import read_photo


@pytest.fixture(scope="module")
def best_run(tmp_path_factory):
    """The README's first command, with a third of its epochs."""
    folder = tmp_path_factory.mktemp("best")
    train(*DIGITS, "--recipe", "best", "--epochs", 20, "--output-dir", folder / "run")
    return folder / "run"


@pytest.fixture
def small_run(tmp_path):
    train(*DIGITS, "--model", "mlp", "--dry-run", "--output-dir", tmp_path / "run")
    return tmp_path / "run"


def test_the_first_command_reaches_96_percent_and_the_report_says_so(best_run, tmp_path):
    output, _ = run("evaluate.py", best_run, cwd=tmp_path)
    metrics = json.loads((best_run / "evaluation" / "metrics.json").read_text())
    assert metrics["dataset"] == "digits"
    assert metrics["model"] == "cnn"
    assert metrics["test_accuracy"] >= 0.96
    assert f"{metrics['test_accuracy']:.2%}" in output
    pictures = {"confusion_matrix.png", "mistakes.png", "filters.png"}
    assert {path.name for path in (best_run / "evaluation").iterdir()} == {"metrics.json"} | pictures
    for name in pictures:
        Image.open(best_run / "evaluation" / name).verify()


def test_metrics_agree_with_one_another_and_with_a_count_by_hand():
    logits = torch.randn(500, 10)
    labels = torch.randint(10, (500,))
    metrics = classification_measures(logits, labels)
    matrix = torch.tensor(metrics["confusion_matrix"])
    predictions = logits.argmax(1)
    for true in range(10):
        for predicted in range(10):
            assert matrix[true, predicted] == ((labels == true) & (predictions == predicted)).sum()
    assert metrics["test_errors"] == 500 - matrix.diag().sum()
    assert metrics["test_accuracy"] == pytest.approx(1 - metrics["test_errors"] / 500)
    seven = metrics["per_class"]["7"]
    assert seven["recall"] == pytest.approx((matrix[7, 7] / matrix[7].sum()).item())
    assert seven["precision"] == pytest.approx((matrix[7, 7] / matrix[:, 7].sum()).item())
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    by_hand = -probabilities[torch.arange(500), labels].log().mean().item()  # L = -log Z_i
    assert metrics["test_loss"] == pytest.approx(by_hand)


@pytest.mark.parametrize("recipe", ["lecture", "best"])
@pytest.mark.parametrize("model", CLASSIFIERS)
def test_every_model_can_be_evaluated(tmp_path, model, recipe):
    train(*DIGITS, "--recipe", recipe, "--model", model, "--dry-run", "--output-dir", tmp_path / "run")
    evaluate.main([str(tmp_path / "run")])
    assert (tmp_path / "run" / "evaluation" / "metrics.json").is_file()


def test_the_ema_is_what_is_evaluated(tmp_path):
    train(*DIGITS, "--recipe", "best", "--model", "mlp", "--epochs", 1, "--output-dir", tmp_path / "run")
    network, checkpoint = evaluate.load_network(tmp_path / "run", "cpu")
    ema = checkpoint["state"]["ema"]["model"]["linear1.weight"]
    assert torch.equal(network.linear1.weight, ema)
    assert not torch.equal(ema, checkpoint["state"]["model"]["linear1.weight"])


class Reader(torch.nn.Module):
    """A model whose first layer is no picture: it reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.LSTM(28, 16, batch_first=True)
        self.fc = torch.nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.rows(x.squeeze(1))[0][:, -1])


def test_a_new_model_needs_only_its_line_in_the_registry(tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "reader", Reader)
    train(*DIGITS, "--model", "reader", "--epochs", 2, "--output-dir", tmp_path / "run")
    evaluate.main([str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["model"] == "reader"
    monkeypatch.delitem(CLASSIFIERS, "reader")
    with pytest.raises(UserError, match="no model reader"):
        evaluate.main([str(tmp_path / "run")])


# Files that are not what they should be -------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint_gets_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    _, errors = run("evaluate.py", "empty", cwd=tmp_path, code=1)
    assert_one_line(errors, "empty", "does not exist")


def test_every_changed_or_missing_byte_of_a_checkpoint_is_noticed(small_run, tmp_path):
    whole = (small_run / "checkpoint.pt").read_bytes()
    copy = tmp_path / "copy.pt"
    places = torch.randint(len(whole), (200,)).tolist()
    for place in [*range(30), *range(len(whole) - 60, len(whole)), *places]:
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"copy\.pt"):
            load_checkpoint(copy)
    for length in [0, 1, 22, len(whole) // 2, len(whole) - 1]:
        copy.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"copy\.pt"):
            load_checkpoint(copy)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(small_run, tmp_path):
    (small_run / "previous.pt").write_bytes((small_run / "checkpoint.pt").read_bytes())
    (small_run / "checkpoint.pt").write_bytes(b"PK damaged")
    _, errors = run("evaluate.py", "run", cwd=tmp_path)
    assert_one_line(errors, "checkpoint.pt", "previous.pt", "damaged")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["checkpoint.pt", "previous.pt", "best.pt"])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("script", ["train_classifier.py", "evaluate.py"])
def test_nothing_in_a_foreign_file_is_executed(tmp_path, script, sealed, name):
    canary, path = Canary(tmp_path / "executed"), tmp_path / "run" / name
    if sealed:
        save_sealed({"options": canary}, path)
    else:
        path.parent.mkdir()
        path.write_bytes(pickle.dumps(canary))
    with pytest.raises(UserError, match=r"run/\w+\.pt "):
        evaluate.main([str(path.parent)]) if script == "evaluate.py" else train("--resume", path.parent)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_network_gets_one_line(small_run, tmp_path):
    checkpoint = load(small_run / "checkpoint.pt")
    checkpoint["options"]["model"] = "cnn"
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    _, errors = run("evaluate.py", "run", cwd=tmp_path, code=1)
    assert_one_line(errors, "run", "models/")


def test_a_change_of_the_networks_code_is_a_warning(small_run, tmp_path):
    checkpoint = load(small_run / "checkpoint.pt")
    checkpoint["code"]["models/mlp.py"] = "another"
    save_sealed(checkpoint, small_run / "checkpoint.pt")
    _, errors = run("evaluate.py", "run", cwd=tmp_path)
    assert_one_line(errors, "warning: models/mlp.py changed", "run")
    assert (small_run / "evaluation" / "metrics.json").is_file()


# Pictures of the user's own -------------------------------------------------------------------------------------------


def as_drawn(image):
    """A 28x28 digit as somebody might draw it: large, off centre, black on white."""
    large = Image.fromarray(255 - image.numpy()).resize((200, 200), Image.Resampling.BICUBIC)
    paper = Image.new("L", (500, 320), 255)
    paper.paste(large, (230, 10))
    return paper


def variants(drawn):
    yield drawn
    yield drawn.convert("RGB")
    yield drawn.point(lambda value: 255 - value)  # light on dark
    yield drawn.point(lambda value: 90 + value // 3)  # faint pencil on grey paper
    yield drawn.convert("P")
    yield Image.fromarray(numpy.asarray(drawn).astype(numpy.uint16) * 257)
    ink = Image.new("RGBA", drawn.size, (0, 0, 160, 0))
    ink.putalpha(drawn.point(lambda value: 255 - value))  # blue ink on nothing
    yield ink
    chalk = Image.new("RGBA", drawn.size, (255, 255, 255, 0))
    chalk.putalpha(drawn.point(lambda value: 255 - value))  # white on nothing
    yield chalk


def test_own_pictures_are_read_right_in_every_mode(best_run, tmp_path):
    network, _ = evaluate.load_network(best_run, "cpu")
    images, labels = load_data("digits", None, train=False)
    right, count = 0, 0
    for image, label in zip(images[:20, 0], labels[:20]):
        for variant in variants(as_drawn(image)):
            variant.save(tmp_path / "digit.png")
            photo = read_photo(tmp_path / "digit.png")
            assert photo.shape == (1, 1, 28, 28)
            assert photo.dtype == torch.uint8
            right += (network(photo / 127.5 - 1).argmax() == label).item()
            count += 1
    assert right >= 0.9 * count


def test_photo_is_fitted_into_20_pixels_and_centred_by_mass(tmp_path):
    paper = Image.new("L", (300, 100), 255)
    paper.paste(0, (10, 20, 20, 80))  # a stroke 10 wide and 60 high
    paper.save(tmp_path / "one.png")
    ink = read_photo(tmp_path / "one.png")[0, 0] > 127
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    assert (rows.min(), rows.max()) == (4, 23)
    assert (columns.min(), columns.max()) in ((12, 14), (13, 15))


def test_image_prints_all_ten_probabilities(best_run, tmp_path):
    image, label = (part[3] for part in load_data("digits", None, train=False))
    as_drawn(image[0]).save(tmp_path / "mine.png")
    output, _ = run("evaluate.py", best_run, "--image", "mine.png", cwd=tmp_path)
    first, second, third = output.splitlines()
    assert first == f"mine.png: {label}"
    assert third == f"wrote {best_run / 'evaluation' / 'seen.png'}"
    picture = numpy.asarray(Image.open(best_run / "evaluation" / "seen.png"))[::2, ::2]  # drawn twice as large
    assert (picture == read_photo(tmp_path / "mine.png")[0, 0].numpy()).all()
    shares = [float(part.rstrip("%")) for part in second.split()[1::2]]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(100, abs=1)


def test_pictures_that_cannot_be_read_get_one_line_each(small_run, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
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
    for name, line in zip(bad, errors.splitlines(), strict=True):
        assert name in line


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """A run of each training script of generators, after two steps."""
    folder = tmp_path_factory.mktemp("generators")
    for name, script in (("gan", train_gan), ("cgan", train_cgan)):
        script.main([*DIGITS, "--dry-run", "--output-dir", str(folder / name)])
    return folder


def call(*flags):
    """evaluate.py in this process."""
    evaluate.main([str(flag) for flag in flags])


@pytest.mark.parametrize("name", ["gan", "cgan"])
def test_a_generator_is_measured_beside_real_images(generators, name, capsys):
    call(generators / name)
    output = capsys.readouterr().out
    folder = generators / name / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {
        "parzen_log_likelihood", "parzen_standard_error", "parzen_sigma", "fid", "kid", "precision", "recall",
        "density", "coverage", "class_histogram", "class_kl",
    }  # fmt: skip
    if name == "cgan":
        figures |= {"conditional_accuracy", "class_coverage"}
    for part in (metrics, metrics["real"]):
        assert figures | {"images"} == part.keys() - {"dataset", "epochs", "real", "parameters", "sampling_seconds"}
        assert sum(part["class_histogram"]) == pytest.approx(1)
    assert metrics["fid"] > 10 * metrics["real"]["fid"]
    for figure in figures:
        assert figure in output
    pictures = {"interpolation-seed0.png": 10, "nearest_training_images.png": 2}
    if name == "cgan":
        pictures["same_noise-seed0.png"] = 10
    for picture, rows in pictures.items():
        assert Image.open(folder / picture).height == rows * 56


def test_samples_come_from_the_seed_alone_and_as_raw_values(generators, tmp_path):
    call(generators / "cgan", "--samples", "20", "--digit", "7", "--seed", "3")
    folder = generators / "cgan" / "evaluation"
    first = numpy.load(folder / "samples-20-digit7-seed3.npz")
    assert first["images"].shape == (20, 28, 28)
    assert first["images"].min() >= 0
    assert first["images"].max() <= 1
    assert first["labels"].tolist() == [7] * 20
    assert first["z"].shape == (20, 100)
    own, of_training = (torch.Generator().manual_seed(seed) for seed in (2**31 + 3, 3))
    assert numpy.array_equal(first["z"], torch.rand(20, 100, generator=own))
    assert not numpy.array_equal(first["z"], torch.rand(20, 100, generator=of_training))
    picture = numpy.asarray(Image.open(folder / "samples-20-digit7-seed3.png"))
    assert picture.shape == (4 * 56, 5 * 56)
    shown = numpy.round(first["images"][1] * 255)
    assert (picture[:56:2, 56:112:2] == shown).all()  # as they are, not stretched

    call(generators / "cgan", "--samples", "6", "--digit", "7", "8", "--columns", "2")
    assert numpy.load(folder / "samples-6-digit7-8-seed0.npz")["labels"].tolist() == [7, 7, 7, 8, 8, 8]
    assert Image.open(folder / "samples-6-digit7-8-seed0.png").size == (2 * 56, 3 * 56)

    generator, _ = evaluate.load_network(generators / "cgan", "cpu")
    with torch.no_grad():
        again = generator(torch.from_numpy(first["z"]), torch.full((20,), 7))
    assert numpy.allclose(again[:, 0].numpy(), first["images"], atol=1e-6)

    assert Image.open(folder / "interpolation-digit7-seed3.png").height == 10 * 56

    before = (folder / "samples-20-digit7-seed3.npz").read_bytes()
    call(generators / "cgan", "--samples", "20", "--digit", "7", "--seed", "3")
    assert numpy.array_equal(numpy.load(folder / "samples-20-digit7-seed3.npz")["images"], first["images"])
    call(generators / "cgan", "--samples", "20", "--digit", "7", "--seed", "4")
    assert not numpy.array_equal(numpy.load(folder / "samples-20-digit7-seed4.npz")["images"], first["images"])
    assert (folder / "samples-20-digit7-seed3.npz").read_bytes() == before


def test_samples_of_all_digits_are_spread_evenly(generators):
    call(generators / "cgan", "--samples", "30")
    labels = numpy.load(generators / "cgan" / "evaluation" / "samples-30-seed0.npz")["labels"]
    assert numpy.bincount(labels).tolist() == [3] * 10


def test_flags_that_do_not_fit_the_run_are_refused(generators, small_run, tmp_path):
    wrong = [
        (small_run, ["--samples", "5", "--digit", "7"], "is a classifier"),
        (small_run, ["--samples", "5"], "is a classifier"),
        (generators / "gan", ["--samples", "5", "--digit", "7"], "train_cgan.py"),
        (generators / "gan", ["--image", "x.png"], "train_classifier.py"),
    ]
    for folder, flags, words in wrong:
        with pytest.raises(UserError, match=words):
            call(folder, *flags)
    with pytest.raises(UserError, match="--digit 10: there is no such class; choose from 0, 1"):
        call(generators / "cgan", "--samples", "5", "--digit", "10")
    for flags in (["--digit", "7"], ["--samples", "0"]):
        with pytest.raises(SystemExit, match="2"):
            call(generators / "cgan", *flags)
    _, errors = run("evaluate.py", small_run, "--samples", "5", "--digit", "7", cwd=tmp_path, code=1)
    assert_one_line(errors, "is a classifier", "--samples needs a run of a generator")
