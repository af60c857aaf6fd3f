"""benchmarks/shifts.py: the nine views of an image, and the errors for one, five and nine of them."""

import torch
from helpers import ROOT, run

import shifts
from datasets import load
from engine.checkpoint import load_checkpoint
from evaluate import classify, load_model
from photos import to_pixels


def test_views_are_the_image_and_its_eight_neighbours():
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 10, 20] = 1
    seen = [shifts.shift(image, dx, dy)[0, 0].nonzero().tolist() for dx, dy in shifts.SHIFTS]
    assert seen == [[[10 + dy, 20 + dx]] for dx, dy in shifts.SHIFTS]
    assert sorted(shifts.SHIFTS) == [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    distances = [abs(dx) + abs(dy) for dx, dy in shifts.SHIFTS]
    assert distances == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    border = torch.ones(1, 1, 28, 28)
    assert shifts.shift(border, 1, -1).sum() == 27 * 27


def test_errors_count_the_mean_of_the_views():
    model = load_model(ROOT / "weights" / "mlp.pt")
    images, labels = load("digits", "")
    images, labels = to_pixels(images[:300]), labels[:300]
    probabilities = [classify(model, shifts.shift(images, *each)) for each in shifts.SHIFTS]
    expected = [(sum(probabilities[:n]).argmax(1) != labels).sum().item() for n in (1, 5, 9)]
    assert shifts.count_errors(model, images, labels) == expected
    assert expected[0] == (classify(model, images).argmax(1) != labels).sum() > 0


def test_every_run_and_the_mean_are_printed(data_dir, tmp_path):
    weights = ROOT / "weights" / "mlp.pt"
    output, _ = run("benchmarks/shifts.py", weights, weights, "--data-dir", data_dir, cwd=tmp_path)
    title, first, second, mean = output.splitlines()
    assert title == "errors in 10000 images, with 1, 5 and 9 views"
    assert first == second
    errors = load_checkpoint(weights)["measured"]["test_errors"]
    assert first.split()[0] == str(errors)
    assert first.endswith(f" {weights}")
    assert mean.split() == [*(f"{float(count):.1f}" for count in first.split()[:3]), "mean"]
