"""Edits as a user makes them, in a copy of the repository: what works, and what is said where it cannot."""

import csv
import json
import re
import shlex
import shutil
import sys
from functools import partial

import pytest
from helpers import DIGITS, ROOT, assert_one_line, draw_shapes, load, run

FOLDERS = ("datasets", "engine", "measures", "models", "photos")
MLP = [*DIGITS, "--model", "mlp"]


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository's code."""
    folder = tmp_path / "repository"
    for name in (*FOLDERS, "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def edit(copy, file, old, new):
    text = (copy / file).read_text()
    assert text.count(old) == 1, (file, old, text.count(old))
    (copy / file).write_text(text.replace(old, new))


def use(copy):
    """In a process forked from one of the tests': import the copy's modules, not the repository's."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))):
            del sys.modules[name]
    sys.path.insert(0, copy)


def run_in(copy, script, *words, code=0):
    return run(copy / script, *words, cwd=copy, code=code, before=partial(use, str(copy)))


def rows(copy, name="run"):
    return list(csv.DictReader((copy / name / "metrics.csv").open()))


# The examples of docs/extending.md ------------------------------------------------------------------------------------

SECTIONS = {}
for section in re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)[1:]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    if blocks:
        SECTIONS[section.splitlines()[0]] = blocks


def apply(copy, diff):
    """Replace each hunk's old lines by its new ones. A hunk starts with `--- FILE`."""
    for hunk in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        file, *lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        edit(copy, file, old, new)


@pytest.mark.parametrize("title", SECTIONS)
def test_every_example_of_the_page_works(copy, title):
    commands = []
    draw_shapes(copy / "shapes", {"train": 20, "test": 5})  # the reader's own images
    for language, block in SECTIONS[title]:
        if language == "python":
            (copy / block.splitlines()[0].removeprefix("# ")).write_text(block.split("\n", 1)[1])
        elif language == "diff":
            apply(copy, block)
        else:
            commands += block.splitlines()
    assert commands
    for command in commands:
        python, script, *words = shlex.split(command)
        assert python == "python"
        words += ["--dry-run", "--device", "cpu"] if script.startswith("train_") else []
        _, errors = run_in(copy, script, *words)
        assert not errors


def test_an_example_of_a_clipped_gradient_shows_its_norm(copy):
    apply(copy, SECTIONS["Change the step"][0][1])
    run_in(copy, "train_classifier.py", *MLP, "--epochs", 1, "--output-dir", "run")
    assert float(rows(copy)[0]["norm"]) > 0


# What measures is not what is edited ----------------------------------------------------------------------------------

READ = """
import torch
from datasets import load
from measures.judge import load_judge
images, labels = load("mnist", {data!r}, train=False)
print((load_judge("cpu").read(images / 255)[1] == labels).double().mean().item())
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= F.relu, batch_norm", "= torch.tanh, batch_norm"),
        ("out_channels=256, kernel_size=3", "out_channels=256, kernel_size=3, bias=False"),
    ],
)  # fmt: skip
def test_edits_of_the_cnn_leave_the_judge_alone(copy, data_dir, old, new):
    edit(copy, "models/cnn.py", old, new)
    (copy / "read.py").write_text(READ.format(data=str(data_dir)))
    output, _ = run_in(copy, "read.py")
    assert float(output) >= 0.994
    run_in(copy, "train_gan.py", *DIGITS, "--dry-run")


# Metrics --------------------------------------------------------------------------------------------------------------

METRICS = '        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}'


def with_metrics(copy, metrics):
    edit(copy, "train_classifier.py", METRICS, f"        return {metrics}")


def test_a_metric_may_come_and_go_between_two_sessions(copy):
    run_in(copy, "train_classifier.py", *MLP, "--epochs", 1, "--output-dir", "run")
    with_metrics(copy, '{"loss": loss.detach(), "size": float(len(images))}')
    _, errors = run_in(copy, "train_classifier.py", "--resume", "run", "--epochs", 2)
    assert_one_line(errors, "train_classifier.py", "changed")
    edit(copy, "train_classifier.py", '"loss": loss.detach(), "size": float(len(images))', '"loss": loss.detach()')
    run_in(copy, "train_classifier.py", "--resume", "run", "--epochs", 3)
    first, second, third = rows(copy)
    assert (first["size"], third["size"], second["accuracy"], third["accuracy"]) == ("", "", "", "")
    assert float(first["accuracy"]) > 0
    assert float(second["size"]) == pytest.approx((44 * 32 * 32 + 29 * 29) / 1437)  # weighted by images


def test_a_metric_that_begins_within_an_epoch_is_averaged_over_its_own_images(copy):
    edit(
        copy, "train_classifier.py", "    loss_of = LOSSES[args.loss]\n", "    loss_of, seen = LOSSES[args.loss], []\n"
    )
    with_metrics(copy, '{"loss": loss.detach(), **({"late": 7.0} if len(seen) > 30 else {}), "n": seen.append(0) or 1}')
    run_in(copy, "train_classifier.py", *MLP, "--epochs", 1, "--output-dir", "run")
    assert float(rows(copy)[0]["late"]) == 7.0


def test_a_metric_that_is_no_mean_is_one_line(copy):
    with_metrics(copy, '{"loss": (logits - 1).detach()}')
    _, errors = run_in(copy, "train_classifier.py", *MLP, "--output-dir", "run", code=1)
    assert_one_line(errors, "loss", "[32, 10]", "mean")


# Networks and optimizers ----------------------------------------------------------------------------------------------


def test_a_network_that_changed_but_still_fits_is_named(copy):
    run_in(copy, "train_classifier.py", *MLP, "--epochs", 1, "--output-dir", "run")
    edit(copy, "models/mlp.py", "= F.relu, batch_norm", "= torch.tanh, batch_norm")
    for words in (["evaluate.py", "run"], ["train_classifier.py", "--resume", "run", "--epochs", 2]):
        _, errors = run_in(copy, *words)
        assert_one_line(errors, "warning", "models/mlp.py", "changed since run was saved")
    _, errors = run_in(copy, "evaluate.py", "run")  # the resumed run was saved by the new code
    assert not errors


def test_a_network_that_no_longer_fits_is_one_line(copy):
    run_in(copy, "train_classifier.py", *MLP, "--dry-run", "--output-dir", "run")
    edit(copy, "models/mlp.py", "self.linear1 = nn.Linear(in_features=28 * 28, out_features=256)",
         "self.linear1 = nn.Linear(in_features=28 * 28, out_features=255)")  # fmt: skip
    edit(copy, "models/mlp.py", "in_features=256, out_features=128", "in_features=255, out_features=128")
    for words in (["evaluate.py", "run"], ["train_classifier.py", "--resume", "run"]):
        _, errors = run_in(copy, *words, code=1)
        assert "Traceback" not in errors
        assert "changed since" in errors.splitlines()[-1]


def test_another_optimizer_is_saved_by_name_and_does_not_resume_the_first_ones_run(copy):
    run_in(copy, "train_classifier.py", *MLP, "--epochs", 1, "--output-dir", "run")
    before = (copy / "run" / "checkpoint.pt").read_bytes()
    edit(copy, "train_classifier.py", "optim.build_optimizer(args, model.parameters())",
         "torch.optim.RMSprop(model.parameters(), args.lr)")  # fmt: skip
    _, errors = run_in(copy, "train_classifier.py", "--resume", "run", "--epochs", 2, code=1)
    line = errors.splitlines()[-1]
    assert "Traceback" not in errors
    for part in ("optimizer", "run was trained with Adam", "RMSprop", "start a new run"):
        assert part in line
    assert (copy / "run" / "checkpoint.pt").read_bytes() == before
    run_in(copy, "train_classifier.py", *MLP, "--epochs", 1, "--output-dir", "other")
    assert json.loads((copy / "other" / "config.json").read_text())["classes"]["optimizer"] == "RMSprop"
    run_in(copy, "train_classifier.py", "--resume", "other", "--epochs", 2)
    assert load(copy / "other" / "checkpoint.pt")["epoch"] == 2


def test_a_network_with_other_outputs_is_one_line(copy):
    edit(copy, "models/mlp.py", "in_features=64, out_features=classes", "in_features=64, out_features=9")
    _, errors = run_in(copy, "train_classifier.py", *MLP, code=1)
    assert_one_line(errors, "--model mlp", "[2, 9]", "10 outputs")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("nn.Linear(in_features=256, out_features=28 * 28),\n            nn.Sigmoid()",
         "nn.Linear(in_features=256, out_features=28 * 28),\n            nn.Tanh()", "pixels from -"),
        ("view(-1, 1, 28, 28)\n\n\nclass Disc", "view(-1, 1, 14, 56)\n\n\nclass Disc", "[2, 1, 14, 56]"),
    ],
)  # fmt: skip
def test_a_generator_that_draws_no_images_is_one_line(copy, old, new, part):
    edit(copy, "models/gan.py", old, new)
    _, errors = run_in(copy, "train_gan.py", *DIGITS, code=1)
    assert_one_line(errors, part, "pixels in [0, 1]")


# Data sets ------------------------------------------------------------------------------------------------------------

RETURN = "    return (images[:cut], labels[:cut]) if train else (images[cut:], labels[cut:])"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("images = images / 255", ["uint8", "torch.float32", "255 * images"]),
        ("labels = labels + 1", ["labels from 1 to 10", "from 0 to 9"]),
        ("labels = labels.float()", ["labels", "torch.float32", "labels.long()"]),
        ("images = images[:, 0]", ["[N, C, H, W]", "[1437, 28, 28]"]),
        ("labels = labels[:-400]", ["images [1437", "labels [1397]"]),
        ("images = F.pad(images, (2, 2, 2, 2))", ["--model mlp cannot read images [2, 1, 32, 32]"]),
        ("images = images.repeat(1, 3, 1, 1)", ["--model mlp cannot read images [2, 3, 28, 28]"]),
    ],
)
def test_a_data_set_that_does_not_fit_is_one_line(copy, line, parts):
    edit(copy, "datasets/digits.py", RETURN, f"    {line}\n{RETURN}")
    _, errors = run_in(copy, "train_classifier.py", *MLP, code=1)
    assert_one_line(errors, *parts)
    assert not (copy / "runs").exists()
