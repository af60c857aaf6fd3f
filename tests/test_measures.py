"""The figures that evaluate.py gives generators, each against a second way to the same number."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from measures.judge import load_judge
from sklearn.neighbors import KernelDensity

from datasets import load
from measures import judge as judge_module
from measures.generator import class_measures, feature_distances, neighbour_measures
from measures.parzen import SIGMAS, parzen_log_likelihood, parzen_measures


def test_parzen_is_scikit_learns_kernel_density():
    samples, images = torch.rand(50, 1, 4, 4).double(), torch.rand(30, 1, 4, 4).double()
    ours = parzen_log_likelihood(samples, images, SIGMAS, block=7)
    assert ours.shape == (10, 30)
    for sigma, scores in zip(SIGMAS, ours):
        density = KernelDensity(bandwidth=sigma).fit(samples.flatten(1).numpy())
        assert scores.numpy() == pytest.approx(density.score_samples(images.flatten(1).numpy()), rel=1e-9)


def test_parzen_chooses_sigma_on_the_validation_images_and_scores_the_test_images():
    samples = torch.rand(40, 1, 4, 4)
    validation, test = samples[:20] + 1e-4, torch.rand(60, 1, 4, 4)
    measures = parzen_measures(samples, validation, test)
    assert measures["parzen_sigma"] == pytest.approx(0.1)  # the smallest: these images are the samples themselves
    scores = KernelDensity(bandwidth=0.1).fit(samples.flatten(1).numpy()).score_samples(test.flatten(1).numpy())
    assert measures["parzen_log_likelihood"] == pytest.approx(scores.mean(), rel=1e-5)
    assert measures["parzen_standard_error"] == pytest.approx(scores.std(ddof=1) / math.sqrt(60), rel=1e-5)


def test_the_papers_ten_widths():
    assert pytest.approx(np.logspace(-1, 0, 10)) == SIGMAS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_by_ten_thousand_needs_less_than_a_gigabyte():
    code = """
import torch
from measures.parzen import parzen_measures
def peak():  # in KiB; not getrusage, which counts what the process was forked from
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
images = torch.rand(10_000, 1, 28, 28)
parzen_measures(images, images[:1000], images)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1e9


def test_a_set_is_at_no_distance_from_itself():
    features = torch.randn(2000, 16)
    distances = feature_distances(features, features)
    assert distances["fid"] == pytest.approx(0, abs=1e-6)
    assert abs(distances["kid"]) < 0.02


def test_fid_is_the_formula_for_two_gaussians():
    a, b = torch.randn(500, 3).double(), torch.randn(700, 3).double() * torch.tensor([1.0, 2, 3]) + 1
    a_cov, b_cov = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(a_cov)
    root = vectors @ values.sqrt().diag() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b_cov @ root).sqrt().sum()
    by_hand = (a.mean(0) - b.mean(0)).square().sum() + a_cov.trace() + b_cov.trace() - 2 * trace
    assert feature_distances(a, b)["fid"] == pytest.approx(by_hand.item(), rel=1e-6)


def test_fid_and_kid_grow_with_the_difference():
    real = torch.randn(1000, 8)
    near = feature_distances(torch.randn(1000, 8) + 0.1, real)
    far = feature_distances(torch.randn(1000, 8) + 1, real)
    assert near["fid"] < far["fid"]
    assert near["kid"] < far["kid"]


def test_neighbour_measures_by_brute_force():
    real, fake = torch.randn(60, 2), torch.randn(80, 2) * 0.5 + 0.5

    def radius(points):  # distance to the 5th nearest other point
        return torch.cdist(points, points).sort(dim=1).values[:, 5]

    distances = torch.cdist(real, fake)
    inside = distances < radius(real)[:, None]
    by_hand = {
        "precision": inside.any(0).float().mean().item(),
        "recall": (distances < radius(fake)).any(1).float().mean().item(),
        "density": inside.sum().item() / (5 * len(fake)),
        "coverage": inside.any(1).float().mean().item(),
    }
    assert neighbour_measures(fake, real) == pytest.approx(by_hand)


def test_a_generator_that_draws_one_image_covers_nothing():
    real = torch.randn(500, 4)
    measures = neighbour_measures(real[:1] + 1e-3 * torch.randn(500, 4), real)
    assert measures["precision"] == 1
    assert measures["coverage"] < 0.05
    assert measures["recall"] < 0.05


def test_class_measures():
    even = class_measures(torch.arange(1000) % 10)
    assert even["class_histogram"] == pytest.approx([0.1] * 10)
    assert even["class_kl"] == pytest.approx(0, abs=1e-6)
    one = class_measures(torch.full((1000,), 3))
    assert one["class_histogram"] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert one["class_kl"] == pytest.approx(math.log(10))


def test_the_judge_reads_at_least_99_4_percent_of_the_test_images(data_dir):
    images, labels = load("mnist", data_dir, train=False)
    features, digits = load_judge("cpu").read(images / 255)
    assert features.shape == (10_000, 256)
    assert (digits == labels).double().mean() >= 0.994
    assert judge_module.WEIGHTS.stat().st_size < 2_000_000


def test_features_are_the_last_convolutions_averaged_outputs():
    judge = load_judge("cpu")
    images = torch.rand(3, 1, 28, 28)
    features, digits = judge.read(images, block=2)
    x = images * 2 - 1
    with torch.no_grad():
        for i in (1, 2, 3):
            x = getattr(judge, f"bn{i}")(getattr(judge, f"conv{i}")(x)).relu()
    assert torch.allclose(features, x.mean((2, 3)), atol=1e-5)
    assert torch.equal(digits, judge.fc(x.flatten(1)).argmax(1))


def test_the_judge_reads_on_its_own_device():
    """Here the meta device, which takes the images from the CPU but has no results to copy back."""
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        load_judge("meta").read(torch.zeros(1, 1, 28, 28))


def test_the_judge_gives_features_and_logits():
    features, logits = load_judge("cpu")(torch.rand(3, 1, 28, 28))
    assert features.shape == (3, 256)
    assert logits.shape == (3, 10)


@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: 2 * x - 1, lambda x: x + 1e-3])
def test_the_judge_refuses_pixels_outside_0_to_1(change):
    judge = load_judge("cpu")
    images = torch.linspace(0, 1, 784).view(1, 1, 28, 28)
    assert judge.read(images)[0].shape == (1, 256)
    with pytest.raises(ValueError, match=r"the judge reads images with pixels in \[0, 1\]"):
        judge.read(change(images))
    with pytest.raises(ValueError, match=r"pixels from 0 to 255"):
        judge.read(255 * images)


def test_parzen_is_computed_in_double():
    samples, images = torch.rand(300, 1, 28, 28), torch.rand(20, 1, 28, 28)
    densities = parzen_log_likelihood(samples, images, SIGMAS)
    assert densities.dtype == torch.float64
    assert torch.equal(densities, parzen_log_likelihood(samples.double(), images.double(), SIGMAS))


def test_another_judge_is_refused(tmp_path, monkeypatch):
    changed = bytearray(judge_module.WEIGHTS.read_bytes())
    changed[1000] ^= 1
    (tmp_path / "cnn.pt").write_bytes(changed)
    monkeypatch.setattr(judge_module, "WEIGHTS", tmp_path / "cnn.pt")
    with pytest.raises(OSError, match="is not the judge"):
        load_judge("cpu")
