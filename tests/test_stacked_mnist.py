"""benchmarks/stacked_mnist.py: the images of three digits, the modes, and a short run."""

import math
import re

import pytest
import torch
from helpers import assert_one_line, run

import datasets
import stacked_mnist
from models import GANS


def test_an_image_has_three_digits_and_shows_their_number():
    labels = torch.arange(10)
    images = labels.to(torch.uint8).view(10, 1, 1, 1).expand(10, 1, 28, 28)  # a digit is an image of its own value
    stacked, numbers = stacked_mnist.stack(images, labels, 10, seed=1)
    assert stacked.shape == (10, 3, 28, 28)
    hundreds, tens, ones = stacked[:, :, 0, 0].long().T
    assert torch.equal(numbers, 100 * hundreds + 10 * tens + ones)
    assert all(torch.equal(digits.sort()[0], labels) for digits in (hundreds, tens, ones))
    assert len(numbers.unique()) > 1


def test_the_reference_classifier_reads_the_channels_in_order():
    stacked, numbers = stacked_mnist.stack(*datasets.load("digits", ""), 200, seed=0)
    read = stacked_mnist.read_numbers(stacked_mnist.load_reference("cpu"), stacked / 255)
    assert (read == numbers).float().mean() > 0.8  # it was trained on other handwriting


def test_modes_and_their_divergence_from_equal_frequencies():
    every = stacked_mnist.mode_measures(torch.arange(1000).repeat(3))
    assert every == {"modes": 1000, "kl": pytest.approx(0, abs=1e-5)}
    assert stacked_mnist.mode_measures(torch.full((50,), 7)) == {"modes": 1, "kl": pytest.approx(math.log(1000))}
    two = torch.tensor([3, 3, 3, 8])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert stacked_mnist.mode_measures(two) == {"modes": 2, "kl": pytest.approx(math.log(1000) - entropy)}


def test_a_run_is_resumed_and_refused_by_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stacked_mnist, "SAMPLES", 300)
    monkeypatch.setattr(stacked_mnist, "WAYS", {"best": "--recipe best"})
    monkeypatch.setattr(stacked_mnist, "load", lambda name, data_dir: datasets.load("digits", data_dir))
    monkeypatch.setitem(GANS, "stacked", None)
    flags = ["--epochs", "1", "--seeds", "1", "--output-dir", str(tmp_path / "runs")]
    stacked_mnist.main(flags)
    first = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"^best  modes \d", first[0])
    assert re.search(r"^real images  modes \d+", first[1])
    stacked_mnist.main(flags)
    again = capsys.readouterr().out
    assert "run already finished at epoch 1" in again
    assert again.splitlines()[-2:] == first
    assert (tmp_path / "runs" / "best-1-epochs-0" / "samples" / "epoch-0001.png").is_file()
    _, errors = run("evaluate.py", tmp_path / "runs" / "best-1-epochs-0", cwd=tmp_path, code=1)
    assert_one_line(errors, "unknown kind stacked-gan")
