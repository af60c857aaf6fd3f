"""benchmarks/maxout_ablation.py: what each case changes, and whole runs in short."""

import json

import pytest
import torch

import maxout_ablation
import train_classifier
from models import CLASSIFIERS
from models.maxout import MaxoutMLP, limit_column_norms


def test_each_network_differs_from_the_released_one_in_training_alone():
    torch.manual_seed(0)
    images, released = torch.rand(4, 1, 28, 28), MaxoutMLP()
    for network, _, _ in maxout_ablation.CASES.values():
        other = network()
        assert other.load_state_dict(released.state_dict()).missing_keys == []
        torch.testing.assert_close(other.eval()(images), released.eval()(images))


def test_cases_are_what_their_names_say():
    images = torch.ones(2000, 1, 28, 28)
    for network, mean in ((MaxoutMLP(), 0.8), (maxout_ablation.ScaledPixels(), 1.0)):
        seen = []
        network.maxout1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        network(images)
        assert seen[0].mean().item() == pytest.approx(mean, abs=0.01)
    network = maxout_ablation.NoLastDropout()
    assert not any(isinstance(layer, torch.nn.Dropout) for layer in network.fc)
    network = maxout_ablation.FreeLastLayer()
    for parameter in network.parameters():
        parameter.data.fill_(1.0)
    limit_column_norms(network, 1.9365)
    norms = [weight.norm(dim=1).max().item() for weight in network.parameters() if weight.dim() == 2]
    assert norms == pytest.approx([1.9365, 1.9365, 240**0.5])


def test_fixed_batches_come_in_another_order_in_each_epoch():
    images, labels = torch.zeros(50, 1, 28, 28, dtype=torch.uint8), torch.arange(50)
    batches = maxout_ablation.FixedBatches(images, labels, 10, "cpu")
    first, second = ([rows.tolist() for rows in batches.rows(epoch)] for epoch in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second) == [list(range(start, start + 10)) for start in range(0, 50, 10)]


def test_cases_are_recorded_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maxout_ablation, "RESULTS", tmp_path / "results.json")
    monkeypatch.setitem(CLASSIFIERS, "maxout", MaxoutMLP)
    monkeypatch.setattr(train_classifier, "Batches", train_classifier.Batches)
    cases = {name: maxout_ablation.CASES[name] for name in ("as released", "no norm limit")}
    for name, (network, batches, flags) in cases.items():
        cases[name] = (network, batches, [*flags, "--dataset", "digits", "--no-compile"])
    monkeypatch.setattr(maxout_ablation, "CASES", cases)
    flags = ["--epochs", "2", "--seeds", "1", "--output-dir", str(tmp_path / "runs")]
    maxout_ablation.main(flags)
    assert not (tmp_path / "results.json").exists()
    maxout_ablation.main([*flags, "--record"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == set(cases)
    assert len(results["no norm limit"]["test_errors"]) == 1
    maxout_ablation.main([*flags, "--only", "no norm limit", "--record"])
    assert "run already finished at epoch 2" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "results.json").read_text())["no norm limit"]["test_errors"]
        == (results["no norm limit"]["test_errors"])
    )
