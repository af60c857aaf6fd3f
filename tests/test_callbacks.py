"""What after_epoch and the loop's other callbacks may do."""

import pytest
import torch
from test_loop import fit, start, ten_images

import utils
from engine.device import seed_all
from engine.errors import UserError


def test_what_after_epoch_writes_into_the_row_stays_out_of_the_tables(tmp_path):
    for options in ({}, {"resume": str(tmp_path / "run"), "epochs": 3}):
        run = start(tmp_path / "run", {}, **options)
        utils.train(run, lambda *_: {"loss": 0.5}, ten_images(2), after_epoch=lambda row: row.update(note="unfroze"))
    assert len(run.history) == 3


def test_after_epoch_may_keep_a_value_of_another_type(tmp_path):
    run = start(tmp_path / "run", {"best": None})
    utils.train(
        run, lambda *_: {"loss": 0.5}, ten_images(2), after_epoch=lambda row: run.state.update(best=row["loss"])
    )
    assert run.state["best"] == 0.5


@pytest.mark.parametrize("edited", [False, True], ids=["same code", "another file of models/ was edited"])
def test_a_layer_that_after_epoch_unfroze_learns_in_a_resumed_run_too(tmp_path, monkeypatch, edited):
    monkeypatch.setattr("engine.run.warn_if_code_changed", lambda *_: edited)

    def train(epochs, **options):
        seed_all(0)
        network = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
        network[0].requires_grad_(False)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        state = {"network": network, "optimizer": optimizer}
        run = start(tmp_path / f"{len(options)}", state, epochs=epochs, **options)
        unfreeze = lambda row: row["epoch"] == 1 and network[0].requires_grad_()  # noqa: E731
        utils.train(run, fit(network, optimizer), ten_images(batch_size=2), after_epoch=unfreeze)
        return network[0].weight

    train(2, cuda_graph=True)
    whole, resumed = train(4), train(4, cuda_graph=True, resume=str(tmp_path / "1"))
    assert torch.equal(whole, resumed)


def test_what_after_epoch_rebuilds_is_refused(tmp_path):
    layer, late = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    run = start(tmp_path / "run", {"layer": layer, "late": late, "optimizer": optimizer})
    add = lambda row: optimizer.add_param_group({"params": late.parameters()})  # noqa: E731
    with pytest.raises(UserError, match=r"after_epoch changes the structure of optimizer, .*requires_grad_"):
        utils.train(run, fit(layer, optimizer), ten_images(batch_size=2), after_epoch=add)


@pytest.mark.parametrize("drop", [lambda state: state.update(schedule=None), lambda state: state.pop("schedule")])
def test_an_object_that_after_epoch_drops_is_named(tmp_path, drop):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    state = {"layer": layer, "optimizer": optimizer, "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 9)}
    run = start(tmp_path / "run", state)
    with pytest.raises(UserError, match="after_epoch changes the structure of schedule"):
        utils.train(run, fit(layer, optimizer), ten_images(batch_size=2), after_epoch=lambda row: drop(state))


def test_a_buffer_that_the_first_step_makes_is_refused(tmp_path):
    layer = torch.nn.Linear(1, 1)
    run = start(tmp_path / "run", {"layer": layer})
    with pytest.raises(UserError, match="train_step changes the structure of layer"):
        utils.train(run, lambda *_: layer.register_buffer("mean", torch.zeros(1)) or {}, ten_images(batch_size=2))


def test_a_run_of_tensors_alone_is_on_their_device(tmp_path):
    assert start(tmp_path / "run", {"weight": torch.zeros(1, device="meta")}).state["step"].device.type == "meta"


def test_a_buffer_that_grows_is_refused(tmp_path):
    layer = torch.nn.Linear(1, 1)
    layer.register_buffer("bank", torch.zeros(0, 1))

    def train_step(images, labels):
        layer.bank = torch.cat([layer.bank, images.flatten(1)])
        return {}

    with pytest.raises(UserError, match="train_step changes the structure of layer"):
        utils.train(start(tmp_path / "run", {"layer": layer}), train_step, ten_images(batch_size=2))


def test_a_layer_that_after_epoch_unfreezes_and_no_optimizer_holds_is_named_once(tmp_path, capsys):
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False).requires_grad_(False), torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(network[1].parameters(), lr=0.1)
    run = start(tmp_path / "run", {"network": network, "optimizer": optimizer}, epochs=3)
    unfreeze = lambda row: network[0].requires_grad_() and None  # noqa: E731
    utils.train(run, fit(network, optimizer), ten_images(batch_size=2), after_epoch=unfreeze)
    _, output = capsys.readouterr().out.split("epoch 1/3")
    assert output.count("warning: 1 weights are not trained: no optimizer holds network.0.weight\n") == 1


@pytest.mark.parametrize("callback", ["validate", "sample", "after_epoch"])
def test_each_callback_runs_in_eval_mode_and_the_next_step_in_each_layers_own_mode(tmp_path, callback):
    network, modes = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()), []
    network[0].eval()  # as a user may hold a layer's statistics fixed
    returned = {"validate": {}, "sample": torch.zeros(1, 1, 2, 2)}.get(callback)

    def note(result):
        modes.append([torch.is_grad_enabled(), *(layer.training for layer in network.modules())])
        return result

    run = start(tmp_path / "run", {"network": network})
    utils.train(run, lambda *_: note({}), ten_images(10), **{callback: lambda *_: note(returned)})
    assert modes == [[True, True, False, True], [False] * 4] * 2
