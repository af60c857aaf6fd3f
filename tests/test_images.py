"""Image files: what a network sees of them, and what evaluate.py says about them."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_shapes
from PIL import Image, ImageDraw
from test_evaluate import call

import evaluate
import train_classifier
from datasets import load as load_data
from datasets.folder import read_image
from engine.errors import DataError
from models import build_network
from photos import read


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


@pytest.mark.parametrize("light", [False, True], ids=["light on black", "dark on white"])
def test_a_network_of_clothes_sees_the_whole_image(light):
    model = build_network({"kind": "classifier", "model": "mlp", "classes": list("abcdefghij")}).eval()
    model.options = {"dataset": "fashion-mnist", "classes": list("abcdefghij"), "black": -1.0}
    array = np.random.default_rng(0).integers(0, 100, (28, 28), np.uint8)
    reading = evaluate.read_picture(model, Image.fromarray(255 - array if light else array))
    assert (reading.images[0, 0].numpy() == array).all()


def left_half(mode):
    """An image that is dark on the left and light on the right, 50 and 200, in a mode of Pillow's."""
    array = np.full((60, 60), 50, np.uint8)
    array[:, 30:] = 200
    if mode == "I;16":
        return Image.fromarray(array.astype(np.uint16) * 40)
    if mode == "F":
        return Image.fromarray(array.astype(np.float32) / 1000)
    return Image.fromarray(array).convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "png"), ("RGB", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "webp"), ("LA", "png"), ("I;16", "png"),
     ("F", "tif"), ("RGB", "bmp"), ("L", "pgm"), ("RGB", "tif")],
)  # fmt: skip
def test_every_mode_and_format_becomes_grey(seen, mode, format):
    pixels = seen(left_half(mode), f"a.{format}")
    left, right = (0, 255) if mode in ("I;16", "F") else (50, 200)
    assert pixels[:, :12].mean() == pytest.approx(left, abs=4)
    assert pixels[:, 16:].mean() == pytest.approx(right, abs=4)


def test_the_aspect_ratio_stays_and_margins_continue_the_border(seen):
    assert (seen(Image.new("L", (3000, 1), 77)) == 77).all()
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    ImageDraw.Draw(image).rectangle([60, 10, 139, 89], fill=(250, 250, 250))
    pixels = seen(image)
    assert (pixels[[*range(7), *range(-7, 0)]] == 90).all()
    bright = pixels > 170
    assert bright.any(0).sum() == bright.any(1).sum()  # a square is still one


@pytest.mark.parametrize(("mode", "format"), [("RGB", "jpg"), ("RGBA", "png"), ("I;16", "png")])
def test_a_camera_that_was_held_upright_is_heeded(seen, mode, format):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    pixels = seen(left_half(mode), f"a.{format}", exif=exif)
    assert pixels[:12].mean() < 60 < 190 < pixels[16:].mean()


@pytest.mark.parametrize(("ink", "paper"), [(20, 255), (235, 0)])
def test_what_is_drawn_on_transparency_stays_visible(seen, ink, paper):
    image = Image.new("RGBA", (40, 40), (127, 127, 127, 0))
    ImageDraw.Draw(image).rectangle([10, 10, 29, 29], fill=(ink, ink, ink, 255))
    pixels = seen(image)
    assert (pixels[0, 0], pixels[14, 14]) == (paper, ink)


def write_page(path, image):
    """A 28x28 digit as somebody might draw it: large, off centre, black on white."""
    large = Image.fromarray(255 - image.numpy()).resize((200, 200), Image.Resampling.BICUBIC)
    paper = Image.new("L", (500, 320), 255)
    paper.paste(large, (230, 10))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    paper.save(path)


def test_photo_is_fitted_into_20_pixels_and_centred_by_mass(tmp_path):
    paper = Image.new("L", (300, 100), 255)
    paper.paste(0, (10, 20, 20, 80))  # a stroke 10 wide and 60 high
    paper.save(tmp_path / "one.png")
    ink = read(tmp_path / "one.png").images[0, 0] > 127
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    assert (rows.min(), rows.max()) == (4, 23)
    assert (columns.min(), columns.max()) in ((12, 14), (13, 15))


def test_damaged_exif_is_ignored_silently(recwarn):
    write_page("page.png", torch.zeros(28, 28, dtype=torch.uint8).fill_diagonal_(255))
    Image.open("page.png").save("page.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    assert len(read("page.jpg").images) == 1
    assert not recwarn.list


def test_image_prints_all_ten_probabilities_and_shows_what_was_seen(capsys):
    image, label = (part[3] for part in load_data("digits", None, train=False))
    write_page("mine.png", image[0])
    call("weights/cnn.pt", "--image", "mine.png")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"mine.png: {label}"
    assert third == f"wrote to {Path('runs') / 'cnn-weights' / 'evaluation'}: seen.png"
    seen = np.asarray(Image.open("runs/cnn-weights/evaluation/seen.png"))
    caption, digit = seen[:15], seen[15::3, ::3]  # three times as large, below the file's name
    assert caption.max() > 128
    assert (digit == read("mine.png").images[0, 0].numpy()).all()
    values = [float(part.rstrip("%")) for part in second.split()[1::2]]
    assert len(values) == 10
    assert sum(values) == pytest.approx(100, abs=1)


def test_files_that_cannot_be_read_get_one_line_each(capsys, monkeypatch):
    monkeypatch.setattr("photos.files.MOST_PIXELS", 200_000)
    Path("text.png").write_text("not an image")
    Image.new("L", (50, 50), 255).save("blank.png")
    write_page("good.png", torch.zeros(28, 28, dtype=torch.uint8).fill_diagonal_(255))
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:-100])
    Path("folder.png").mkdir()
    Path("squeezed.png").write_bytes(gzip.compress(Path("good.png").read_bytes()))
    Image.new("1", (500, 500)).save("bomb.png")
    bad = ["bomb.png", "text.png", "blank.png", "cut.png", "folder.png", "squeezed.png", "missing.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo("fifo.png")
        bad.append("fifo.png")
    with pytest.raises(SystemExit, match="1"):
        call("weights/cnn.pt", "--image", *bad, "good.png")
    output, errors = capsys.readouterr()
    assert output.startswith("good.png: ")
    for name, line in zip(bad, errors.splitlines(), strict=True):
        assert name in line
    assert "bomb.png has 500 x 500 pixels; shrink it below 100 megapixels" in errors


def test_a_folder_of_images_is_all_images_in_it(capsys):
    images, labels = load_data("digits", None, train=False)
    for name, i in (("b/2.png", 3), ("a.jpg", 5), ("b/.hidden.png", 3), ("c.png", 7)):
        write_page(f"pages/{name}", images[i, 0])
    Path("pages/notes.txt").write_text("notes")
    write_page("last.png", images[6, 0])
    call("weights/cnn.pt", "--image", "pages", "last.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pages: left out, in no class or not read as images: 1 .txt"
    named = [("pages/a.jpg", 5), ("pages/b/2.png", 3), ("pages/c.png", 7), ("last.png", 6)]
    assert lines[1:-1:2] == [f"{name}: {labels[i]}" for name, i in named]


def test_a_network_is_scored_on_a_folder_with_images_of_one_class(capsys):
    images, labels = load_data("digits", None, train=False)
    write_page("mine/7/a.png", images[labels == 7][0, 0])
    assert call("weights/cnn.pt", "--dataset", "mine")["test_accuracy"] == 1
    assert re.search(r"macro avg +1\.0000 +1\.0000 +1\.0000", capsys.readouterr().out)


def test_folders_of_one_name_have_results_of_their_own(monkeypatch):
    images, labels = load_data("digits", None, train=False)
    for who in ("alice", "bob"):
        write_page(f"{who}/photos/7/a.png", images[labels == 7][0, 0])
        call("weights/cnn.pt", "--dataset", f"{who}/photos")
    assert len(list(Path("runs/cnn-weights/evaluation").glob("photos-*/metrics.json"))) == 2
    monkeypatch.chdir("alice/photos")
    assert re.fullmatch(r"photos-\w{8}", evaluate.results_name("."))
    assert evaluate.results_name("photos/") == "photos"
    assert evaluate.results_name("./digits") != evaluate.results_name("digits")


def test_the_digits_of_scikit_learn_are_not_taken_for_a_runs_own_folder_of_that_name(tmp_path):
    draw_shapes(tmp_path / "digits", {"train": 20, "test": 8})
    train_classifier.main(["--dataset", "./digits", "--model", "mlp", "--device", "cpu", "--dry-run"])
    with pytest.raises(DataError, match="digits has classes that the network does not know"):
        call("runs/dry-run-mlp-digits", "--dataset", "digits")


def test_a_labelled_picture_without_one_digit_is_light_on_black_too():
    Image.new("L", (90, 90), 255).save("blank.png")
    assert evaluate.read_one(evaluate.load_model("weights/cnn.pt"), "blank.png").max() == 0


def test_a_network_is_scored_on_another_labelled_folder_and_its_mistakes_are_named(capsys):
    """Photos and images of 28x28, of some of the classes; one is in the wrong folder, one is blank."""
    images, labels = load_data("digits", None, train=False)
    chosen = [i for i in range(40) if labels[i] in (3, 5, 7)]
    for i in chosen:
        write_page(f"mine/{labels[i]}/{i}.png", images[i, 0])
    Image.fromarray(images[chosen[0], 0].numpy()).save(f"mine/{labels[chosen[0]]}/small.png")
    write_page("mine/3/wrong.png", images[labels.tolist().index(7), 0])
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
    with pytest.raises(DataError, match=r"mine has classes that the network does not know \(x\); remove them"):
        call("weights/cnn.pt", "--dataset", "mine")
    with pytest.raises(DataError, match=r"fashion-mnist has classes .*; use a network that was trained on them"):
        call("weights/cnn.pt", "--dataset", "fashion-mnist")
