"""Images of your own: a folder of classes, from the files to reports and plots, and one line for each mistake."""

import io
import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHAPES, draw_shape, draw_shapes, load
from PIL import Image, ImageDraw

import evaluate
import train_cgan
import train_classifier
import train_gan
import train_likelihood
from datasets import class_names, hold_out, read_image, short_name
from datasets import load as load_data
from datasets.folder import list_images
from engine.errors import DataError, UserError
from measures.classifier import classification_measures, plot_confusion, plot_mistakes, print_report
from measures.generator import measure_images
from measures.reference import load_reference

CPU = ["--device", "cpu", "--model", "mlp"]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """In the working directory, `few`: 20 images of each of three classes to train on, and 8 to test with."""
    monkeypatch.chdir(tmp_path)
    return draw_shapes(tmp_path / "few", {"train": 20, "test": 8})


# Training and evaluating ----------------------------------------------------------------------------------------------


def test_a_network_learns_three_shapes_and_the_report_names_them(tmp_path, monkeypatch, capsys):
    shapes = draw_shapes(tmp_path / "shapes", {"train": 100, "test": 20})
    monkeypatch.chdir(tmp_path)
    train_classifier.main(["--dataset", str(shapes), *CPU, "--epochs", "12", "--batch-size", "20", "--lr", "1e-3"])
    assert f"{shapes}: 300 training images of 3 classes, each scaled to 28x28 grey pixels" in capsys.readouterr().out
    evaluate.main(["runs/mlp-shapes", "--device", "cpu"])
    metrics = json.loads((tmp_path / "runs" / "mlp-shapes" / "evaluation" / "metrics.json").read_text())
    assert metrics["test_images"] == 60
    assert metrics["test_accuracy"] >= 0.55  # by chance 0.33
    assert list(metrics["per_class"]) == SHAPES
    assert "triangle  " in capsys.readouterr().out
    evaluate.main(["runs/mlp-shapes", "--image", str(shapes / "test" / "square" / "0.png")])
    assert re.search(r"0\.png: (circle|square|triangle)", capsys.readouterr().out)


@pytest.mark.parametrize(("model", "loss"), [("mlp", "bce"), ("maxout", "mse")])
def test_every_network_and_loss_takes_another_number_of_classes(few, model, loss):
    flags = ["--model", model, "--loss", loss, "--label-smoothing", "0.3", "--device", "cpu"]
    train_classifier.main(["--dataset", "few", *flags, "--dry-run", "--output-dir", "run"])
    weights = [value for key, value in load("run/checkpoint.pt")["state"]["model"].items() if key.endswith("weight")]
    assert len(weights[-1]) == 3


def test_the_best_recipe_holds_none_of_a_folder_out(few):
    train_classifier.main(["--dataset", "few", "--recipe", "best", *CPU, "--dry-run"])
    assert load("runs/mlp-few/checkpoint.pt")["options"]["val_size"] == 0


def test_a_conditional_gan_learns_and_shows_every_class(few, monkeypatch):
    seen, forward = [], train_cgan.ConditionalDiscriminator.forward

    def record(self, x, labels):
        seen.append(labels)
        return forward(self, x, labels)

    monkeypatch.setattr(train_cgan.ConditionalDiscriminator, "forward", record)
    flags = ["--device", "cpu", "--dry-run", "--wrong-label", "0.3", "--batch-size", "30"]
    train_cgan.main(["--dataset", str(few), *flags])
    right, _, wrong = seen[0].chunk(3)  # wrong labels are of all the other classes
    assert {*zip(right.tolist(), wrong.tolist())} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert Image.open("runs/cgan-few/samples/epoch-0001.png").size == (10 * 56, 3 * 56)  # a row for each class
    evaluate.main(["runs/cgan-few", "--samples", "12"])
    folder = few.parent / "runs" / "cgan-few" / "evaluation"
    assert np.load(folder / "samples-12-seed0.npz")["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert Image.open(folder / "interpolation-seed0.png").size == (10 * 56, 3 * 56)
    assert Image.open(folder / "same_noise-seed0.png").size == (3 * 56, 10 * 56)
    evaluate.main(["runs/cgan-few", "--samples", "5", "--digit", "square"])
    assert np.load(folder / "samples-5-digit1-seed0.npz")["labels"].tolist() == [1] * 5
    with pytest.raises((UserError, SystemExit), match=r"star|2"):
        evaluate.main(["runs/cgan-few", "--samples", "5", "--digit", "star"])


@pytest.mark.parametrize(
    ("script", "name"), [(train_gan, "gan-few"), (train_likelihood, "vae-few")], ids=["gan", "likelihood"]
)
def test_the_other_scripts_take_a_folder_too(few, script, name):
    script.main(["--dataset", str(few), "--device", "cpu", "--dry-run"])
    assert load(few.parent / "runs" / name / "checkpoint.pt")["options"]["classes"] == SHAPES
    evaluate.main([f"runs/{name}", "--samples", "4"])


def test_a_generator_is_measured_without_what_only_digits_can_be_asked():
    classifier, images = load_reference("cpu"), torch.rand(30, 1, 28, 28)
    reference = images[:10], torch.rand(20, 1, 28, 28), torch.arange(20) % 3
    measures = measure_images(images, torch.arange(30) % 3, classifier, reference, classes=3)
    assert {"fid", "kid", "coverage", "parzen_log_likelihood"} <= measures.keys()
    assert not {"class_histogram", "class_kl", "conditional_accuracy", "class_coverage"} & measures.keys()
    with pytest.raises(UserError, match="3 images are too few"):
        measure_images(images[:3], None, classifier, reference, classes=3)
    with pytest.raises(UserError, match="2 images are too few"):  # of each of ten classes
        measure_images(images, torch.arange(30) % 10, classifier, (*reference[:2], torch.arange(20) % 10))


# Names ----------------------------------------------------------------------------------------------------------------


def test_the_names_of_the_built_in_classes():
    assert class_names("digits", "") == class_names("mnist", "") == list("0123456789")
    assert class_names("fashion-mnist", "")[9] == "Ankle boot"
    assert class_names("kmnist", "")[0] == "o"
    assert {len(class_names(name, "")) for name in ("digits", "mnist", "fashion-mnist", "kmnist")} == {10}


def test_a_folder_is_named_by_its_own_name_in_runs(tmp_path, monkeypatch):
    (tmp_path / "my shapes: 2").mkdir()
    monkeypatch.chdir(tmp_path / "my shapes: 2")
    assert short_name("fashion-mnist") == "fashion-mnist"
    assert short_name("/data/Formes d'été/") == "Formes-d-été"
    assert short_name(".") == short_name("../my shapes: 2") == "my-shapes-2"
    assert short_name("/") == "folder"


def test_figures_show_the_names_whatever_they_hold():
    names = ["$x", "a$\\frac$", "a class with quite a long name"]
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.eye(3)[[0, 1, 1, 0]] * 5
    metrics = classification_measures(logits, labels, names)
    assert [row["support"] for row in metrics["per_class"].values()] == [2, 1, 1]
    print_report(logits, labels, metrics, names)
    figure = plot_confusion(metrics["confusion_matrix"], names)
    figure.savefig(io.BytesIO())
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == [*names[:2], "a class with quite …"]
    assert figure.axes[0].get_xticklabels()[0].get_rotation() == 90
    plain = plot_confusion(torch.eye(10).tolist())
    assert [label.get_text() for label in plain.axes[0].get_xticklabels()] == list("0123456789")
    mistakes = plot_mistakes(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), logits, labels, names)
    mistakes.savefig(io.BytesIO())
    titles = {axis.get_title() for axis in mistakes.axes}
    assert {title.split(" (")[0] + title.split("true")[1] for title in titles} == {"a$\\frac$ $x", "$x a class wi…"}


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_level(tmp_path):
    return draw_shapes(tmp_path / "one", {"": 25})


TEST_PART = {  # by a hash of the names: the same on every machine and in every place
    "circle": [1, 2, 9, 11, 19], "square": [3, 8, 9, 19, 22], "triangle": [3, 10, 17, 20, 22],
}  # fmt: skip


def test_a_folder_of_one_level_is_split_80_to_20_class_by_class(one_level):
    for folder in (one_level, shutil.copytree(one_level, one_level.parent / "elsewhere" / "copy")):
        train, test = ([path for path, _ in list_images(folder, part)] for part in (True, False))
        for name, numbers in TEST_PART.items():
            assert sorted(int(Path(path).stem) for path in test if Path(path).parent.name == name) == numbers
        assert (len(train), len({*train, *test})) == (60, 75)
    assert load_data(str(one_level), "", train=False)[1].bincount().tolist() == [5, 5, 5]


def test_a_new_image_moves_hardly_any_other_to_the_other_part(one_level):
    before = {path for path, _ in list_images(one_level, False)}
    for i in range(100, 104):  # a fifth: the test part grows by one image or by none
        draw_shape("circle", np.random.default_rng(i)).save(one_level / "circle" / f"{i}.png")
    after = {path for path, _ in list_images(one_level, False)}
    assert len(before - after) <= 4
    assert all("circle" in path for path in before - after)


def test_the_images_held_out_for_validation_are_of_all_classes(few):
    _, (_, labels) = hold_out(*load_data("few", "", True), 15)
    assert set(labels.tolist()) == {0, 1, 2}


def test_hidden_files_and_other_files_are_no_images(few):
    for part in ("train", "test"):
        (few / part / ".ipynb_checkpoints").mkdir()
        (few / part / "circle" / "._0.png").write_bytes(b"what macOS leaves")
        (few / part / "circle" / "notes.txt").write_text("notes")
    assert class_names("few", "") == SHAPES
    assert len(load_data("few", "", True)[0]) == 60


def test_a_folder_with_the_name_of_a_dataset_gives_way_to_it(few, monkeypatch):
    few.rename("digits")
    assert len(load_data("digits", "", True)[0]) == 1437
    assert class_names("digits", "") == list("0123456789")
    assert len(load_data("./digits", "", True)[0]) == 60


# The images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path):
    """seen(image, ...): the pixels [28, 28] that a network sees of it, after it was saved."""

    def save_and_read(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        pixels = read_image(tmp_path / name)
        assert pixels.shape == (1, 1, 28, 28)
        assert pixels.dtype == torch.uint8
        return pixels[0, 0].float()

    return save_and_read


def test_an_image_of_28x28_grey_pixels_stays_as_it_is(seen):
    array = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    assert (seen(Image.fromarray(array)).numpy() == array).all()


def left_half(mode):
    """An image that is dark on the left and light on the right, 50 and 200, in a mode of Pillow's."""
    array = np.full((60, 60), 50, np.uint8)
    array[:, 30:] = 200
    if mode == "I;16":
        return Image.fromarray(array.astype(np.uint16) * 40)
    return Image.fromarray(array).convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "png"), ("RGB", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "webp"), ("LA", "png"), ("I;16", "png"),
     ("RGB", "bmp"), ("L", "pgm"), ("RGB", "tif")],
)  # fmt: skip
def test_every_mode_and_format_becomes_grey(seen, mode, format):
    pixels = seen(left_half(mode), f"a.{format}")
    left, right = (0, 255) if mode == "I;16" else (50, 200)
    assert pixels[:, :12].mean() == pytest.approx(left, abs=4)
    assert pixels[:, 16:].mean() == pytest.approx(right, abs=4)


def test_the_aspect_ratio_stays_and_margins_continue_the_border(seen):
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    ImageDraw.Draw(image).rectangle([60, 10, 139, 89], fill=(250, 250, 250))
    pixels = seen(image)
    assert (pixels[[*range(7), *range(-7, 0)]] == 90).all()
    bright = pixels > 170
    assert bright.any(0).sum() == bright.any(1).sum()  # a square is still one


@pytest.mark.parametrize(("side", "every"), [(112, 2), (560, 5)])
def test_an_image_is_reduced_without_aliasing(seen, side, every):
    stripes = np.zeros((side, side), np.uint8)
    stripes[:, ::every] = 255
    assert seen(Image.fromarray(stripes))[:, 2:-2].mean() == pytest.approx(255 / every, abs=5)


def test_a_camera_that_was_held_upright_is_heeded(seen):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    pixels = seen(left_half("RGB"), "a.jpg", exif=exif)
    assert pixels[:12].mean() < 60 < 190 < pixels[16:].mean()


@pytest.mark.parametrize(("ink", "paper"), [(20, 255), (235, 0)])
def test_what_is_drawn_on_transparency_stays_visible(seen, ink, paper):
    image = Image.new("RGBA", (40, 40), (127, 127, 127, 0))
    ImageDraw.Draw(image).rectangle([10, 10, 29, 29], fill=(ink, ink, ink, 255))
    pixels = seen(image)
    assert (pixels[0, 0], pixels[14, 14]) == (paper, ink)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 500)])
def test_the_thinnest_images_are_read(seen, size):
    assert (seen(Image.new("L", size, 77)) == 77).all()


# What can be wrong ----------------------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG of a few bytes that promises so many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in [*chunks, (b"IEND", b"")]
    )


# Pillow would start Ghostscript to read this, whatever the file is called.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"


def write(name, content):
    return lambda few: (few / "train" / "circle" / name).write_bytes(content)


def remove(*names):
    return lambda few: [shutil.rmtree(few / name) for name in names]


def cut_off(few):
    path = few / "train" / "circle" / "3.png"
    path.write_bytes(path.read_bytes()[:100])


def flat(few):
    """Images without folders of classes."""
    for path in few.glob("*/*/*.png"):
        path.rename(few / f"{path.parent.name}{path.name}")
    remove("train", "test")(few)


def empty_class(few):
    for path in (few / "train" / "square").iterdir():
        path.rename(path.with_suffix(".heic"))


@pytest.mark.filterwarnings("error")  # a warning would be one more line
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ["no dataset few, neither here nor in data; use one of mnist,", "digits", "folder"]),
        (remove("train/square", "train/circle"), ["few/train has 1 subfolders", "a folder of their own"]),
        (flat, ["few has 0 subfolders", "a folder of their own"]),
        (empty_class, ["few/train/square holds 0 images", ".png", "remove the folder"]),
        (remove("test"), ["few has a folder train, but not both train and test"]),
        (remove("train"), ["few has a folder test, but not both train and test"]),
        (lambda few: (few / "test").rename(few / "Val"), ["few has a folder Val, but not both"]),
        (remove("test/square"), ["few/test", "missing: square", "the same subfolders"]),
        (lambda few: (few / "test" / "star").mkdir(), ["few/test", "new: star", "the same subfolders"]),
        (cut_off, ["few/train/circle/3.png", "cannot be read", "remove"]),
        (write("3.png", b"<html>"), ["circle/3.png", "cannot be read"]),
        (write("3.png", POSTSCRIPT), ["circle/3.png", "cannot identify"]),
        (write("b.png", bomb(12_000, 9_000)), ["circle/b.png", "100 megapixels"]),
        (write("b.png", bomb(2**31 - 1, 2**31 - 1)), ["circle/b.png"]),
        (write("a\nb.png", b"x"), ["a\\nb.png", "cannot be read"]),
        (lambda few: [(few / part / "circle").rename(few / part / "a\nb") for part in ("train", "test")],
         ["'a\\nb'", "rename"]),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_trained_on_is_one_line(few, spoil, parts):
    spoil(few)
    with pytest.raises(DataError) as caught:
        train_classifier.main(["--dataset", "few", *CPU])
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
    assert not (few.parent / "runs").exists()


def test_a_class_of_one_image_cannot_be_split(one_level):
    for path in (one_level / "square").glob("[1-9]*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"one/square holds 1 images .*, but needs at least 2"):
        load_data(str(one_level), "", True)


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(few):
    train_classifier.main(["--dataset", "few", *CPU, "--epochs", "1"])
    return few


def resume(*flags):
    train_classifier.main(["--resume", "runs/mlp-few", "--epochs", "2", *flags])


def evaluate_it(*flags):
    evaluate.main(["runs/mlp-few", *flags])


def test_changed_classes_are_one_line(begun):
    for part in ("train", "test"):
        (begun / part / "square").rename(begun / part / "star")
    for call in (resume, evaluate_it):
        with pytest.raises(DataError, match=r"few has other classes .*missing: square; new: star.*new run") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_was_moved_is_found_in_the_data_dir(begun):
    (begun.parent / "moved").mkdir()
    begun.rename(begun.parent / "moved" / "few")
    for call in (evaluate_it, resume):
        with pytest.raises(DataError, match=r"no dataset few.* data;.*") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
        call("--data-dir", "moved")
    assert load("runs/mlp-few/checkpoint.pt")["epoch"] == 2


# Many images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terminal", "rank", "shown"), [(True, "0", True), (False, "0", False), (True, "1", False)])
def test_reading_shows_its_progress_in_a_terminal(few, monkeypatch, capsys, terminal, rank, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("RANK", rank)
    load_data("few", "", True)
    assert ("reading few" in capsys.readouterr().err) == shown


def test_reading_ends_at_the_first_image_that_cannot_be_read(few, monkeypatch):
    from datasets import folder

    calls = []

    def read(path):
        calls.append(path)
        raise DataError("cannot")

    monkeypatch.setattr(folder, "read_image", read)
    with pytest.raises(DataError, match="cannot"):
        load_data("few", "", True)
    assert len(calls) < 60
