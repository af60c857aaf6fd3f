"""The values that evaluate.py gives, each against a second way to the same number or on a constructed case."""

import io
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KernelDensity

from engine.errors import UserError
from measures import reference as reference_module
from measures.classifier import classification_measures, plot_confusion, plot_mistakes, print_report
from measures.generator import (
    beside_real_images,
    class_measures,
    feature_distances,
    measure_images,
    nearest_images,
    neighbour_measures,
    require_enough,
)
from measures.likelihood import likelihood_measures
from measures.parzen import SIGMAS, parzen_log_likelihood, parzen_measures
from measures.reference import load_reference
from models.vae import VAE


def test_a_vaes_log_likelihood_is_the_same_whenever_it_is_measured():
    vae, images = VAE(), torch.zeros(3, 1, 28, 28)
    assert likelihood_measures(vae, images) == likelihood_measures(vae, images)


# Parzen ---------------------------------------------------------------------------------------------------------------
def test_parzen_is_scikit_learns_kernel_density_in_double():
    samples, images = torch.rand(50, 1, 4, 4), torch.rand(30, 1, 4, 4)
    ours = parzen_log_likelihood(samples, images, SIGMAS, block=7)
    assert ours.shape == (10, 30)
    assert ours.dtype == torch.float64
    assert pytest.approx(np.logspace(-1, 0, 10)) == SIGMAS  # the paper's ten widths
    for sigma, scores in zip(SIGMAS, ours):
        density = KernelDensity(bandwidth=sigma).fit(samples.flatten(1).double().numpy())
        assert scores.numpy() == pytest.approx(density.score_samples(images.flatten(1).double().numpy()), rel=1e-9)


def test_parzen_chooses_sigma_on_the_validation_images_and_scores_the_test_images():
    samples = torch.rand(40, 1, 4, 4)
    validation, test = samples[:20] + 1e-4, torch.rand(60, 1, 4, 4)
    measures = parzen_measures(samples, validation, test)
    assert measures["parzen_sigma"] == pytest.approx(0.1)  # the smallest: these images are the samples themselves
    scores = KernelDensity(bandwidth=0.1).fit(samples.flatten(1).numpy()).score_samples(test.flatten(1).numpy())
    assert measures["parzen_log_likelihood"] == pytest.approx(scores.mean(), rel=1e-5)
    assert measures["parzen_standard_error"] == pytest.approx(scores.std(ddof=1) / math.sqrt(60), rel=1e-5)


# Distances, neighbours and classes ------------------------------------------------------------------------------------
def test_fid_and_kid_are_their_formulas():
    """FID: the distance of two Gaussians. KID: unbiased MMD with the kernel (x y / d + 1)^3, here of all features."""
    a, b = torch.randn(500, 3).double(), torch.randn(500, 3).double() * torch.tensor([1.0, 2, 3]) + 1
    a_cov, b_cov = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(a_cov)
    root = vectors @ values.sqrt().diag() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b_cov @ root).sqrt().sum()
    fid = (a.mean(0) - b.mean(0)).square().sum() + a_cov.trace() + b_cov.trace() - 2 * trace
    aa, bb, ab = ((x @ y.T / 3 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    kid = sum((k.sum() - k.trace()) / (500 * 499) for k in (aa, bb)) - 2 * ab.mean()
    distances = feature_distances(a, b)
    assert distances == {"fid": pytest.approx(fid.item(), rel=1e-6), "kid": pytest.approx(kid.item(), rel=1e-5)}
    assert feature_distances(a, a)["fid"] == pytest.approx(0, abs=1e-6)


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
    assert len({round(value, 3) for value in by_hand.values()}) == 4  # no two could be mistaken for one another


def test_class_measures():
    assert class_measures(torch.arange(1000) % 10)["class_kl"] == pytest.approx(0, abs=1e-6)
    one = class_measures(torch.full((1000,), 3))
    assert one == {"class_histogram": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0], "class_kl": pytest.approx(math.log(10))}


def test_the_nearest_training_image_is_found_for_each_sample():
    images = torch.randint(0, 256, (30, 1, 28, 28), dtype=torch.uint8)
    chosen = torch.tensor([7, 0, 29, 7])
    samples = (images[chosen] / 255 + 0.05 * torch.randn(4, 1, 28, 28)).clamp(0, 1)
    assert torch.equal(nearest_images(samples, images), images[chosen] / 255)


class Reader:
    """Instead of the reference classifier: the digit is the first pixel times 10, and the features lie around it."""

    def read(self, images):
        digits = (images[:, 0, 0, 0] * 10).round().long() % 10
        return torch.stack([100.0 * digits, images[:, 0, 0, 1], images[:, 0, 0, 2]], 1), digits


def digits_like(labels, *, shown=None):
    """Images whose first pixel says `shown` (None: the label)."""
    images = torch.rand(len(labels), 1, 28, 28) * 0.9
    images[:, 0, 0, 0] = (labels if shown is None else shown) / 10
    return images


def test_the_class_measures_of_a_conditional_generator_that_fails_at_some_digits():
    """It shows a 2 when asked for a 1, and always the same 3."""
    test_labels, labels = torch.arange(200) % 10, torch.arange(400) % 10
    samples = digits_like(labels, shown=torch.where(labels == 1, 2, labels))
    samples[labels == 3] = samples[3].clone() + 1e-4 * torch.rand(40, 1, 28, 28)
    test_images = digits_like(test_labels)
    measures = measure_images(samples, labels, Reader(), (test_images[:50], test_images, test_labels))
    assert measures["conditional_accuracy"] == pytest.approx(0.9)
    assert measures["class_histogram"] == pytest.approx([0.1, 0, 0.2, *[0.1] * 7])
    coverage = measures["class_coverage"]
    assert coverage[1] == 0
    assert coverage[3] < 0.5
    assert min(coverage[:1] + coverage[2:3] + coverage[4:]) > 0.8


def test_the_real_column_is_of_training_images_that_choose_nothing():
    """Sixty training images: the first fifty are measured, the last ten choose sigma, the test images are compared."""
    labels = torch.arange(60) % 5
    train = (digits_like(labels) * 255).round().to(torch.uint8), labels
    test = (digits_like(labels) * 255).round().to(torch.uint8), labels
    samples = digits_like(torch.arange(80) % 5)
    train[0][50:] = (samples[:10] * 255).round().to(torch.uint8)  # the narrowest sigma is best for these alone
    measures = beside_real_images(samples, None, train, test, Reader(), of_digits=False)
    validation, test_images = train[0][50:] / 255, test[0] / 255
    assert measures["parzen_sigma"] == pytest.approx(0.1)
    for part, images in ((measures, samples), (measures["real"], train[0][:50] / 255)):
        expected = parzen_measures(images, validation, test_images)
        assert {name: part[name] for name in expected} == pytest.approx(expected)
        assert part["images"] == len(images)
        distances = feature_distances(Reader().read(images)[0], Reader().read(test_images)[0])
        assert part["fid"] == pytest.approx(distances["fid"])
        assert not {"class_histogram", "conditional_accuracy"} & part.keys()  # which only digits can be asked


def test_ten_thousand_real_images_are_measured_and_a_thousand_choose_sigma(monkeypatch):
    seen, train = [], torch.zeros(12_600, 1, 1, 1, dtype=torch.uint8)
    monkeypatch.setattr("measures.generator.measure_images", lambda *given: seen.append(given) or {})
    beside_real_images(torch.zeros(5, 1, 1, 1), None, (train, train), (train[:7], train[:7]), Reader())
    assert [(len(images), len(reference[0])) for images, _, _, reference, _ in seen] == [(5, 1000), (10_000, 1000)]


def test_a_class_of_too_few_images_has_no_coverage():
    labels = torch.arange(30) % 10  # three of each class
    images = digits_like(labels)
    measures = measure_images(images, labels, Reader(), (images, images, labels))
    assert measures["conditional_accuracy"] == 1
    assert "class_coverage" not in measures


@pytest.mark.parametrize(("train", "test", "few"), [(6, 6, "5 training"), (60, 5, "5 test")])
def test_too_few_images_are_refused(train, test, few):
    with pytest.raises(UserError, match=f"{few} images are too few to measure a generator; add images"):
        require_enough(torch.zeros(train), torch.zeros(test))
    require_enough(torch.zeros(8), torch.zeros(6))


# The reference classifier ---------------------------------------------------------------------------------------------
def test_features_are_the_last_convolutions_averaged_outputs():
    classifier, images = load_reference("cpu"), torch.rand(3, 1, 28, 28)
    features, digits = classifier.read(images, block=2)
    x = images * 2 - 1
    with torch.no_grad():
        for i in (1, 2, 3):
            x = getattr(classifier, f"bn{i}")(getattr(classifier, f"conv{i}")(x)).relu()
    assert torch.allclose(features, x.mean((2, 3)), atol=1e-5)
    assert torch.equal(digits, classifier.fc(x.flatten(1)).argmax(1))


def test_another_reference_classifier_and_pixels_outside_0_to_1_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"pixels from -1 to 1; the reference classifier takes .* in \[0, 1\]"):
        load_reference("cpu").read(torch.linspace(-1, 1, 784).view(1, 1, 28, 28))
    changed = bytearray(reference_module.WEIGHTS.read_bytes())
    changed[1000] ^= 1
    (tmp_path / "cnn.pt").write_bytes(changed)
    monkeypatch.setattr(reference_module, "WEIGHTS", tmp_path / "cnn.pt")
    with pytest.raises(UserError, match=r"cnn\.pt is missing, or not the file of this repository"):
        load_reference("cpu")


# Classifiers ----------------------------------------------------------------------------------------------------------
def test_a_classifiers_measures_agree_with_a_count_by_hand():
    logits, labels = torch.randn(500, 10), torch.randint(10, (500,))
    metrics = classification_measures(logits, labels)
    matrix, predictions = torch.tensor(metrics["confusion_matrix"]), logits.argmax(1)
    for true in range(10):
        for predicted in range(10):
            assert matrix[true, predicted] == ((labels == true) & (predictions == predicted)).sum()
    assert metrics["test_errors"] == 500 - matrix.diag().sum()
    assert metrics["test_accuracy"] == pytest.approx(1 - metrics["test_errors"] / 500)
    seven = metrics["per_class"]["7"]
    assert seven["recall"] == pytest.approx((matrix[7, 7] / matrix[7].sum()).item())
    assert seven["precision"] == pytest.approx((matrix[7, 7] / matrix[:, 7].sum()).item())
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    by_hand = -probabilities[torch.arange(500), labels].log().mean().item()  # L = -log Z_i
    assert metrics["test_loss"] == pytest.approx(by_hand)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mistakes_shown_are_the_most_confident_ones_in_order(channels):
    labels = torch.arange(50) % 10
    logits = torch.zeros(50, 10)
    logits[torch.arange(50), (labels + 1) % 10] = torch.arange(50) / 10  # each is wrong, each more confident
    logits[49, labels[49]] = 9  # and this one is right
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).repeat(1, channels, 28, 28)
    images[:, :-1] = 0  # of colours, all are blue
    axes = plot_mistakes(images, logits, labels).axes
    assert [int(axis.images[0].get_array()[0, 0].max()) for axis in axes] == list(range(48, 18, -1))
    confidence = logits[48].softmax(0).max()
    assert axes[0].get_title() == f"9 ({confidence:.0%})\ntrue 8"


def test_the_count_of_a_rare_class_differs_in_colour_from_its_cell():
    texts = plot_confusion([[40, 0], [1, 5]], ["3", "7"]).axes[0].texts
    colours = {text.get_text(): text.get_color() for text in texts}
    assert colours == {"40": "white", "0": "black", "1": "black", "5": "white"}


@pytest.mark.filterwarnings("error")  # as matplotlib gives for glyphs that its font lacks
def test_names_of_classes_are_shown_whatever_they_hold(capsys):
    names = ["$x", "a$\\frac$", "a class with quite a long name", "犬", "naïve", "3", "a\U0001f408"]
    logits, labels = torch.eye(7), torch.arange(7).roll(1)
    matrix, images = torch.arange(49).view(7, 7).tolist(), torch.zeros(7, 1, 28, 28, dtype=torch.uint8)
    figures = [plot_confusion(matrix, names), plot_mistakes(images, logits, labels, names)]
    for figure in figures:
        figure.savefig(io.BytesIO())  # an error if $ started a formula
    axis = figures[0].axes[0]
    assert axis.images[0].get_array().tolist() == matrix  # a row for each true class
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("Predicted label", "True label")
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert shown == ["\\$x", "a\\$\\frac\\$", "a class with quite …", "#3", "naïve", "3", "#6"]
    metrics = classification_measures(logits, labels, names)
    assert list(metrics["per_class"]) == names
    print_report(logits, labels, metrics, names)
    assert "in the plots: #3 is 犬, #6 is a\U0001f408\n" in capsys.readouterr().out
