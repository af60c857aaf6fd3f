"""Images of your own: a folder of classes, from the files to reports and plots, and one line for each mistake."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SHAPES, assert_one_line, draw_shapes, load, save_sealed
from PIL import Image

import evaluate
import train_cgan
import train_classifier
import train_gan
import train_likelihood
from datasets import class_names, hold_out, short_name
from datasets import load as load_data
from datasets.folder import list_images
from engine.errors import DataError
from models import build_network

CPU = ["--device", "cpu", "--model", "mlp"]


@pytest.fixture
def few(tmp_path):
    """In the working directory, `few`: 20 images of each of three classes to train on, and 8 to test with."""
    return draw_shapes(tmp_path / "few", {"train": 20, "test": 8})


# Training and evaluating ----------------------------------------------------------------------------------------------
def test_a_network_learns_three_shapes_and_the_report_names_them(tmp_path, capsys):
    shapes = draw_shapes(tmp_path / "shapes", {"train": 100, "test": 20})
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


def test_the_best_recipe_holds_none_of_a_folder_out(few):
    train_classifier.main(["--dataset", "few", "--recipe", "best", *CPU, "--dry-run"])
    train_gan.main(["--dataset", "few", "--recipe", "best", "--networks", "large", "--device", "cpu", "--dry-run"])
    for run in ("mlp", "gan"):
        assert load(f"runs/dry-run-{run}-few/checkpoint.pt")["options"]["val_size"] == 0


def test_generators_learn_a_folder_of_one_class(few):
    for path in few.glob("*/[sc]*"):
        shutil.rmtree(path)
    for script in (train_gan, train_likelihood):
        script.main(["--dataset", "few", "--device", "cpu", "--dry-run"])
    with pytest.raises(DataError, match=r"few has one class, but train_cgan\.py needs at least two"):
        train_cgan.main(["--dataset", "few", "--device", "cpu", "--dry-run"])


def test_a_conditional_gan_shows_every_class(few):
    words = ["--dry-run", "--wrong-label", "0.3", "--output-dir", "runs/cgan-few"]
    train_cgan.main(["--dataset", str(few), "--device", "cpu", *words])
    assert Image.open("runs/cgan-few/samples/epoch-0001.png").size == (10 * 56, 3 * 56)  # a row for each class
    evaluate.main(["runs/cgan-few", "--samples", "12"])
    folder = few.parent / "runs" / "cgan-few" / "evaluation"
    assert np.load(folder / "samples-12-seed0.npz")["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert Image.open(folder / "interpolation-seed0.png").size == (10 * 56, 3 * 56)
    assert Image.open(folder / "same_noise-seed0.png").size == (3 * 56, 10 * 56)
    evaluate.main(["runs/cgan-few", "--samples", "5", "--digit", "square"])
    assert np.load(folder / "samples-5-digitsquare-seed0.npz")["labels"].tolist() == [1] * 5


@pytest.mark.parametrize(
    ("classes", "asked", "number", "named"),
    [("1 2 3", "3", 2, "3"), ("1 2 3", "0", 0, "1"), ("2 10 x", "2", 1, "2"), ("a-b a b", "1", 1, "1")],
)
def test_a_class_is_asked_for_by_its_name_and_only_else_by_its_number(tmp_path, classes, asked, number, named):
    """In file names, what is no letter, digit or dot becomes _."""
    names = sorted(classes.split())
    options = {"kind": "cgan", "classes": names, "noise": "unit", "dataset": "x"}
    state = {"generator": build_network(options).state_dict()}
    save_sealed({"options": options, "code": {}, "state": state, "epoch": 1}, tmp_path / "run" / "a.pt")
    (tmp_path / "run" / "config.json").write_text("{}")
    evaluate.main([str(tmp_path / "run" / "a.pt"), "--samples", "2", "--digit", asked])
    with np.load(tmp_path / "run" / "evaluation" / f"samples-2-digit{named}-seed0.npz") as samples:
        assert samples["labels"].tolist() == [number] * 2


def test_the_other_scripts_take_a_folder_too(few):
    for script in (train_gan, train_likelihood):
        run = script.main(["--dataset", "few", "--device", "cpu", "--dry-run"])["folder"]
        assert load(f"{run}/checkpoint.pt")["options"]["classes"] == SHAPES
        evaluate.main([run, "--samples", "4"])


def test_a_folder_that_was_moved_into_the_data_dir_is_found(few):
    (few.parent / "disk").mkdir()
    few.rename(few.parent / "disk" / "few")
    assert len(load_data("few", "disk")[0]) == 60


# Names ----------------------------------------------------------------------------------------------------------------
def test_the_names_of_the_built_in_classes():
    names = [class_names(name, "") for name in ("digits", "mnist", "fashion-mnist", "kmnist")]
    assert names[:2] == [list("0123456789")] * 2
    assert (names[2][9], names[3][0], len(names[2]), len(names[3])) == ("Ankle boot", "o", 10, 10)


def test_a_folder_with_the_name_of_a_built_in_dataset_is_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "7").mkdir(parents=True)
    class_names("digits", "")
    assert "digits is the built-in dataset; for the folder of that name, use ./digits\n" in capsys.readouterr().out


def test_a_folder_is_named_by_its_own_name_in_runs(tmp_path, monkeypatch):
    (tmp_path / "my shapes: 2").mkdir()
    monkeypatch.chdir(tmp_path / "my shapes: 2")
    assert short_name("fashion-mnist") == "fashion-mnist"
    assert short_name("/data/Formes d'été/") == "Formes-d-été"
    assert short_name(".") == short_name("../my shapes: 2") == "my-shapes-2"
    assert short_name("/") == "folder"


# The parts ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def one_level(tmp_path):
    return draw_shapes(tmp_path / "one", {"": 25})


TEST_PART = {  # by a hash of the names: the same on every machine and in every place
    "circle": [0, 1, 2, 9, 11, 19], "square": [3, 9], "triangle": [3, 20, 22],
}  # fmt: skip


def test_about_a_fifth_of_each_class_is_the_test_part_of_a_folder_of_one_level(one_level):
    for folder in (one_level, shutil.copytree(one_level, one_level.parent / "elsewhere" / "copy")):
        train, test = ([path for path, _ in list_images(folder, part)[0]] for part in (True, False))
        for name, numbers in TEST_PART.items():
            assert sorted(int(Path(path).stem) for path in test if Path(path).parent.name == name) == numbers
        assert (len(train), len({*train, *test})) == (64, 75)
    assert load_data(str(one_level), "", train=False)[1].bincount().tolist() == [6, 2, 3]
    _, (_, labels) = hold_out(*load_data(str(one_level), "", True), 15)
    assert set(labels.tolist()) == {0, 1, 2}  # the last images are of all classes


def test_runs_in_the_folder_of_images_are_not_a_class(one_level, monkeypatch):
    monkeypatch.chdir(one_level)
    train_classifier.main(["--dataset", ".", *CPU, "--epochs", "1"])
    assert evaluate.main(["runs/mlp-one"])["test_images"] == 11


def test_a_training_image_remains_one_when_others_are_added(one_level):
    for path in one_level.glob("*/*[02468].png"):
        path.rename(one_level / f"{path.parent.name}-{path.name}")
    before, _ = list_images(one_level, train=True)
    for path in one_level.glob("*-*.png"):
        path.rename(one_level / path.name.replace("-", "/"))
    assert {*before} < {*list_images(one_level, train=True)[0]}


def test_a_folder_of_the_runs_own_is_scored_on_its_test_part(one_level, monkeypatch):
    monkeypatch.chdir(one_level.parent)
    train_classifier.main(["--dataset", "one", *CPU, "--epochs", "1"])
    moved = shutil.copytree(one_level, one_level.parent / "elsewhere" / "copy")
    for words in ([], ["--dataset", str(one_level)], ["--dataset", str(moved)]):
        assert evaluate.main(["runs/mlp-one", *words])["test_images"] == 11
    shutil.copy(one_level / "circle" / "3.png", one_level / "circle" / "new.png")
    assert evaluate.main(["runs/mlp-one", "--dataset", "one"])["test_images"] in (11, 12)


def count(few):
    """How many training images it has, by its message, and of each class."""
    return load_data(str(few), "", True)[1].bincount().tolist()


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "._0.png", "Thumbs.db"])
def test_what_systems_and_editors_leave_is_no_image_and_no_class(few, name, capsys):
    for place in (few / "train", few / "test", few / "train" / "circle"):
        if name.endswith((".png", ".db")):
            (place / name).write_bytes(b"what a system leaves")
        else:
            shutil.copytree(few / "test" / "square", place / name)
    assert class_names("few", "") == SHAPES
    assert count(few) == [20, 20, 20]
    assert "left out" not in capsys.readouterr().out


def link_up(few):
    """Links that would never end, or lead to images that are counted elsewhere."""
    targets = [few, few / "train", few / "train" / "square", few / "train" / "square" / "0.png"]
    for i, target in enumerate([*targets, few / "train" / "circle" / "1.png"]):
        (few / "train" / "circle" / f"link{i}{target.suffix}").symlink_to(target)
    (few / "train" / "square" / "link").symlink_to(few / "train" / "circle")


def link_out(few):
    """A class that is a link, in which two links lead to one file and one to its own folder."""
    outside = (few / "train" / "circle").rename(few.parent / "outside")
    other = shutil.copytree(few / "test", few.parent / "other")
    for name, target in (("loop", outside), ("a.png", other / "square" / "0.png"), ("b.png", other / "square/0.png")):
        (outside / name).symlink_to(target)
    (few / "train" / "circle").symlink_to(outside)


@pytest.mark.parametrize(("link", "circles", "left"), [(link_up, 20, 4), (link_out, 21, 1)])
def test_each_file_is_one_image_however_many_links_lead_to_it(few, link, circles, left, capsys):
    link(few)
    assert count(few) == [circles, 20, 20]
    assert f"few: left out, in no class or not read as images: {left} links to folders\n" in capsys.readouterr().out


def test_every_format_is_read_or_its_ending_is_named_and_counted(few, capsys):
    circles = few / "train" / "circle"
    for i, ending in enumerate(["gif", "jfif", "JPG", "jpe", "pnm", "tif", "dib"]):
        Image.open(circles / f"{i}.png").save(circles / f"new{i}.{ending}", format=None if i < 6 else "bmp")
    for name in ("1.heic", "2.HEIC", "notes"):
        (circles / name).write_bytes(b"x")
    (few / "val" / "circle").mkdir(parents=True)
    for folder in (few / "train", few / "val" / "circle"):
        shutil.copy(circles / "0.png", folder / "outside.png")
    assert count(few) == [26, 20, 20]
    _, said, counts = capsys.readouterr().out.splitlines()[-1].rsplit(": ", 2)
    assert said == "left out, in no class or not read as images"
    assert {*counts.split(", ")} == {"2 .png", "2 .heic", "1 without an ending", "1 .dib"}
    shutil.rmtree(few / "train" / "square")
    (few / "train" / "square").mkdir()
    (few / "train" / "square" / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"square holds 0 images \(BMP, GIF.*\) in 1 files \(1 .heic\), but needs"):
        count(few)


def test_a_folder_with_the_name_of_a_dataset_gives_way_to_it(few):
    few.rename("digits")
    assert len(load_data("digits", "", True)[0]) == 1437
    assert class_names("digits", "") == list("0123456789")
    assert len(load_data("./digits", "", True)[0]) == 60


# What can be wrong ----------------------------------------------------------------------------------------------------
# Pillow would start Ghostscript to read this, whatever the file is called.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"


def cut_off(*names):
    def cut(few):
        for path in (few / name for name in names):
            path.write_bytes(path.read_bytes()[:100])

    return cut


def not_finite(few):
    pixels = np.zeros((9, 9), np.float32)
    pixels[3, 3:5] = np.nan, np.inf
    Image.fromarray(pixels).save(few / "train" / "circle" / "1.tif")


def deny(few):
    """As a file system does; root may read everything."""
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("circle"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    os.scandir = scandir


@pytest.mark.filterwarnings("error")  # a warning would be one more line
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ["no dataset few, neither here nor in data; use one of mnist,", "digits", "folder"]),
        (lambda few: [shutil.rmtree(path) for path in few.glob("*/[sc]*")],
         ["few has one class, but train_classifier.py needs at least two", "a folder of their own"]),
        (lambda few: [shutil.rmtree(path) for path in few.iterdir()], ["few has no subfolder; put the images of each"]),
        (lambda few: (few / "test").rename(few / "Val"), ["few has a folder Val, but not both"]),
        (lambda few: (few / "test" / "square").rename(few / "test" / "star"),
         ["few/test", "missing: square; new: star", "the same subfolders"]),
        (cut_off("train/circle/3.png"), ["few/train/circle/3.png cannot be read", "remove"]),
        (cut_off("train/circle/3.png", "train/square/5.png", "train/square/7.png"),
         ["3 of 60 images cannot be read, such as", "circle/3.png", "square/5.png", "square/7.png"]),
        (not_finite, ["1.tif cannot be read as an image (not all of its pixels are finite)"]),
        (deny, ["few/train/circle cannot be read (Permission denied); allow reading it"]),
        (lambda few: (few / "train" / "circle" / "a.png").symlink_to("nowhere"), ["circle/a.png is not a file"]),
        (lambda few: (few / "train" / "circle" / "3.png").write_bytes(POSTSCRIPT), ["circle/3.png", "cannot identify"]),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_trained_on_is_one_line(few, spoil, parts, monkeypatch):
    monkeypatch.setattr(os, "scandir", os.scandir)  # restored at the end
    spoil(few)
    with pytest.raises(DataError) as caught:
        train_classifier.main(["--dataset", "few", *CPU])
    assert_one_line(f"{caught.value}\n", *parts)
    assert not (few.parent / "runs").exists()


def test_a_class_of_one_image_cannot_be_split(one_level):
    for path in (one_level / "square").glob("[1-9]*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"one/square holds 1 images .*, but needs at least 2"):
        load_data(str(one_level), "", True)


# Changed since --------------------------------------------------------------------------------------------------------
def test_changed_classes_are_one_line(few):
    train_classifier.main(["--dataset", "few", *CPU, "--epochs", "1"])
    for part in ("train", "test"):
        (few / part / "square").rename(few / part / "star")
    for main, words in ((train_classifier.main, ["--resume", "runs/mlp-few"]), (evaluate.main, ["runs/mlp-few"])):
        with pytest.raises(DataError, match=r"^few has other classes .*missing: square; new: star.*new run.*$"):
            main(words)


def test_a_classifier_that_is_scored_after_its_images_got_other_names_warns(one_level, monkeypatch, capsys):
    monkeypatch.chdir(one_level.parent)
    train_classifier.main(["--dataset", "one", *CPU, "--epochs", "1"])
    evaluate.main(["runs/mlp-one"])
    assert capsys.readouterr().err == ""
    for path in list((one_level / "circle").iterdir()):
        path.rename(path.with_name(f"new-{path.name}"))
    evaluate.main(["runs/mlp-one"])
    assert "warning: one has other training images than runs/mlp-one was trained on" in capsys.readouterr().err


def test_other_training_images_are_noticed_by_evaluating_and_by_resuming(few, monkeypatch, capsys):
    train_gan.main(["--dataset", "few", "--device", "cpu", "--epochs", "1"])
    Image.new("L", (28, 28)).save(few / "train" / "circle" / "3.png")
    monkeypatch.setattr(evaluate, "SAMPLES", 100)
    evaluate.main(["runs/gan-few"])
    assert "warning: few has other training images than runs/gan-few was trained on" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"^few has other training images than runs/gan-few was .*--start-from runs/"):
        train_gan.main(["--resume", "runs/gan-few"])
    checkpoint = load("runs/gan-few/checkpoint.pt")
    del checkpoint["options"]["dataset_digest"]  # as older runs
    save_sealed(checkpoint, few.parent / "runs" / "gan-few" / "checkpoint.pt")
    assert train_gan.main(["--resume", "runs/gan-few", "--epochs", "2"])["epoch"] == 2
