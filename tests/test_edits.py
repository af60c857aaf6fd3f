"""Edits as a user makes them: the examples of docs/extending.md work, and what cannot work is said in one line."""

import json
import math
import re
import shlex
import shutil
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, ROOT, assert_one_line, draw_shapes, load, run, train
from test_loop import start as begin
from test_loop import ten_images

import datasets
import evaluate
import models.gan
import train_classifier
import train_gan
import train_likelihood
import utils
from engine import provenance
from engine.adversarial import logits_of
from engine.errors import UserError
from models.mlp import MLP

FOLDERS = ("datasets", "engine", "measures", "models", "photos")
WORDS = [*DIGITS, "--model", "mlp"]


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
    import engine.products

    engine.products.WORTH = 0.0  # as in conftest.py: the copy's own module would choose by time


def run_in(copy, script, *words):
    return run(copy / script, *words, cwd=copy, before=partial(use, str(copy)))


# The examples of docs/extending.md ----------------------------------------------------------------------------------
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
        assert f"\n{old}\n" in (copy / file).read_text(), "whole lines"
        edit(copy, file, old, new)


def test_the_script_of_the_architecture_page_trains_and_its_run_is_evaluated_and_resumed(tmp_path):
    """On the digits, in an empty folder."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace('"mnist"', '"digits"')
    exec(code, {})
    assert load(tmp_path / "runs" / "mine" / "checkpoint.pt")["epoch"] == 2
    assert evaluate.main(["runs/mine"])["test_accuracy"] > 0.5
    exec(code.replace("epochs=2", 'epochs=3, resume="runs/mine"'), {})
    assert load(tmp_path / "runs" / "mine" / "checkpoint.pt")["epoch"] == 3


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
        words = [word.replace("runs/", "runs/dry-run-") for word in words]
        _, errors = run_in(copy, script, *words)
        assert [line for line in errors.splitlines() if "is a dry run" not in line] == []


# Networks and optimizers --------------------------------------------------------------------------------------------
def test_a_network_that_changed_but_still_fits_is_named(copy):
    run_in(copy, "train_classifier.py", *WORDS, "--epochs", 1, "--output-dir", "run")
    edit(copy, "models/mlp.py", "= F.relu, batch_norm", "= torch.tanh, batch_norm")
    _, errors = run_in(copy, "train_classifier.py", "--resume", "run", "--epochs", 2)
    assert_one_line(errors, "warning", "models/mlp.py", "changed since run was saved")
    _, errors = run_in(copy, "evaluate.py", "run")  # the resumed run was saved by the new code
    assert not errors


def test_another_optimizer_is_saved_by_name_and_does_not_resume_the_first_ones_run(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    train(*WORDS, "--dry-run", "--output-dir", one)
    before = (one / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(
        train_classifier.optim, "build_optimizer", lambda args, weights: torch.optim.RMSprop(weights, args.lr)
    )
    with pytest.raises(UserError, match=r"optimizer: .* with Adam, the code now has RMSprop; .*start a new run"):
        train("--resume", one)
    assert (one / "checkpoint.pt").read_bytes() == before
    train(*WORDS, "--epochs", 1, "--output-dir", other)
    assert json.loads((other / "config.json").read_text())["types"]["optimizer"] == "RMSprop"
    train("--resume", other, "--epochs", 2)
    assert load(other / "checkpoint.pt")["epoch"] == 2


# What is trained is what is evaluated --------------------------------------------------------------------------------
class Fourier(MLP):
    """Random features in a plain attribute, which the state_dict lacks."""

    def __init__(self, **options):
        super().__init__(**options)
        self.features = torch.randn(784, 784) / 28

    def forward(self, x):
        return super().forward((x.flatten(1) @ self.features).view(x.shape))


class MadeAtFirst(MLP):
    def forward(self, x):
        self.head = getattr(self, "head", None) or torch.nn.Linear(10, 10)
        return self.head(super().forward(x))


class Annealed(MLP):
    """A temperature that training changes, in a plain attribute."""

    temperature = 1.0

    def forward(self, x):
        self.temperature *= 0.9 if self.training else 1
        return super().forward(x) / self.temperature


def mlp(forward):
    """The MLP with this forward(self, x)."""
    return type("Edited", (MLP,), {"forward": forward})


@pytest.mark.parametrize(
    ("network", "part"),
    [
        (Fourier, "evaluate.py would measure another network: state_dict() lacks a part"),
        (mlp(lambda self, x: torch.nn.Linear(10, 10)(MLP.forward(self, x))),
         "forward makes a layer (Linear), which is never trained; make it in __init__"),
        (MadeAtFirst, "make every layer in __init__"),
        (Annealed, "evaluate.py would measure another network"),
        (mlp(lambda self, x: MLP.forward(self, x)[:, :9]),
         "--model mlp gives [2, 9] for 2 images, not [2, 10] logits; give its last layer 10 outputs"),
        (mlp(lambda self, x: (MLP.forward(self, x), x)), "--model mlp gives a tuple; return the logits alone"),
        (mlp(lambda self, x, labels: MLP.forward(self, x)), "--model mlp cannot read images [2, 1, 28, 28] ("),
        (mlp(lambda self, x: MLP.forward(self, x).softmax(1)),
         "--model mlp gives probabilities, and --loss takes logits; omit its softmax"),
    ],
)  # fmt: skip
def test_a_network_that_would_be_evaluated_wrongly_is_one_line(monkeypatch, network, part):
    monkeypatch.setitem(models.CLASSIFIERS, "mlp", network)
    with pytest.raises(UserError) as caught:
        train(*WORDS, "--dry-run")
    assert_one_line(f"{caught.value}\n", part)


def test_hidden_files_in_models_are_no_code(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "._cnn.py").write_bytes(b"\0\5\x16\7\xb0")  # as archives from a Mac hold
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.code_fingerprint("") == {}


def test_an_average_that_evaluate_would_not_find_is_refused(monkeypatch):
    build = train_classifier.build

    def averaged(*args):
        state, train_step, network = build(*args)
        state["average"] = torch.optim.swa_utils.AveragedModel(network)
        return state, train_step, state["average"]

    monkeypatch.setattr(train_classifier, "build", averaged)
    with pytest.raises(UserError, match=r'evaluate.py measures state\["model"\] or its EMA, but the'):
        train(*WORDS)


def test_a_likelihood_model_without_its_methods_is_refused_at_the_start(monkeypatch):
    monkeypatch.setitem(models.LIKELIHOOD_MODELS, "vae", lambda **_: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"the model vae lacks loss, sample; models/__init__"):
        train_likelihood.main(DIGITS)


class Independent(torch.nn.Module):
    """A model of one's own: independent pixels. It has no image of itself, and says nothing of its likelihood."""

    def __init__(self, pixel_means=None):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(1, 28, 28))

    def log_likelihood(self, images):
        logits = self.logits.expand_as(images)
        return -F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2, 3))

    def loss(self, images):
        return -self.log_likelihood(images).mean()

    def sample(self, n, generator):
        return self.logits.sigmoid().expand(n, 1, 28, 28).detach()


def test_a_model_of_ones_own_is_trained_and_evaluated_once_it_is_registered(tmp_path, monkeypatch):
    monkeypatch.setitem(models.LIKELIHOOD_MODELS, "mine", Independent)
    flags = ["--model", "mine", "--lr", "0.1", "--schedule", "constant", "--epochs", "3", "--val-size", "50"]
    train_likelihood.main([*DIGITS, *flags, "--output-dir", "run"])
    values = [row["val_log_likelihood"] for row in load("run/checkpoint.pt")["history"]]
    assert -784 * math.log(2) < values[0] < values[-1] < 0
    assert load("run/best.pt")["epoch"] == 3
    monkeypatch.setattr(evaluate, "SAMPLES", 100)
    metrics = evaluate.main(["run"])
    assert metrics == json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["log_likelihood"] == pytest.approx(values[-1], abs=20)
    assert metrics["parameters"] == 784
    assert {"fid", "sampling_seconds", "real"} <= metrics.keys()


def test_fine_tuning_on_other_classes_takes_the_layers_that_fit(tmp_path, capsys):
    train(*WORDS, "--dry-run", "--output-dir", tmp_path / "first")
    draw_shapes(tmp_path / "shapes", {"train": 20, "test": 5})
    words = ["--model", "mlp", "--dataset", tmp_path / "shapes", "--lr", 0, "--dry-run", "--device", "cpu"]
    train(*words, "--start-from", tmp_path / "first", "--output-dir", tmp_path / "second")
    output = capsys.readouterr().out
    assert "--start-from: loaded 6 tensors into model; newly initialised: linear4.bias, linear4.weight\n" in output
    first, second = (load(tmp_path / name / "checkpoint.pt")["state"]["model"] for name in ("first", "second"))
    assert torch.equal(first["linear1.weight"], second["linear1.weight"])


# What a step returns -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("returned", "part"),
    [
        (None, "train_step returns nothing; return a dict of metrics"),
        (torch.zeros(()), "train_step returns a Tensor; return a dict"),
        ({"loss": torch.zeros(2)}, "train_step returns loss with shape [2]; return its mean"),
        ({"loss": None}, "train_step returns loss as a NoneType; return a number"),
        *(({name: 0.0}, f"metric named {name!r}") for name in ("epoch", "val_loss", "$x$", 3)),
        (torch.zeros(()), "validate returns a Tensor; return a dict"),
        ({"loss": 0.0}, "validate returns a metric named 'loss'; use another name, without $: begin it"),
        ({"val_confusion": torch.zeros(10, 10)}, "validate returns val_confusion with shape [10, 10]; return its mean"),
    ],
)
def test_what_a_step_and_validate_may_not_return_is_one_line(tmp_path, returned, part):
    step, validate = ({}, returned) if "validate" in part else (returned, {})
    with pytest.raises(UserError) as caught:
        utils.train(begin(tmp_path / "run", {}), lambda *_: step, ten_images(batch_size=2), validate=lambda: validate)
    assert_one_line(f"{caught.value}\n", part)


@pytest.mark.parametrize(("norm", "calls"), [(torch.nn.Identity(), 1), (torch.nn.BatchNorm2d(1), 2)])
def test_batch_norm_of_the_discriminator_sees_real_and_fake_images_apart(norm, calls):
    """As in DCGAN. In one batch, its statistics would be those of the mixture."""
    seen = []
    discriminator = torch.nn.Sequential(norm, torch.nn.Flatten(), torch.nn.Linear(784, 1))
    discriminator.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    real, fake = logits_of(discriminator, [torch.rand(4, 1, 28, 28)], [torch.rand(4, 1, 28, 28)])
    assert seen == [8 // calls] * calls
    assert real.shape == fake.shape == (4, 1)


@pytest.mark.parametrize(
    ("change", "part"),
    [(lambda images: 2 * images - 1, "pixels from -"), (lambda images: images.view(-1, 1, 14, 56), "[4, 1, 14, 56]")],
)
def test_a_generator_that_makes_no_images_is_one_line(monkeypatch, change, part):
    forward = models.gan.Generator.forward
    monkeypatch.setattr(models.gan.Generator, "forward", lambda self, z: change(forward(self, z)))
    with pytest.raises(UserError) as caught:
        train_gan.main(DIGITS)
    assert_one_line(f"{caught.value}\n", part, "pixels in [0, 1]")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda images, labels: (images / 255, labels), ["uint8", "torch.float32", "255 * images"]),
        (lambda images, labels: (images, labels + 1), ["labels from 1 to 10", "from 0 to 9"]),
        (lambda images, labels: (images, labels.float()), ["labels", "torch.float32", "labels.long()"]),
        (lambda images, labels: (images[:, 0], labels), ["[N, C, H, W]", "[1437, 28, 28]"]),
        (lambda images, labels: (images, labels[:-400]), ["images [1437", "labels [1037]"]),
        (lambda images, labels: (F.pad(images, (2, 2, 2, 2)), labels),
         ["--model mlp cannot read images [2, 1, 32, 32]"]),
    ],
)  # fmt: skip
def test_a_dataset_that_does_not_fit_is_one_line(tmp_path, monkeypatch, change, parts):
    original = datasets.load_digits
    monkeypatch.setattr(datasets, "load_digits", lambda train: change(*original(train)))
    with pytest.raises(UserError) as caught:
        train(*WORDS)
    assert_one_line(f"{caught.value}\n", *parts)
    assert not (tmp_path / "runs").exists()
