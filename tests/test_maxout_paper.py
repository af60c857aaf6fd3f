"""benchmarks/maxout_paper.py: the second stage of the Maxout paper."""

import copy

import pytest
import torch
from helpers import DIGITS, load, same, train

import maxout_paper
from datasets import Batches
from datasets import load as load_images
from engine.errors import UserError
from models.maxout import MaxoutMLP


def second(*flags):
    maxout_paper.main([*DIGITS, *map(str, flags)])


@pytest.fixture
def first(tmp_path):
    """The run folder of a first stage of one epoch: 1,300 images in 13 steps."""
    train(*DIGITS, "--recipe", "paper", "--epochs", 1, "--output-dir", "first")
    return tmp_path / "first"


def test_it_continues_from_the_best_epoch_with_its_learning_rate_and_momentum_on_all_images(first, tmp_path):
    second("--first-stage", "first", "--epochs", 1, "--output-dir", "second")
    stages = [load(tmp_path / folder / "checkpoint.pt")["state"] for folder in ("first", "second")]
    groups = [state["optimizer"]["param_groups"][0] for state in stages]
    reached = {"lr": 0.1 / 1.000004**13, "momentum": 0.5 + 0.2 / 249}
    assert {name: groups[0][name] for name in reached} == pytest.approx(reached, rel=1e-9)
    assert stages[1]["schedule"]["last_epoch"] == 15  # 1,437 images: 15 steps
    assert groups[1]["lr"] == pytest.approx(reached["lr"] / 1.000004**15, rel=1e-9)
    assert groups[1]["momentum"] == pytest.approx(reached["momentum"], rel=1e-9)  # it no longer rises


def test_its_ema_begins_with_the_first_stages_weights(first, monkeypatch):
    seen = []
    monkeypatch.setattr(maxout_paper, "loss_with_dropout", lambda network, _: seen.append(copy.deepcopy(network)) or 9)
    second("--first-stage", "first", "--epochs", 1, "--ema", 0.9, "--output-dir", "second")
    assert same(seen[0].state_dict(), load(first / "best.pt")["state"]["model"])


def test_it_ends_when_the_validation_split_is_learned_as_well_and_resumes(first, tmp_path, monkeypatch):
    losses = iter([1.5, 1.7, 1.6, 1.4])  # the first stage's, then one for each epoch
    monkeypatch.setattr(maxout_paper, "loss_with_dropout", lambda *_: next(losses))
    second("--first-stage", "first", "--epochs", 9, "--output-dir", "whole")
    whole = load(tmp_path / "whole" / "checkpoint.pt")
    assert [row["val_loss_with_dropout"] for row in whole["history"]] == [1.7, 1.6, 1.4]
    assert not (tmp_path / "whole" / "best.pt").exists()  # the last epoch is the result

    losses = iter([1.5, 1.7, 1.6, 1.4])
    second("--first-stage", "first", "--epochs", 1, "--output-dir", "run")
    first.rename(tmp_path / "moved")
    maxout_paper.main(["--resume", "run", "--epochs", "9"])
    assert same(load(tmp_path / "run" / "checkpoint.pt")["state"], whole["state"])


def test_the_loss_that_ends_it_has_dropout_and_leaves_the_network_as_it_was():
    batches = Batches(*load_images("digits", ""), 500, "cpu", black=0.0, shuffle=False)  # the last one is shorter
    images, labels = batches.take(torch.arange(1437))
    network = MaxoutMLP().eval()
    for parameter in network.parameters():
        parameter.data *= 20
    without = torch.nn.functional.cross_entropy(network(images), labels).item()
    assert maxout_paper.loss_with_dropout(network, batches) > 1.1 * without
    assert not network.training


def test_other_options_than_the_first_stages_are_refused(first):
    for flag, value, name in (
        ("--batch-size", 50, "batch_size"),
        ("--model", "mlp", "model"),
        ("--black", -1, "black"),
    ):
        with pytest.raises(UserError, match=f"another {name}"):
            second("--first-stage", "first", flag, value)
    train(*DIGITS, "--recipe", "paper", "--schedule", "constant", "--epochs", 1, "--output-dir", "other")
    with pytest.raises(UserError, match="other is not a first stage"):
        second("--first-stage", "other", "--schedule", "constant")
    with pytest.raises(
        UserError, match=r"first is a run of train_classifier\.py, .*; resume it with: .*train_classifier\.py"
    ):
        maxout_paper.main(["--resume", "first"])
