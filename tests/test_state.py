"""What a step may keep, and what is detected if a resumed run would lose it."""

import random
from collections import OrderedDict, deque
from itertools import count

import numpy as np
import pytest
import torch
from helpers import assert_one_line
from test_loop import fit, start, ten_images

import utils
from engine.device import seed_all
from engine.errors import UserError
from engine.recorder import prepare
from engine.state import restored, saved


class Own(torch.Tensor):
    """A subclass, as torchvision has some."""


# How much noise a step adds to its images, from `state` or from `own`, which `state` holds; and how that begins.
KEPT = {
    "a generator": (lambda state, own: torch.rand((), generator=own), lambda: torch.Generator().manual_seed(3)),
    "a tensor": (lambda state, own: own.mul_(0.9).clone(), lambda: torch.tensor(1.0)),
    "a plain value": (lambda state, own: state.update(own=state["own"] + 1) or 1 / state["own"], lambda: 0),
    "a list": (lambda state, own: own.append(len(own)) or 1 / len(own), lambda: [1]),
    "a dict": (lambda state, own: own.update(n=own["n"] + 1) or 1 / own["n"], lambda: {"n": 1}),
    "an ordered dict": (lambda state, own: own.update(n=own["n"] + 1) or 1 / own["n"], lambda: OrderedDict(n=1)),
    "an expanded tensor": (lambda state, own: own.sum(), lambda: torch.ones(1).expand(3)),
    "a dict of pairs": (lambda state, own: own.update({(0, 1): own[0, 1] + 1}) or 1 / own[0, 1], lambda: {(0, 1): 1}),
    "a dict of tensors": (lambda state, own: own["mean"].mul_(0.9).sum(), lambda: {"mean": torch.ones(2)}),
    "a number beside a tensor": (lambda state, own: own.update(n=own["n"] + 1) or own["mean"].sum() / own["n"],
                                 lambda: {"n": 1, "mean": torch.ones(2)}),
    "tensors that it collects": (lambda state, own: own.append(0.1 * own[-1]) or sum(own), lambda: [torch.ones(())]),
    "a tensor that it replaces": (lambda state, own: state.update(own=state["own"] * 0.9) or state["own"],
                                  lambda: torch.ones(())),
    "a tensor that becomes a fraction": (lambda state, own: state.update(own=state["own"] * 0.9) or state["own"],
                                         lambda: torch.tensor(1)),
    "a number that becomes a tensor": (lambda state, own: state.update(own=state["own"] * torch.tensor(0.9)) or
                                       state["own"], lambda: 1),
    "a number that becomes a fraction": (lambda state, own: state.update(own=state["own"] / 2) or state["own"],
                                         lambda: 1),
    "a value that it adds": (lambda state, own: state.update(mean=0.9 * state.get("mean", 1)) or state["mean"],
                             lambda: None),
    "constants": (lambda state, own: torch.tensor(0.5) * torch.tensor(0.1), lambda: None),
    "the step number": (lambda state, own: 1 / (1 + state["step"]), lambda: None),
    "numpy's random numbers": (lambda state, own: np.random.rand(), lambda: None),
    "Python's random numbers": (lambda state, own: random.random(), lambda: None),
}  # fmt: skip


def train_with_noise(folder, name, seed, **options):
    """Returns the loss of each report, and the run."""
    noise_of, make = KEPT[name]
    seed_all(0)
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    own = make()
    state = {"layer": layer, "optimizer": optimizer, "own": own}
    run = start(folder, state, log_interval=1, **options)
    step = fit(layer, optimizer)
    seed_all(seed)
    utils.train(run, lambda images, labels: step(images + noise_of(state, own), labels), ten_images(batch_size=2))
    return [row["loss"] for row in run.curve], run


@pytest.mark.parametrize("name", KEPT)
def test_what_state_holds_continues_exactly_and_without_a_warning(tmp_path, capsys, name):
    whole, _ = train_with_noise(tmp_path / "whole", name, seed=5, epochs=3)
    train_with_noise(tmp_path / "run", name, seed=5, epochs=1)
    resumed, run = train_with_noise(tmp_path / "run", name, seed=6, epochs=3, resume=str(tmp_path / "run"))
    assert resumed == whole
    assert run.state["step"] == 15
    assert "warning" not in capsys.readouterr().out


def test_lists_and_dicts_within_others_are_restored_in_place_too():
    inner, tensor = {"n": 1}, torch.zeros(2)
    restored({"a": [inner, tensor]}, {"a": [{"n": 2}, torch.ones(2), 3]}, torch.device("cpu"))
    assert (inner, tensor.tolist()) == ({"n": 2}, [1, 1])


def test_tensors_that_a_step_made_come_back_on_the_device():
    one, device = torch.ones(1), torch.device("meta")
    content = restored({"list": [], "tuple": (0,)}, {"list": [one], "tuple": (one,), "new": one}, device)
    assert {content["list"][0].device, content["tuple"][0].device, content["new"].device} == {device}


def test_a_generator_of_another_kind_of_device_starts_anew():
    own = torch.Generator().manual_seed(3)
    restored(own, torch.zeros(16, dtype=torch.uint8), torch.device("cpu"))  # CUDA's state is this long
    assert own.initial_seed() == 3


@pytest.mark.parametrize(
    ("item", "part"),
    [(object(), "a object"), (np.random.default_rng(0), "a Generator"), ({1, 2}, "a set"),
     (deque([1]), "a deque"), ([torch.nn.Linear(1, 1)], "a list that holds a Linear"), (np.float64(0.5), "a float64"),
     ({np.int64(3): 1}, "a dict that holds a int64"), (torch.ones(1).as_subclass(Own), "a Own")],
)  # fmt: skip
def test_what_cannot_be_saved_is_named_before_the_first_step(tmp_path, item, part):
    with pytest.raises(UserError) as caught:
        start(tmp_path / "run", {"own": item})
    assert_one_line(f"{caught.value}\n", "state['own']", part, "state_dict()")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "owner"), [("step", "the loop's"), ("ema", "what evaluate.py measures")])
def test_a_name_with_a_meaning_is_no_other_items(tmp_path, name, owner):
    with pytest.raises(UserError, match=rf'state\["{name}"\] is {owner}, .*use another name'):
        start(tmp_path / "run", {name: torch.zeros(())})


LACKING = {  # what a step adds to its images from `own`, which it keeps outside `state`; and what is said of it
    "a counter": (lambda own, layer: next(own["count"]) / 10, "gets the number 0.2, then 0.3"),
    "a tensor": (lambda own, layer: own["average"].lerp_(layer.weight.detach(), 0.1),
                 "updates a tensor [1, 1] that `state` lacks"),
    "a number in a tensor": (lambda own, layer: torch.tensor(next(own["count"]) / 10), "gets the number 0.2"),
    "numbers in a tensor": (lambda own, layer: torch.tensor([next(own["count"])] * 5).sum(), "gets other values"),
    "a new tensor": (lambda own, layer: own.update(sigma=own["sigma"] * 0.9) or own["sigma"],
                     "reads a tensor that was replaced"),
    "a generator": (lambda own, layer: torch.rand((), generator=own["generator"]),
                    "uses a torch.Generator that `state` lacks"),
    "every third step": (lambda own, layer: layer.weight.detach() * 0 if next(own["count"]) % 3 else 0,
                         "does not do the same in every step"),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_what_a_resumed_run_would_not_continue_is_named_with_its_line(tmp_path, capsys, name):
    noise_of, part = LACKING[name]
    own = {"count": count(1), "average": torch.zeros(1, 1), "sigma": torch.ones(()), "generator": torch.Generator()}
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    step = fit(layer, optimizer)

    def train_step(images, labels):
        return step(images + noise_of(own, layer), labels)

    utils.train(start(tmp_path / "run", {"layer": layer, "optimizer": optimizer}), train_step, ten_images(batch_size=2))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "warning: a resumed run would not continue exactly: tests/test_state.py:" in line
    assert part in line


UPDATES = {  # how a step updates the weights when it has been called i times
    "every third time": lambda optimizer, i: i % 3 or optimizer.step(),
    "at its own rate": lambda optimizer, i: optimizer.param_groups[0].update(lr=0.1 / i) or optimizer.step(),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_that_a_resumed_run_would_not_continue_are_named(tmp_path, capsys, name):
    layer, calls = torch.nn.Linear(1, 1), count(1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def train_step(images, labels):
        optimizer.zero_grad()
        layer(images.flatten(1)).mean().backward()
        UPDATES[name](optimizer, next(calls))
        return {}

    utils.train(start(tmp_path / "run", {"layer": layer, "optimizer": optimizer}), train_step, ten_images(batch_size=2))
    assert "would not continue exactly: tests/test_state.py:" in capsys.readouterr().out


def test_a_learning_rate_that_is_a_tensor_of_the_users_remains_that_tensor():
    layer, rate = torch.nn.Linear(1, 1), torch.tensor(0.1)
    optimizer = torch.optim.Adam(layer.parameters(), rate, fused=True)
    prepare(optimizer, torch.device("cpu"))
    before = saved("optimizer", optimizer)
    rate.fill_(0.2)
    restored(optimizer, before, torch.device("cpu"))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.1


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_matrices_and_an_optimizer_that_changes_its_formula_train_without_a_warning(tmp_path, capsys, layout):
    layer, matrix = torch.nn.Linear(1, 1), torch.ones(2, 2).to_sparse(layout=layout)
    optimizer = torch.optim.RAdam(layer.parameters(), lr=0.1)
    step = fit(layer, optimizer)

    def train_step(images, labels):
        return step((matrix @ images.flatten(1)).view_as(images), labels)

    utils.train(start(tmp_path / "run", {"layer": layer, "optimizer": optimizer}), train_step, ten_images(batch_size=2))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("zeroed", ["never", "first", "last"])
def test_gradients_accumulated_across_steps_are_named_and_within_a_step_they_are_fine(tmp_path, capsys, zeroed):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def train_step(images, labels):
        if zeroed == "first":
            optimizer.zero_grad(set_to_none=False)
        for part in images.flatten(1).chunk(2):
            layer(part).mean().backward()
        if zeroed == "last":
            optimizer.zero_grad(set_to_none=False)
        return {}

    utils.train(start(tmp_path / "run", {"layer": layer, "optimizer": optimizer}), train_step, ten_images(batch_size=2))
    assert ("adds to the gradient of layer." in capsys.readouterr().out) == (zeroed == "never")


def test_a_scheduled_rate_and_a_gradient_scaler_are_saved_without_a_warning(tmp_path, capsys):
    def train(epochs, **options):
        seed_all(0)
        layer, scaler = torch.nn.Linear(1, 1), torch.amp.GradScaler("cpu")
        optimizer = torch.optim.Adam(layer.parameters(), torch.tensor(0.1), fused=True)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7])

        def train_step(images, labels):
            loss = (layer(images.flatten(1)) - 0.3).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return {}

        state = {"layer": layer, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
        run = start(tmp_path / f"{len(options)}", state, epochs=epochs, **options)
        utils.train(run, train_step, ten_images(batch_size=2))
        return layer.weight

    train(1, cuda_graph=True)
    whole, resumed = train(2), train(2, cuda_graph=True, resume=str(tmp_path / "1"))
    assert torch.equal(whole, resumed)
    assert "warning" not in capsys.readouterr().out


def test_weights_and_buffers_that_a_step_replaces_get_no_warning(tmp_path, capsys):
    layer = torch.nn.Linear(1, 1)
    layer.register_buffer("mean", torch.zeros(1))

    def train_step(images, labels):
        layer.mean = 0.9 * layer.mean + 0.1 * images.mean((0, 2, 3))
        loss = (layer(images.flatten(1)) - layer.mean).square().mean()
        for weight, gradient in zip(layer.parameters(), torch.autograd.grad(loss, [*layer.parameters()])):
            weight.data = weight.data - 0.1 * gradient
        return {}

    utils.train(start(tmp_path / "run", {"layer": layer}), train_step, ten_images(batch_size=2))
    assert "warning" not in capsys.readouterr().out


def test_a_schedule_that_state_lacks_is_named(tmp_path, capsys):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    state = {"layer": layer, "optimizer": optimizer}
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    start(tmp_path / "run", {**state})
    assert "warning: optimizer has a schedule that `state` lacks; add it" in capsys.readouterr().out
    start(tmp_path / "other", {**state, "schedule": schedule})
    assert "warning" not in capsys.readouterr().out


def test_a_step_that_reads_values_or_trains_with_a_schedule_gets_no_warning(tmp_path, capsys):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = fit(layer, optimizer)

    def train_step(images, labels):
        loss = step(images, labels)["loss"].item()
        return {"loss": loss, "lr": schedule.get_last_lr()[0]}

    state = {"layer": layer, "optimizer": optimizer, "schedule": schedule}
    utils.train(start(tmp_path / "run", state), train_step, ten_images(batch_size=2))
    assert "warning" not in capsys.readouterr().out


def test_an_optimizer_whose_weights_state_lacks_is_refused(tmp_path):
    body, head = torch.nn.Linear(1, 4), torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    with pytest.raises(UserError, match=r"optimizer updates 2 weights that `state` lacks \(\[2, 4\], \[2\]\); add the"):
        start(tmp_path / "run", {"body": body, "optimizer": optimizer})


def test_an_optimizer_that_state_lacks_is_refused_at_its_first_step(tmp_path):
    layer = torch.nn.Linear(1, 1)
    run = start(tmp_path / "run", {"layer": layer})
    step = fit(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"train_step uses an optimizer \(SGD\) that `state` lacks; add it"):
        utils.train(run, step, ten_images(batch_size=2))
    step(*ten_images(batch_size=2).take(torch.arange(2)))  # the check ends with the training


@pytest.mark.parametrize(
    ("held", "train_step", "warning"),
    [
        ("weight", lambda *_: {}, "optimizer trains nothing: in the first step, its weights"),
        ("bias", None, "1 weights are not trained: no optimizer holds layer.weight\n"),
    ],
)
def test_weights_that_are_not_trained_are_named(tmp_path, capsys, held, train_step, warning):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD([getattr(layer, held)], lr=0.1)
    run = start(tmp_path / "run", {"layer": layer, "optimizer": optimizer})
    utils.train(run, train_step or fit(layer, optimizer), ten_images(batch_size=2))
    assert capsys.readouterr().out.count(f"warning: {warning}") == 1
