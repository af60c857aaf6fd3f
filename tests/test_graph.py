"""The captured step as a CUDA graph, on the CPU: replayed, compared, captured again, refused."""

import contextlib
import random
import re
from argparse import Namespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from test_loop import Position, start, ten_images

import utils
from engine import captured
from engine.captured import COMPARED, CapturedStep
from engine.errors import UserError
from engine.recorder import NotCapturable, Recorder, address_of, prepare
from engine.run import Run


class FakeGraph:
    """Repeats the function that was captured. Capturing, as on CUDA, executes nothing: what it did is undone."""

    captures, replays = 0, 0

    def replay(self):
        FakeGraph.replays += 1
        self.step()


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA's graphs on the CPU. A step under test is `position.steps += 1` and whatever it writes down."""
    FakeGraph.captures, FakeGraph.replays = 0, 0

    def graph_of(graphed, position):
        @contextlib.contextmanager
        def graph(fake):
            before = position.steps.clone()
            yield
            position.steps.copy_(before)
            fake.step = lambda: graphed.step(*graphed.inputs)
            FakeGraph.captures += 1

        return graph

    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return lambda graphed, position: monkeypatch.setattr(torch.cuda, "graph", graph_of(graphed, position))


def captured_step(step, state, device="cpu", begun=True, compiled=False, graph=False):
    """As in the middle of an epoch. begun: whether the run has made a step."""
    run, run.state, run.begun, run.batch = object.__new__(Run), state, begun, 1
    run.args, run.device = Namespace(products="torch"), lambda: torch.device(device)
    return CapturedStep(step, run, 2, compiled=compiled, graph=graph)


def graphed_counter(fake_cuda, optimizer, begun=False):
    position, seen = Position(), []

    def step(rows):
        position.steps += 1
        seen.append(rows.clone())

    graphed = captured_step(step, {"optimizer": optimizer, "position": position}, begun=begun, graph=True)
    fake_cuda(graphed, position)
    return graphed, position, seen


def call(graphed, times):
    for _ in range(times):
        graphed(torch.zeros(2, dtype=torch.int64))


def sgd(lr=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.5)


@pytest.mark.parametrize("begun", [False, True])
def test_every_call_is_one_step_on_its_own_rows_and_all_but_a_runs_first_are_replays(fake_cuda, begun):
    """A short last batch, here number 10, runs eagerly."""
    graphed, position, seen = graphed_counter(fake_cuda, sgd(), begun)
    batches = [[i] * (1 if i == 10 else 2) for i in range(20)]
    for rows in batches:
        graphed(torch.tensor(rows))
    assert position.steps == 20
    assert (FakeGraph.captures, FakeGraph.replays) == (1, 18 + begun)
    first = 1 - begun
    del seen[first : first + COMPARED + 2]  # the warm-up check and the capture
    assert [rows.tolist() for rows in seen] == batches


def test_what_a_captured_step_changes_and_state_lacks_is_named(capsys):
    memory = torch.zeros(3)
    call(captured_step(lambda rows: memory.add_(1), {}), 1)
    assert "warning: a resumed run would not continue exactly: tests/test_graph.py:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "read", [lambda schedule: schedule.last_epoch / 20, lambda schedule: schedule.get_last_lr()[0]]
)
def test_what_a_step_reads_of_a_schedule_is_seen_to_change(read):
    optimizer = sgd()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    prepare(optimizer, torch.device("cpu"))
    before = schedule.last_epoch, schedule.get_last_lr()
    chained = torch.optim.lr_scheduler.ChainedScheduler([schedule])
    state = {"optimizer": optimizer, "schedule": schedule, "chained": chained}
    with pytest.raises(UserError, match=r"tests/test_graph.py:\d+ does not do the same in every step"):
        call(captured_step(lambda rows: torch.ones(1) * read(schedule), state), 1)
    assert (schedule.last_epoch, schedule.get_last_lr()) == before


def test_a_step_that_uses_the_storage_of_changing_weights_is_captured(fake_cuda):
    """As cuDNN's recurrent layers do."""
    weight, position = torch.zeros(3), Position()

    def step(rows):
        torch.empty(0).set_(weight.untyped_storage())
        weight.add_(1)
        position.steps += 1

    graphed = captured_step(step, {"weight": weight, "position": position}, graph=True)
    fake_cuda(graphed, position)
    call(graphed, 1)
    assert FakeGraph.captures == 1


def test_a_branch_by_a_random_number_of_python_is_refused_even_if_it_is_not_taken():
    for draw in (random.random, np.random.rand):
        with pytest.raises(UserError, match="it draws random numbers from Python or numpy; draw them with torch"):
            call(captured_step(lambda rows, draw=draw: torch.ones(2 if draw() < 0 else 1), {}), 1)


def test_a_chained_schedule_and_a_gradient_scaler_are_captured():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, fused=True)
    chained = torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)])
    scaler = torch.amp.GradScaler("cpu")

    def step(rows):
        optimizer.zero_grad()
        scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    state = {"optimizer": optimizer, "chained": chained, "scaler": scaler}
    prepare(optimizer, torch.device("cpu"))
    call(captured_step(step, state, begun=False), 3)
    assert scaler.state_dict()["_growth_tracker"] == 3
    assert not hasattr(chained, "last_epoch")


def test_a_constant_that_a_step_copies_to_the_gpu_is_named():
    with Recorder(torch.device("cuda")), pytest.raises(NotCapturable, match="makes a tensor from Python values"):
        torch.tensor([0.2, 0.8])


def test_a_generator_in_state_is_registered_with_the_graph(fake_cuda, monkeypatch):
    own, position, registered = torch.Generator(), Position(), []
    monkeypatch.setattr(FakeGraph, "register_generator_state", lambda _, each: registered.append(each), raising=False)

    def step(rows):
        position.steps += 1
        torch.rand(2, generator=own)

    graphed = captured_step(step, {"own": own, "position": position}, graph=True)
    fake_cuda(graphed, position)
    call(graphed, 1)
    assert [address_of(each) for each in registered] == [address_of(own)]


def test_the_warm_up_check_leaves_no_trace(fake_cuda):
    """Weights, averages of the optimizer and of batch norm, overlapping views and random numbers are as before."""
    weight, memory, norm = torch.ones(4, requires_grad=True), torch.arange(6.0), torch.nn.BatchNorm1d(3)
    optimizer, own = torch.optim.Adam([weight], lr=0.1, fused=True), torch.Generator()
    drawn = []

    def step(rows):
        drawn.append(norm(torch.rand(2, 3) + torch.rand(2, 3, generator=own)))
        memory[1:4].add_(1)
        memory[:3].mul_(2)
        optimizer.zero_grad()
        (weight * memory[:4]).sum().backward()
        optimizer.step()

    def everything():
        state = [weight.detach(), memory, *optimizer.state[weight].values(), *norm.state_dict().values()]
        return [each.clone() for each in (*state, torch.get_rng_state(), own.get_state())]

    graphed = captured_step(step, {"optimizer": optimizer, "own": own}, begun=False, graph=True)
    graphed.record_graph = lambda function: lambda *inputs: None
    call(graphed, 1)
    before = everything()
    call(graphed, 1)
    assert len(drawn) == 2 + COMPARED
    assert all(map(torch.equal, before, everything()))
    assert not graphed.recorded.before  # its copies are freed


@pytest.mark.parametrize(
    ("epochs", "compiled"), [((10, 10, 10), False), ((3, 10, 10), False), ((10, 10, 10), True)],
    ids=["from the start", "resumed just before a change", "where the compiler fails"],
)  # fmt: skip
def test_a_momentum_that_changes_once_per_epoch_is_captured_again(fake_cuda, monkeypatch, capsys, epochs, compiled):
    monkeypatch.setattr("engine.compiler.compile_step", MagicMock(side_effect=RuntimeError("no such operation\nmore")))
    optimizer = sgd()
    graphed, position, _ = graphed_counter(fake_cuda, optimizer)
    graphed.compiled = compiled
    for epoch, steps in enumerate(epochs):
        optimizer.param_groups[0]["momentum"] = 0.5 + epoch / 10
        call(graphed, steps)
    assert position.steps == sum(epochs)
    assert (FakeGraph.captures, FakeGraph.replays) == (3, sum(epochs) - 1)
    assert re.findall("not compiled: .*", capsys.readouterr().out) == ["not compiled: no such operation"] * compiled


def test_a_momentum_that_changes_in_every_step_runs_eagerly_and_is_said_once(fake_cuda, capsys):
    optimizer = sgd()
    graphed, position, _ = graphed_counter(fake_cuda, optimizer)
    for i in range(20):
        optimizer.param_groups[0]["momentum"] = i / 100
        call(graphed, 1)
    assert position.steps == 20
    assert FakeGraph.replays == 2
    assert capsys.readouterr().out.count("every step runs eagerly: momentum of the optimizer changes too often\n") == 1


def test_a_step_that_changes_in_a_later_epoch_is_captured_again(fake_cuda, capsys):
    """As when `after_epoch` unfreezes a layer: the first step of each epoch runs eagerly and is compared."""
    layer, position = torch.nn.Linear(1, 1), Position()
    layer.weight.requires_grad_(False)

    def step(rows):
        position.steps += 1
        layer(torch.ones(2, 1)).sum().backward()
        layer.zero_grad()

    state = {"optimizer": sgd(), "position": position, "layer": layer}
    graphed = captured_step(step, state, begun=False, graph=True)
    fake_cuda(graphed, position)
    for epoch in range(4):
        for graphed.run.batch in range(10):
            call(graphed, 1)
        if epoch == 1:
            layer.weight.requires_grad_(True)
    assert position.steps == 40
    assert (FakeGraph.captures, FakeGraph.replays) == (2, 36)
    assert capsys.readouterr().out.count("capturing the training step again: tests/test_graph.py:") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: torch.manual_seed(0), "it seeds the random number generator in each step"),
        (lambda state: state.update(count=state["count"] + 1), r"it changes state\['count'\], a Python value"),
        (lambda state: (group := state["optimizer"].param_groups[0]).update(momentum=0.9 * group["momentum"]),
         "it changes settings of an optimizer, which are Python numbers; change them in `after_epoch`"),
        (lambda state: torch.nn.functional.one_hot(torch.tensor([1]), 10),
         r".* F\.one_hot on a CPU does; compare labels\[:, None\] == torch\.arange\(classes\)"),
    ],
)  # fmt: skip
def test_what_a_captured_step_would_leave_out_is_refused(change, message):
    state = {"count": 0, "optimizer": sgd()}
    step = captured_step(lambda rows: change(state) and torch.rand(()), state, compiled=True)
    words = f"train_step cannot be compiled: {message}.*; omit --compile to run it eagerly"
    with pytest.raises(UserError, match=words):
        call(step, 1)


def test_a_failed_capture_names_its_cause(fake_cuda, monkeypatch):
    graphed, _, _ = graphed_counter(fake_cuda, sgd())

    def failing(graph):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    replaced = []
    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr("engine.captured.replace_generator", lambda device, state: replaced.append(device))
    with pytest.raises(UserError, match="not permitted when stream is capturing; add --no-cuda-graph"):
        call(graphed, 20)
    assert replaced == [torch.device("cpu")]


def test_a_run_on_cuda_is_captured_when_dry_and_when_resumed(fake_cuda, tmp_path, monkeypatch):
    folder, position = tmp_path / "run", Position()

    class Graphed(CapturedStep):
        def __init__(self, step, run, batch_size, **how):
            run.device = lambda: torch.device("cpu")
            super().__init__(step, run, batch_size, **how)
            fake_cuda(self, position)

    def train_step(images, labels):
        position.steps += 1
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(captured, "CapturedStep", Graphed)
    for options in ({"dry_run": True}, {"resume": str(folder), "epochs": 2}):
        weight = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        state = {"position": position, "weight": weight, "optimizer": optimizer}
        run = start(folder, state, batch_size=1, **options)
        run.device = lambda: torch.device("cuda")  # which `capture` asks
        utils.train(run, train_step, ten_images(batch_size=1))
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert position.steps == 18
    assert (FakeGraph.captures, FakeGraph.replays) == (2, 16)  # the first step of each epoch runs eagerly
