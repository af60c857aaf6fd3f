"""benchmarks/stacked_mnist.py: the images of three digits, the modes, and a whole run in short."""

import json
import math

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


def test_the_judge_reads_the_channels_in_order():
    judge = stacked_mnist.load_reference("cpu")
    stacked, numbers = stacked_mnist.stack(*datasets.load("digits", ""), 200, seed=0)
    read = stacked_mnist.read_numbers(judge, stacked / 255)
    assert (read == numbers).float().mean() > 0.8  # it was trained on other handwriting


def test_modes_and_their_divergence_from_equal_shares():
    every = stacked_mnist.mode_measures(torch.arange(1000).repeat(3))
    assert every == {"modes": 1000, "kl": pytest.approx(0, abs=1e-5)}
    assert stacked_mnist.mode_measures(torch.full((50,), 7)) == {"modes": 1, "kl": pytest.approx(math.log(1000))}
    two = torch.tensor([3, 3, 3, 8])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert stacked_mnist.mode_measures(two) == {"modes": 2, "kl": pytest.approx(math.log(1000) - entropy)}


def test_a_run_is_recorded_resumed_and_refused_by_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stacked_mnist, "SAMPLES", 300)
    monkeypatch.setattr(stacked_mnist, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(stacked_mnist, "WAYS", {"best": "--recipe best"})
    monkeypatch.setattr(stacked_mnist, "load", lambda name, data_dir: datasets.load("digits", data_dir))
    monkeypatch.setitem(GANS, "stacked", None)
    flags = ["--epochs", "2", "--seeds", "1", "--output-dir", str(tmp_path / "runs")]
    stacked_mnist.main(flags)
    assert not (tmp_path / "results.json").exists()
    stacked_mnist.main([*flags, "--record"])
    assert "run already finished at epoch 2" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"best", "real images"}
    assert results["best"]["options"] == "--recipe best"
    assert results["real images"]["seeds"][0]["modes"] > results["best"]["seeds"][0]["modes"] > 0
    stacked_mnist.main([*flags, "--record"])
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["best"]["seeds"] == results["best"]["seeds"]
    assert (tmp_path / "runs" / "best-2-epochs-0" / "samples" / "epoch-0002.png").is_file()
    _, errors = run("evaluate.py", tmp_path / "runs" / "best-2-epochs-0", cwd=tmp_path, code=1)
    assert_one_line(errors, "unknown kind stacked-gan")
