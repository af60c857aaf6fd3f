"""Losses, optimizers, schedules and the EMA: each flag has the effect that its help states."""

import argparse

import pytest
import torch
from helpers import DIGITS, load, train
from test_graph import sgd
from test_loop import fit, start, ten_images

import datasets
import train_cgan
import train_classifier
import train_gan
import train_likelihood
import utils
from engine import flags, optim
from engine.errors import UserError
from engine.optim import EMA, MaxoutSchedule
from models.vae import VAE


def test_ema_follows_its_formula():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema = EMA(model, decay=0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(12):
        for value in [*model.parameters(), model[1].running_mean]:
            torch.nn.init.normal_(value)
        model[1].num_batches_tracked += 3
        ema.update()
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    expected["1.num_batches_tracked"] = model[1].num_batches_tracked
    torch.testing.assert_close(dict(ema.model.state_dict()), expected)
    assert not ema.model.training


def test_a_tied_weight_is_averaged_once():
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    ema = EMA(torch.nn.Sequential(first, second), decay=0.5)
    before = first.weight.detach().clone()
    first.weight.data += 1
    ema.update()
    torch.testing.assert_close(ema.model[1].weight, before + 0.9)  # 1 - 1 / 10


def test_the_average_of_a_network_that_cannot_be_copied_is_one_line():
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(2, 2))
    for network in (layer, torch.nn.LazyLinear(2)):
        with pytest.raises(UserError, match=r"^--ema cannot copy the network: [^\n]*; omit --ema[^\n]*$"):
            EMA(network, 0.9)


def test_ema_follows_weights_and_buffers_that_a_step_replaces():
    layer = torch.nn.Linear(1, 1)
    layer.register_buffer("mean", torch.zeros(1))
    ema, before = EMA(layer, decay=0.5), layer.weight.detach().clone()
    layer.weight.data, layer.mean = layer.weight.data + 1, layer.mean + 1
    ema.update()
    torch.testing.assert_close(ema.model.weight.data, before + 0.9)  # d is 0.1 at first
    torch.testing.assert_close(ema.model.mean, torch.full((1,), 0.9))


def settings(schedule, optimizer, steps):
    """The learning rate and the momentum of each step."""
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        optimizer.step()
        schedule.step()


def test_the_maxout_schedule_is_the_papers():
    optimizer = sgd(0.1)
    rates, momenta = zip(*settings(MaxoutSchedule(optimizer, decay=1.01, epoch_length=4), optimizer, 1500))
    assert rates == pytest.approx([max(1e-6, 0.1 / 1.01**step) for step in range(1500)])
    assert momenta == pytest.approx([0.5 + 0.2 * min(1, step // 4 / 249) for step in range(1500)])  # once per epoch


def test_the_cosine_schedule_rises_for_a_tenth_and_ends_at_zero():
    args, optimizer = argparse.Namespace(epochs=10, schedule="cosine", optimizer="sgd"), sgd(2.0)
    rates, _ = zip(*settings(optim.build_schedule(args, optimizer, epoch_length=10), optimizer, 101))
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert list(rates[11:]) == sorted(rates[11:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_the_slides(smoothing):
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    args = argparse.Namespace(label_smoothing=smoothing, classes=list("0123456789"))
    t = train_classifier.target_probabilities(args, "cpu")[labels]
    z = logits.exp() / logits.exp().sum(1, keepdim=True)
    p = 1 / (1 + (-logits).exp())
    by_hand = {
        "cross-entropy": -(t * z.log()).sum(1).mean(),
        "bce": -(t * p.log() + (1 - t) * (1 - p).log()).sum(1).mean(),
        "mse": ((t - z) ** 2).mean(),
        "mae": (t - z).abs().mean(),
    }
    for name, loss in train_classifier.LOSSES.items():
        torch.testing.assert_close(loss(logits, t), by_hand[name])
    torch.testing.assert_close(
        train_classifier.LOSSES["cross-entropy"](logits, t),
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing),
    )


ADAM = {"betas": (0.4, 0.6), "eps": 0.1, "weight_decay": 0.2}
FLAGS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.3, "weight_decay": 0.2}),
    "adam": (torch.optim.Adam, {**ADAM, "decoupled_weight_decay": False}),
    "adamw": (torch.optim.AdamW, {**ADAM, "decoupled_weight_decay": True}),
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_an_optimizer_reaches_it(name):
    words = ["--lr", "0.7", "--momentum", "0.3", "--weight-decay", "0.2", "--betas", "0.4", "0.6", "--eps", "0.1"]
    args = train_classifier.get_args_parser().parse_args(["--optimizer", name, *words])
    optimizer = optim.build_optimizer(args, [torch.zeros(1, requires_grad=True)])
    kind, expected = FLAGS[name]
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    found = {key: tuple(group[key]) if key == "betas" else group[key] for key in ("lr", *expected)}
    assert found == {"lr": 0.7, **expected}


def test_the_ema_of_any_script_has_the_decay_of_its_flag():
    args, network = train_gan.get_args_parser().parse_args(["--ema", "0.7"]), torch.nn.Linear(1, 1)
    for state in (
        optim.training_state(args, network, sgd(), epoch_length=5),
        optim.adversarial_state(args, network, torch.nn.Linear(1, 1), epoch_length=5, decay=1.1),
    ):
        assert (state["ema"].source, state["ema"].decay) == (network, 0.7)


def test_weights_that_share_their_memory_are_both_averaged():
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    second.weight.data = first.weight.data
    ema, before = optim.EMA(torch.nn.Sequential(first, second), decay=0.5), first.weight.detach().clone()
    first.weight.data += 1  # of both
    ema.update()
    for layer in ema.model:
        torch.testing.assert_close(layer.weight.data, before + 0.9)


def test_a_layer_may_be_unfrozen_later(tmp_path):
    args = train_classifier.get_args_parser().parse_args(["--optimizer", "sgd", "--momentum", "0.9", "--lr", "1"])
    first, second = (torch.zeros(1, requires_grad=wanted) for wanted in (True, False))
    optimizer = optim.build_optimizer(args, [first, second])
    for expected in ([-1, 0], [-2.9, -1]):
        first.grad, second.grad = torch.ones(1), torch.ones(1) if second.requires_grad else None
        optimizer.step()
        assert [first.item(), second.item()] == pytest.approx(expected)
        second.requires_grad_()


def test_every_flag_changes_the_weights_and_max_norm_limits_the_norm_of_each_units_incoming_ones(tmp_path):
    flags = ["", "--augment", "--augment --elastic 3", "--label-smoothing 0.3", "--black 0", "--activation tanh"]
    flags += ["--batch-norm", "--loss mae", "--seed 1", "--max-norm 0.1"]
    found = []
    for i, words in enumerate(flags):
        train(*DIGITS, "--model", "mlp", "--dry-run", *words.split(), "--output-dir", tmp_path / str(i))
        found.append(load(tmp_path / str(i) / "checkpoint.pt")["state"]["model"]["linear1.weight"])
    assert torch.pdist(torch.stack(found).flatten(1)).min() > 0.01
    assert found[-1].norm(dim=1).max() <= 0.1001


@pytest.mark.parametrize("script", [train_classifier, train_gan, train_cgan, train_likelihood])
def test_the_seed_is_that_of_the_first_weights_and_of_the_order(script, monkeypatch):
    seeds = []
    monkeypatch.setattr(flags, "seed_all", seeds.append)
    monkeypatch.setattr(utils, "train", lambda run, step, batches, *_, **__: seeds.append(batches.seed))
    script.main([*DIGITS, "--seed", "3", "--dry-run"])
    assert seeds == [3, 3]


@pytest.mark.parametrize("how", ["dynamic", "fixed", "none"])
def test_pixels_are_sampled_black_or_white_at_each_visit_or_once_or_not(how, monkeypatch):
    grey, seen = torch.full((32, 1, 28, 28), 102, dtype=torch.uint8), []  # 0.4
    monkeypatch.setattr(datasets, "load", lambda *_: (grey, torch.zeros(32, dtype=torch.int64)))

    def loss(self, images):
        seen.extend([images.clone()] * self.training)
        return self.decoder[-1].bias.sum()

    monkeypatch.setattr(VAE, "loss", loss)
    train_likelihood.main([*DIGITS, "--hidden", "8", "--binarise", how, "--batch-size", "32", "--epochs", "2"])
    if how == "none":
        assert seen[0].unique().tolist() == pytest.approx([0.4])
        return
    assert seen[0].unique().tolist() == [0, 1]
    assert seen[0].mean() == pytest.approx(0.4, abs=0.02)  # not a threshold
    assert torch.equal(*(images.sum(0) for images in seen[-2:])) == (how == "fixed")


def train_with(tmp_path, make, **callbacks):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    name, schedule = make(optimizer)
    run = start(tmp_path / "run", {"layer": layer, "optimizer": optimizer, name: schedule}, epochs=4)
    utils.train(run, fit(layer, optimizer), ten_images(batch_size=2), **callbacks)
    return optimizer.param_groups[0]["lr"], schedule


@pytest.mark.parametrize(("name", "steps"), [("schedule", 20), ("epoch_schedule", 4)])
def test_a_schedule_advances_after_each_step_or_by_its_name_after_each_epoch(tmp_path, name, steps):
    _, schedule = train_with(tmp_path, lambda optimizer: (name, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)))
    assert schedule.last_epoch == load(tmp_path / "run" / "checkpoint.pt")["state"][name]["last_epoch"] == steps


def test_a_schedule_whose_numbers_look_like_epochs_is_named(tmp_path, capsys):
    train_with(tmp_path, lambda optimizer: ("schedule", torch.optim.lr_scheduler.StepLR(optimizer, 2)))
    unit = "its 2 counts steps, of 20"
    assert f'{unit}; if it should count epochs, put it into `state` as "epoch_sch' in capsys.readouterr().out


def test_a_schedule_with_too_few_steps_is_refused_before_the_first(tmp_path):
    make = lambda optimizer: ("cycle", torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5))  # noqa: E731
    with pytest.raises(UserError, match=r"cycle ends after 5 of 20 steps; give it total_steps=20; .*epoch_cycle"):
        train_with(tmp_path, make)


@pytest.mark.parametrize(("mode", "rate"), [("min", 1e-3), ("max", 1e-4)])
def test_a_plateau_is_seen_in_the_validation_loss_or_the_score(tmp_path, mode, rate):
    def make(optimizer):
        return "plateau", torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=2, threshold=0)

    values = iter(range(4, 0, -1))  # a loss that falls; as a score, no epoch after the first is the best
    lr, _ = train_with(tmp_path, make, validate=lambda: {"val_loss": next(values)}, score="val_loss")
    assert lr == pytest.approx(rate)
