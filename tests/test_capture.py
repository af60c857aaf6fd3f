"""Without a GPU: can each training step be a CUDA graph, and is a step detected that cannot?

The steps run on `meta` tensors, which stand for the GPU's: they have shapes and no values, so that every read on the
host fails. `engine.recorder.Recorder` records each operation, as it does in the first steps on a GPU.
"""

import contextlib
import itertools
import sys

import pytest
import torch
from helpers import DIGITS, assert_one_line
from test_loop import Position, start, ten_images
from torch.distributions import Normal

import train_cgan
import train_classifier
import train_gan
import train_likelihood
import utils
from datasets import Batches
from engine import captured, flags, recorder
from engine.captured import COMPARED, CapturedStep
from engine.errors import UserError
from engine.recorder import NotCapturable, is_capturable, prepare, require_same

META = torch.device("meta")


class Recorder(recorder.Recorder):
    """Fused updates have no kernel for meta tensors; they return nothing, so they need not run."""

    def run(self, function, args, kwargs):
        return None if "_fused_" in str(function) else super().run(function, args, kwargs)


@pytest.fixture(autouse=True)
def meta_is_a_gpu(monkeypatch):
    """Let meta tensors pass three checks of torch that know only real devices."""
    for module in [module for name, module in sys.modules.items() if name.startswith("torch.optim")]:
        for check in ("_get_fused_kernels_supported_devices", "_get_capturable_supported_devices"):
            if hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *_, **__: ["cpu", "cuda", "meta"])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.fixture
def build(tmp_path, capsys):
    """A function of a script and its flags: the run, the script's train_step, and batches of the right size on meta."""

    def build(script, *given):
        words = [*given, *DIGITS[:2], "--output-dir", str(tmp_path / "run")]
        args = flags.parse_args(script.get_args_parser(), script.RECIPES, script.VARIANTS, words)
        count = args.batch_size * 20
        images, labels = torch.zeros(count, 1, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
        state, train_step, _ = script.build(args, META, Batches(images, labels, args.batch_size, "cpu"))
        batches = Batches(images, labels, args.batch_size, META, black=getattr(args, "black", 0.0))
        run = utils.Run(args, state)
        run.meter = utils.Meter(META)
        return run, train_step, batches

    return build


def record(run, train_step, batches, steps=COMPARED):
    """Run the step as on a GPU, and record all but the first call."""
    for optimizer in run.optimizers():
        assert is_capturable(optimizer)
        prepare(optimizer, META)
    inner = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "capture", lambda step, *_: inner.append(step) or step)
        utils.make_step(run, train_step, batches)
    schedules = [item for item in run.state.values() if isinstance(item, torch.optim.lr_scheduler.LRScheduler)]
    rows = torch.zeros(run.args.batch_size, dtype=torch.int64, device=META)
    recorders = []
    for _ in range(1 + steps):
        with Recorder(META) as recorder:
            inner[0](rows)
        recorders.append(recorder)
        for schedule in schedules:
            schedule.step()
    return recorders[1:]


def require_all_same(recorders):
    for other in recorders[1:]:
        require_same(recorders[0], other)


CASES = {  # each has operations that no other has
    "mlp": (train_classifier, ["--model", "mlp", "--recipe", "best", "--loss", "mse"]),
    "resnet": (train_classifier, ["--model", "resnet", "--recipe", "best"]),
    "maxout": (train_classifier, ["--recipe", "paper"]),
    "gan": (train_gan, ["--loss", "saturating"]),
    "gan paper": (train_gan, ["--recipe", "paper"]),
    "gan large": (train_gan, ["--recipe", "best", "--networks", "large", "--loss", "relativistic", "--r1", "1"]),
    "cgan": (train_cgan, ["--recipe", "best"]),
    "iwae": (train_likelihood, ["--importance-samples", "5"]),
    **{model: (train_likelihood, ["--model", model]) for model in ("rbm", "rnn", "hmm")},
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_the_same_operations_on_the_same_tensors(build, name):
    script, words = CASES[name]
    recorders = record(*build(script, *words), steps=3)
    assert len(recorders[0].operations) > 20
    require_all_same(recorders)


# Faults that a graph would repeat -------------------------------------------------------------------------------------

KEPT = [torch.zeros((), device=META)]


def replaced(loss):
    KEPT[0] = KEPT[0] + loss
    return KEPT[0]


FAULTS = {  # what a user might do with the loss of call number i, and what is said of it
    "a Python number": (lambda i, loss: loss / i, 'gets the number 2, then 3; compute it from state["step"]'),
    "read on the host": (lambda i, loss: loss * loss.item(), "waits for a value on the device, as .item()"),
    "a boolean mask": (
        lambda i, loss: loss + loss.view(1)[loss.view(1) > 0].sum(),
        "images[mask] does; use torch",
    ),
    "a distribution": (lambda i, loss: loss + Normal(loss, 1).mean, "build distributions before the first step"),
    "on the CPU": (lambda i, loss: loss * torch.rand(()), "uses a tensor on the cpu in aten.rand"),
    "copied to the CPU": (lambda i, loss: torch.zeros(()).copy_(loss), "make it with device=images.device"),
    "a tensor that is replaced": (
        lambda i, loss: replaced(loss),
        "reads a tensor that was replaced; update",
    ),
    "every other step": (lambda i, loss: loss.exp() if i % 2 else loss, "does not do the same in every step, as after"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_detected_and_its_line_is_named(build, name):
    run, train_step, batches = build(train_classifier, "--model", "mlp")
    calls, (change, part) = [], FAULTS[name]

    def faulty_step(images, labels):
        calls.append(0)
        return {"loss": change(len(calls), train_step(images, labels)["loss"])}

    with pytest.raises(NotCapturable, match=r"^tests/test_capture.py:\d+ ") as caught:
        require_all_same(record(run, faulty_step, batches))
    assert_one_line(f"{caught.value}\n", part)


@pytest.mark.parametrize("period", range(2, 6))
@pytest.mark.parametrize("phase", range(5))
def test_whatever_happens_every_few_steps_up_to_five_is_detected_in_any_phase(period, phase):
    def recorded(i):
        with Recorder(META) as recorder:
            x = torch.zeros(2, device=META)
            if (i + phase) % period == 0:
                x.add_(1)
        return recorder

    with pytest.raises(NotCapturable, match="not do the same in every step"):
        require_all_same([recorded(i) for i in range(COMPARED)])


# Optimizers -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
]
CAPTURABLE = {"Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch_is_captured_or_runs_eagerly(name):
    """One that is capturable neither changes Python numbers nor reads on the host."""
    layer = torch.nn.Linear(3, 2, bias=False, device=META)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1)
    if not is_capturable(optimizer):
        assert name not in CAPTURABLE
        return
    assert name not in ("SGD", "Adagrad", "LBFGS")
    prepare(optimizer, META)
    recorders = []
    for _ in range(4):
        with Recorder(META) as recorder:
            optimizer.zero_grad()
            layer(torch.zeros(4, 3, device=META)).sum().backward()
            optimizer.step()
        recorders.append(recorder)
    require_all_same(recorders[1:])


def test_a_state_saved_for_a_graph_resumes_without_one():
    weight = torch.zeros(3, requires_grad=True)
    for options in ({"fused": True}, {}):
        optimizer = torch.optim.Adam([weight], lr=0.1, **options)
        prepare(optimizer, torch.device("cpu"))
        weight.grad = torch.ones(3)
        optimizer.step() if options else None
        saved = recorder.portable_state(optimizer)
        assert type(saved["param_groups"][0]["lr"]) is float
        assert not saved["param_groups"][0]["capturable"]
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)  # the optimizer itself is unchanged
        again = torch.optim.Adam([weight], lr=0.1, **options)
        again.load_state_dict(saved)
        again.step()


# The graph itself, with a stand-in for CUDA's -------------------------------------------------------------------------


class Stream:
    def wait_stream(self, other):
        pass


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

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return lambda graphed, position: monkeypatch.setattr(torch.cuda, "graph", graph_of(graphed, position))


def graphed_step(step, optimizer, begun=False, **state):
    return CapturedStep(
        step, {"optimizer": optimizer, **state}, 2, torch.device("cpu"), compiled=False, graph=True, begun=begun
    )


def graphed_counter(fake_cuda, optimizer, begun=False):
    position, seen = Position(), []

    def step(rows):
        position.steps += 1
        seen.append(rows.tolist())

    graphed = graphed_step(step, optimizer, begun, position=position)
    fake_cuda(graphed, position)
    return graphed, position, seen


def call(graphed, times):
    for _ in range(times):
        graphed(torch.zeros(2, dtype=torch.int64))


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.5)


@pytest.mark.parametrize("begun", [False, True])
def test_every_call_is_one_step_on_its_own_rows_and_all_but_a_runs_first_are_replays(fake_cuda, begun):
    graphed, position, seen = graphed_counter(fake_cuda, sgd(), begun)
    for i in range(20):
        graphed(torch.tensor([i, i]))
    assert position.steps == 20
    assert FakeGraph.captures == 1
    assert FakeGraph.replays == 19 + begun
    first = 1 - begun
    del seen[first : first + COMPARED + 1]  # the warm-up check and the capture
    assert seen == [[i, i] for i in range(20)]


def test_the_warm_up_check_leaves_no_trace(fake_cuda):
    """Weights, averages of the optimizer and of batch norm, overlapping views and random numbers are as before."""
    weight, memory, norm = torch.ones(4, requires_grad=True), torch.arange(6.0), torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    drawn = []

    def step(rows):
        drawn.append(norm(torch.rand(2, 3)))
        memory[1:4].add_(1)
        memory[:3].mul_(2)
        optimizer.zero_grad()
        (weight * memory[:4]).sum().backward()
        optimizer.step()

    def everything():
        state = [weight.detach(), memory, *optimizer.state[weight].values(), *norm.state_dict().values()]
        return [each.clone() for each in (*state, torch.get_rng_state())]

    graphed = graphed_step(step, optimizer)
    graphed.record_graph = lambda function: lambda *inputs: None
    call(graphed, 1)
    before = everything()
    call(graphed, 1)
    assert len(drawn) == 1 + COMPARED
    assert all(map(torch.equal, before, everything()))


def test_a_short_last_batch_runs_eagerly(fake_cuda):
    graphed, position, _ = graphed_counter(fake_cuda, sgd())
    for size in [2] * 10 + [1] + [2] * 10:
        graphed(torch.zeros(size, dtype=torch.int64))
    assert position.steps == 21
    assert FakeGraph.captures == 1
    assert FakeGraph.replays == 19


@pytest.mark.parametrize("epochs", [(10, 10, 10), (3, 10, 10)], ids=["from the start", "resumed just before a change"])
def test_a_momentum_that_changes_once_per_epoch_is_captured_again(fake_cuda, capsys, epochs):
    optimizer = sgd()
    graphed, position, _ = graphed_counter(fake_cuda, optimizer)
    for epoch, steps in enumerate(epochs):
        optimizer.param_groups[0]["momentum"] = 0.5 + epoch / 10
        call(graphed, steps)
    assert position.steps == sum(epochs)
    assert FakeGraph.captures == 3
    assert FakeGraph.replays == sum(epochs) - 1
    assert not capsys.readouterr().out


def test_where_the_compiler_fails_the_graph_is_of_the_eager_step(fake_cuda, monkeypatch, capsys):
    """And its momentum is a recorded number, as in any graph, so that a change is detected."""
    optimizer = sgd()
    graphed, position, _ = graphed_counter(fake_cuda, optimizer)
    graphed.compiled = True
    monkeypatch.setattr("engine.compiler.compile_step", lambda *_: 1 / 0)
    for epoch in range(2):
        optimizer.param_groups[0]["momentum"] = 0.5 + epoch / 10
        call(graphed, 10)
    assert position.steps == 20
    assert FakeGraph.captures == 2
    assert capsys.readouterr().out.count("not compiled: division by zero") == 1


def test_a_momentum_that_changes_in_every_step_runs_eagerly_and_is_said_once(fake_cuda, capsys):
    optimizer = sgd()
    graphed, position, _ = graphed_counter(fake_cuda, optimizer)
    for i in range(20):
        optimizer.param_groups[0]["momentum"] = i / 100
        call(graphed, 1)
    assert position.steps == 20
    assert FakeGraph.replays == 2
    assert capsys.readouterr().out.count("every step runs eagerly") == 1


def test_a_changing_step_is_one_line(fake_cuda):
    calls = itertools.count(1)
    graphed = graphed_step(lambda rows: torch.zeros(1).mul_(next(calls)), sgd())
    fake_cuda(graphed, Position())
    with pytest.raises(UserError, match=r"not do the same in every step.*--no-cuda-graph") as caught:
        call(graphed, 20)
    assert len(str(caught.value).splitlines()) == 1


def test_a_step_that_changes_in_a_later_epoch_is_captured_again(fake_cuda, capsys):
    """As when `after_epoch` unfreezes a layer: the first step of each epoch runs eagerly and is compared."""
    layers, calls, position = [torch.nn.Linear(1, 1)], [], Position()
    layers[0].weight.requires_grad_(False)

    def step(rows):
        position.steps += 1
        layers[0](torch.ones(2, 1)).sum().backward()
        layers[0].zero_grad()

    graphed = graphed_step(step, sgd(), position=position, layer=layers[0])
    graphed.is_first = lambda: len(calls) % 10 == 0
    fake_cuda(graphed, position)
    for epoch in range(4):
        for _ in range(10):
            call(graphed, 1)
            calls.append(0)
        if epoch == 1:
            layers[0].weight.requires_grad_(True)
    assert position.steps == 40
    assert (FakeGraph.captures, FakeGraph.replays) == (2, 36)
    assert capsys.readouterr().out.count("capturing the training step again: tests/test_capture.py:") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: torch.manual_seed(0), "it seeds the random numbers anew in each step"),
        (lambda state: state.update(count=state["count"] + 1), r"it changes state\['count'\], a Python value"),
    ],
)
def test_what_a_captured_step_would_leave_out_is_refused(change, message):
    state = {"count": 0}
    step = CapturedStep(
        lambda rows: change(state) and torch.rand(()), state, 2, torch.device("cpu"),
        compiled=True, graph=False, begun=True,
    )  # fmt: skip
    with pytest.raises(
        UserError, match=f"train_step cannot be compiled: {message}.*; omit --compile to run it eagerly"
    ):
        call(step, 1)


def test_a_generator_is_rolled_back_after_the_warm_up_check(fake_cuda):
    own = torch.Generator().manual_seed(3)
    graphed = graphed_step(lambda rows: torch.rand(2, generator=own), sgd(), begun=True, own=own)
    graphed.record_graph = lambda function: lambda *inputs: None
    before = own.get_state()
    call(graphed, 1)
    assert torch.equal(own.get_state(), before)


def test_a_failed_capture_names_its_cause(fake_cuda, monkeypatch):
    graphed, _, _ = graphed_counter(fake_cuda, sgd())

    @contextlib.contextmanager
    def failing(graph):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        yield

    replaced = []
    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr("engine.captured.replace_generator", lambda device, state: replaced.append(device))
    with pytest.raises(UserError, match="not permitted when stream is capturing; add --no-cuda-graph"):
        call(graphed, 20)
    assert replaced == [torch.device("cpu")]


def test_a_run_on_cuda_is_captured_when_dry_and_when_resumed(fake_cuda, tmp_path, monkeypatch):
    folder, position = tmp_path / "run", Position()

    class Graphed(CapturedStep):
        def __init__(self, step, state, batch_size, device, **how):
            super().__init__(step, state, batch_size, torch.device("cpu"), **how)
            fake_cuda(self, position)

    def train_step(images, labels):
        position.steps += 1
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(captured, "CapturedStep", Graphed)
    monkeypatch.setattr(utils, "Meter", lambda device, meter=utils.Meter: meter("cpu"))
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


def test_an_optimizer_that_cannot_be_captured_runs_eagerly_and_is_said(tmp_path, capsys):
    weight = torch.zeros(1, requires_grad=True)
    run = start(tmp_path / "run", {"weight": weight, "optimizer": torch.optim.Adagrad([weight], lr=0.1)})
    run.device = lambda: torch.device("cuda")
    run.meter = utils.Meter()
    step = utils.make_step(run, lambda images, labels: {"loss": torch.zeros(())}, ten_images(batch_size=2))
    assert capsys.readouterr().out.count("every step runs eagerly: Adagrad") == 1
    step(torch.tensor([1, 2]))
