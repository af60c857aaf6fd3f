"""Trained networks from Python: load_model, classify, sample, and the files of weights/."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, run
from PIL import Image

import evaluate
from datasets import load
from datasets.folder import read_image
from engine.checkpoint import load_checkpoint
from engine.errors import DataError, UserError
from measures.reference import load_reference
from measures.samples import sample_between
from measures.trained import outputs
from photos import read, to_pixels

WEIGHTS = sorted((ROOT / "weights").glob("*.pt"))


@pytest.fixture(scope="module")
def images():
    """Six of scikit-learn's digits, uint8 [6, 28, 28]."""
    return load("digits", "data", train=False)[0][:6, 0]


SHAPES = {
    "one image": lambda x: x[0], "images": lambda x: x, "one row": lambda x: x[0].flatten(),
    "rows": lambda x: x.flatten(1), "channel first": lambda x: x[:, None], "channel last": lambda x: x[..., None],
}  # fmt: skip
RANGES = {
    "bytes": lambda x: x, "0 to 255": lambda x: x.float(),
    "0 to 1": lambda x: x / 255, "-1 to 1": lambda x: x / 127.5 - 1,
}  # fmt: skip


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_arrays_of_the_usual_shapes_and_ranges_are_the_same_images(images, shape, numpy):
    for scale in RANGES.values():
        given = shape(scale(images))
        pixels = to_pixels(given.numpy() if numpy else given)
        torch.testing.assert_close(pixels, images[: len(pixels), None] / 255, atol=1e-6, rtol=0)
        assert len(pixels) in (1, 6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        *((np.zeros(shape), rf"images of shape \[{', '.join(map(str, shape))}\]")
          for shape in ((32, 32), (0, 28, 28), (6, 3, 28, 28))),  # of another size, none, in colour
        (None, r"images of shape \[\]"),  # what OpenCV gives for a missing file
        (["a.png"], "images must be numbers in one array"),
        (np.full((28, 28), 300.0), "pixels from 300 to 300"),
        (np.full((28, 28), np.nan), "pixels from nan"),
        *((np.array([low, high] * 392), f"pixels from {low:.3g} to {high:.3g}")
          for low, high in ((-1.0, 255.0), (0, np.inf), (-0.02, 1.03), (-0.42, 2.82))),  # such as by mean and deviation
        (np.array([0, 16] * 392, np.uint8), "pixels from 0 to 16; scale"),  # 0 to 255 or 0 to 16?
        (np.array([0, 65535] * 392, np.uint16), r"pixels from 0 to 6.55e\+04"),
    ],
)  # fmt: skip
def test_arrays_of_other_shapes_and_ranges_are_one_line(given, reason):
    with pytest.raises(DataError, match=reason):
        to_pixels(given)


def test_a_resized_image_may_exceed_1_by_rounding():
    image = torch.ones(28, 28).nextafter(torch.tensor(2.0))
    assert to_pixels(image).equal(image[None, None])


def test_turned_and_big_endian_arrays_are_read_as_they_are():
    image = np.arange(784, dtype=np.float32).reshape(28, 28) / 783
    assert torch.equal(to_pixels(np.rot90(image)[::-1]), to_pixels(np.rot90(image)[::-1].copy()))
    assert torch.equal(to_pixels(image.astype(">f4")), to_pixels(image))


@pytest.mark.parametrize("kind", [np.uint8, bool, np.int64, np.float32, np.float16])
def test_black_and_white_are_0_and_1_in_any_type(images, kind):
    binary = (images.numpy() > 127).astype(kind)
    assert to_pixels(binary).equal(torch.from_numpy(binary).float()[:, None])
    assert to_pixels(torch.from_numpy(binary)).equal(to_pixels(binary))


def test_a_path_or_a_picture_is_read_as_the_network_learned_to(tmp_path, images):
    """The digits in it; or all of it, if it learned from a folder of images."""
    model = evaluate.load_model("weights/cnn.pt")
    page = Image.new("L", (200, 100), 255)
    for i in range(2):
        page.paste(Image.fromarray(255 - images[i].numpy()).resize((84, 84)), (8 + 100 * i, 8))
    page.save(tmp_path / "page.png")
    for dataset, expected in (("mnist", read(page).images), ("shapes", read_image(page))):
        model.options["dataset"] = dataset
        for given in (page, tmp_path / "page.png", str(tmp_path / "page.png")):
            assert evaluate.classify(model, given).equal(evaluate.classify(model, expected / 255))
    assert len(read(page).images) == 2


def test_a_walk_leads_from_the_noise_of_one_seed_to_that_of_the_other():
    model = evaluate.load_model("weights/cgan.pt")
    start, middle, end = (sample_between(model, 1, 2, t, label=3) for t in (0.0, 0.5, 1.0))
    assert start.shape == (28, 28)
    assert torch.equal(start, sample_between(model, 1, 5, 0.0, label=3))
    assert torch.equal(end, sample_between(model, 2, 5, 0.0, label=3))
    assert not middle.allclose(start, atol=0.1)


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_the_weights_are_the_pinned_ones_and_name_where_they_come_from(path):
    sums = dict(line.split()[::-1] for line in (ROOT / "weights" / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.name]
    assert sums.keys() == {path.name for path in [*WEIGHTS, ROOT / "weights" / "reader.npz"]}
    held = load_checkpoint(path)
    assert {"recipe", "seed", "script", "epochs"} <= held["options"].keys()
    assert "test_accuracy" in held["measured"] or "fid" in held["measured"]
    assert sum(path.stat().st_size for path in WEIGHTS) < 12e6


def test_weights_load_from_another_working_directory_and_say_what_they_are():
    model = evaluate.load_model("weights/cnn.pt")
    assert not model.training
    assert (model.options["recipe"], model.options["kind"]) == ("best", "classifier")
    with pytest.raises(UserError, match=r"weights/nope\.pt does not exist"):
        evaluate.load_model("weights/nope.pt")


def test_loading_draws_and_seeds_none_of_the_callers_random_numbers(monkeypatch):
    """Nor those of a GPU: each seed of a training there would draw the same."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU was seeded"))
    state = torch.get_rng_state()
    evaluate.load_model("weights/mlp.pt")
    assert torch.equal(torch.get_rng_state(), state)


def test_checking_a_network_leaves_the_random_numbers_of_the_cpu_and_of_a_macs_gpu_as_they_were(monkeypatch):
    torch.manual_seed(5)  # another seed than that of the check
    state, before = [7], torch.get_rng_state()
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.__setitem__(0, seed))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda before: state.__setitem__(0, before))
    images = SimpleNamespace(is_cuda=False, device=torch.device("mps"), float=lambda: None)
    outputs(torch.nn.Identity(), images)
    assert state == [7]
    assert torch.equal(torch.get_rng_state(), before)


def test_classify_needs_no_scaling(data_dir):
    """The network was trained on pixels from -1 to 1; it takes other ranges as well."""
    model = evaluate.load_model("weights/cnn.pt")
    images, labels = load("mnist", data_dir, train=False)
    images, labels = images[:500, 0], labels[:500]
    answer = evaluate.classify(model, images)
    assert answer.sum(1).allclose(torch.ones(500))
    torch.testing.assert_close(answer, evaluate.classify(model, images / 255), atol=1e-4, rtol=0)
    assert (answer.argmax(1) == labels).float().mean() > 0.99


def test_sample_gives_the_digit_that_it_is_asked_for():
    model = evaluate.load_model("weights/cgan.pt")
    images = evaluate.sample(model, 50, digit=7)
    assert images.shape == (50, 1, 28, 28)
    assert 0 <= images.min() < images.max() <= 1
    assert (load_reference("cpu").read(images)[1] == 7).float().mean() > 0.9
    assert torch.equal(images, evaluate.sample(model, 50, digit="7"))
    assert load_reference("cpu").read(evaluate.sample(model, 50))[1].unique().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "ask", "reason"),
    [
        ("cnn", lambda model: evaluate.sample(model, 4), "a classifier, not a generator"),
        ("gan", lambda model: evaluate.sample(model, 4, digit=7), "trained without labels"),
        ("gan", lambda model: evaluate.classify(model, torch.zeros(1, 28, 28)), "a generator, not a classifier"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(name, ask, reason):
    with pytest.raises(UserError, match=reason):
        ask(evaluate.load_model(f"weights/{name}.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "mlp", "gan"])
def test_evaluating_weights_gives_the_values_that_they_hold_beside_the_runs(name, tmp_path, data_dir):
    run("evaluate.py", ROOT / "weights" / f"{name}.pt", "--data-dir", data_dir, cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / f"{name}-weights" / "evaluation" / "metrics.json").read_text())
    held = load_checkpoint(ROOT / "weights" / f"{name}.pt")["measured"]
    compared = {"test_accuracy", "parzen_log_likelihood", "fid", "coverage"} & held.keys()
    assert compared
    for measure in compared:
        assert metrics[measure] == pytest.approx(held[measure], rel=5e-3), measure
    assert not (ROOT / "weights" / "evaluation").exists()
