"""What the GAN scripts watch in a training: samples, a score that chooses the epoch, and signs of failure."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import DIGITS, load
from PIL import Image
from test_gan import PAIRS

import train_gan
from datasets import load as load_images
from measures.samples import walks, watched_generator
from measures.watch import Watch, failure_signs
from models.cgan import ConditionalGenerator
from models.gan import Generator


def test_failing_runs_are_told_in_words():
    ten = torch.arange(1000) % 10
    assert list(failure_signs({"loss_d": 1.2}, ten, ten)) == []
    assert "near zero" in next(failure_signs({"loss_d": 0.001}, ten, ten))
    assert "the digit 7" in next(failure_signs({"loss_d": 1.2}, torch.full((1000,), 7)))
    assert "asked for" in next(failure_signs({"loss_d": 1.2}, ten, ten.roll(1)))
    assert list(failure_signs({"loss_d": 1.2})) == []


class Coded(nn.Module):
    """A sampler whose image of z as class y has the grey value z / 20, and y / 200 more in eval mode."""

    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.conditional, self.classes = classes > 0, classes

    def noise(self, n, generator, device):
        return torch.arange(n, dtype=torch.float32, device=device)[:, None] % 20

    def decode(self, z, labels=None):
        value = z[:, 0] / 20 + (0 if labels is None else labels / 200)
        return value.view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


NOTHING = torch.zeros(0, 1, 28, 28, dtype=torch.uint8)


@pytest.mark.parametrize("network", [Generator, ConditionalGenerator])
def test_the_noise_of_the_shown_samples_is_not_that_of_the_first_weights(network):
    torch.manual_seed(0)
    sampler = network()
    watch = Watch(sampler, NOTHING, seed=0, digits=False)
    z, weights = watch.z[:: watch.classes or 1].flatten(), next(sampler.parameters()).detach().flatten()
    n = min(len(z), len(weights))
    assert abs(torch.corrcoef(torch.stack([z[:n], weights[:n]]))[0, 1]) < 4 / n**0.5


def test_the_samples_that_choose_an_epoch_are_not_those_that_are_scored():
    sampler = Generator()
    watch = Watch(sampler, NOTHING, seed=3, digits=False)
    scored = sampler.noise(len(watch.z), torch.Generator().manual_seed(2**31 + 3))  # as in tests/test_evaluate.py
    assert not torch.equal(watch.z, scored)


def test_the_grid_of_a_conditional_generator_has_a_row_for_each_class_and_a_column_for_each_z():
    sampler = Coded(classes=10)
    watch = Watch(sampler, NOTHING, seed=0, digits=False)
    grid = watch.grid()[:, 0, 0, 0].view(10, 10)
    torch.testing.assert_close(grid, torch.arange(10)[None] / 20 + torch.arange(10)[:, None] / 200)
    plain = Watch(Coded(classes=0), NOTHING, seed=0, digits=False).grid()[:, 0, 0, 0]
    torch.testing.assert_close(plain, torch.arange(100) % 20 / 20)
    assert watch.validate() == {}


def test_the_picture_of_samples_has_at_most_a_hundred_classes():
    assert len(Watch(Coded(classes=1200), NOTHING, seed=0, digits=False).grid()) == 1000


def test_walks_lead_from_z_to_z_in_a_line_for_each_class_and_show_one_noise_as_all():
    grids = {name: images[..., 0, 0, 0] for name, images in walks(Coded(classes=10), seed=0).items()}
    i = torch.arange(10.0)
    torch.testing.assert_close(grids["same_noise"], i[:, None] / 20 + i / 200)
    torch.testing.assert_close(grids["interpolation"], (i[:, None] + 10 * i / 9) / 20 + i[:, None] / 200)


def test_each_sign_of_failure_is_a_warning(capsys):
    watch = Watch(Coded(classes=10), NOTHING, seed=0, digits=False)
    watch.reference = Namespace(read=lambda images: (None, torch.full((1000,), 7)))
    watch.warn({"loss_d": 0.001})
    assert capsys.readouterr().out.count("warning: ") == 3


@pytest.mark.parametrize("script", PAIRS)
def test_the_epoch_with_the_best_score_is_saved_and_each_is_looked_at(script, monkeypatch):
    scores, warned = iter([-2.0, -1.0, -3.0]), []
    monkeypatch.setattr(Watch, "validate", lambda self: {"val_log_likelihood": next(scores)})
    monkeypatch.setattr(Watch, "warn", lambda self, row: warned.append(row["epoch"]))
    PAIRS[script].main([*DIGITS, "--epochs", "3", "--batch-size", "1437", "--output-dir", "run"])
    assert load("run/best.pt")["epoch"] == 2
    assert warned == [1, 2, 3], "signs of failure are looked for after each epoch"


def test_the_validation_score_is_the_best_parzen_log_likelihood_of_ten_thousand_samples():
    images = torch.full((3, 1, 28, 28), 51, dtype=torch.uint8)  # 0.2; a twentieth of the samples are such images
    score = Watch(Coded(classes=0), images, seed=0, digits=False).validate()["val_log_likelihood"]
    assert score == pytest.approx(np.log(1 / 20) - 392 * np.log(2 * np.pi * 0.1**2), rel=1e-4)


@pytest.mark.parametrize("script", PAIRS)
def test_the_images_that_are_held_out_choose_the_epoch(script, monkeypatch):
    seen = []
    monkeypatch.setattr(Watch, "validate", lambda self: seen.append(self.validation_images) or {})
    PAIRS[script].main([*DIGITS, "--dry-run", "--val-size", "20"])
    assert torch.equal(seen[0], load_images("digits", "")[0][-20:] / 255)


def test_each_epoch_has_samples_of_the_ema_from_the_same_noise():
    flags = ["--batch-size", "1437", "--epochs", "2", "--lr", "0.005", "--ema", "0.5", "--output-dir", "run"]
    train_gan.main([*DIGITS, *flags])
    assert Image.open("run/samples.gif").n_frames == 2
    generator = Generator()
    generator.load_state_dict(load("run/checkpoint.pt")["state"]["ema"]["model"])
    images = generator(torch.rand(10_000, 100, generator=watched_generator(0)))[:100].detach()
    shown = np.asarray(Image.open("run/samples/epoch-0002.png"))[::2, ::2]
    expected = images.view(10, 10, 28, 28).transpose(1, 2).reshape(280, 280).mul(255).round()
    assert np.abs(shown - expected.numpy()).max() <= 1
