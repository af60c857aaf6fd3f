"""Without a GPU: can each training step be a CUDA graph, and is a step detected that cannot?

The steps run on `meta` tensors, which stand for the GPU's: they have shapes and no values, so that every read on the
host fails. `engine.recorder.Recorder` records each operation, as it does in the first steps on a GPU.
"""

import contextlib
import random
import sys

import pytest
import torch
from helpers import DIGITS
from test_loop import Position, start, ten_images

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
    step = utils.make_step(run, train_step, batches)
    schedules = [item for item in run.state.values() if isinstance(item, torch.optim.lr_scheduler.LRScheduler)]
    rows = torch.zeros(run.loop.batch_size, dtype=torch.int64, device=META)
    recorders = []
    for _ in range(1 + steps):
        with Recorder(META) as recorder:
            step(rows)
        recorders.append(recorder)
        for schedule in schedules:
            schedule.step()
    return recorders[1:]


def require_all_same(recorders):
    for other in recorders[1:]:
        require_same(recorders[0], other)


CASES = {
    **{f"{model} {recipe}": (train_classifier, ["--model", model, "--recipe", recipe])
       for model in ("mlp", "cnn", "maxout") for recipe in ("lecture", "best", "paper")},
    "cnn fast": (train_classifier, ["--recipe", "fast"]),
    **{f"mlp {loss}": (train_classifier, ["--model", "mlp", "--loss", loss]) for loss in ("bce", "mse", "mae")},
    **{f"{script.__name__} {recipe}": (script, ["--recipe", recipe])
       for script in (train_gan, train_cgan) for recipe in script.RECIPES},
    "gan large": (train_gan, ["--recipe", "best", "--networks", "large"]),
    "gan saturating": (train_gan, ["--loss", "saturating"]),
    "gan relativistic": (train_gan, ["--loss", "relativistic", "--r1", "1"]),
    **{
        f"{model} {recipe}": (train_likelihood, ["--model", model, "--recipe", recipe])
        for model in ("vae", "rbm", "hmm")
        for recipe in ("lecture", "best")
    },
    "iwae": (train_likelihood, ["--importance-samples", "5"]),
    "rnn fixed": (train_likelihood, ["--model", "rnn", "--binarise", "fixed"]),
    "cgan no wrong label": (train_cgan, ["--recipe", "best", "--wrong-label", "0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_recipes_step_is_the_same_operations_on_the_same_tensors(build, name):
    script, words = CASES[name]
    recorders = record(*build(script, *words))
    assert len(recorders[0].operations) > 20
    require_all_same(recorders)


# Faults that a graph would repeat -------------------------------------------------------------------------------------


class Faults:
    """What a user might add to a step, by name."""

    def __init__(self, run):
        self.run, self.i, self.kept = run, 0, torch.zeros((), device=META)

    def every_fifth_step(self, metrics, images):
        if self.i % 5 == 0:
            metrics["loss"] = metrics["loss"] * 2

    def annealed_number(self, metrics, images):
        metrics["loss"] = metrics["loss"] * (1 / self.i)

    def python_random_number(self, metrics, images):
        metrics["loss"] = metrics["loss"] * random.random()

    def changing_float_metric(self, metrics, images):
        metrics["temperature"] = 1 / self.i

    def metric_now_and_then(self, metrics, images):
        if self.i % 3 == 0:
            metrics["sometimes"] = metrics["loss"]

    def read_on_the_host(self, metrics, images):
        metrics["loss"] = metrics["loss"] * metrics["loss"].item()

    def boolean_decision(self, metrics, images):
        if metrics["loss"] > 0:
            metrics["loss"] = metrics["loss"] * 2

    def tensor_on_the_cpu(self, metrics, images):
        metrics["loss"] = metrics["loss"] * torch.rand(())

    def copy_to_the_cpu(self, metrics, images):
        torch.zeros(3).copy_(images[0, 0, 0, :3])

    def copy_from_the_cpu(self, metrics, images):
        metrics["loss"] = metrics["loss"] * torch.tensor([2.0]).to(META)

    def tensor_that_is_replaced(self, metrics, images):
        self.kept = self.kept + metrics["loss"]

    def growing_list(self, metrics, images):
        self.kept = torch.cat([self.kept.view(-1), metrics["loss"].view(1)])

    def bias_correction_in_python(self, metrics, images):
        metrics["loss"] = metrics["loss"].mul(1 - 0.9**self.i)


FAULTS = [name for name in vars(Faults) if not name.startswith("_")]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_detected(build, name):
    run, train_step, batches = build(train_classifier, "--model", "mlp")
    faults = Faults(run)

    def faulty_step(images, labels):
        faults.i += 1
        metrics = train_step(images, labels)
        getattr(faults, name)(metrics, images)
        return metrics

    with pytest.raises(NotCapturable):
        require_all_same(record(run, faulty_step, batches))


@pytest.mark.parametrize("period", range(2, COMPARED + 1))
@pytest.mark.parametrize("phase", range(COMPARED))
def test_whatever_happens_every_few_steps_is_detected_in_any_phase(period, phase):
    def recorded(i):
        with Recorder(META) as recorder:
            x = torch.zeros(2, device=META)
            if (i + phase) % period == 0:
                x.add_(1)
        return recorder

    with pytest.raises(NotCapturable, match="not the same in every step"):
        require_all_same([recorded(i) for i in range(COMPARED)])


# Optimizers -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch_is_captured_or_runs_eagerly(name):
    """One that is not capturable changes Python numbers or reads on the host; one that is does neither."""
    layer = torch.nn.Linear(3, 2, bias=False, device=META)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1)
    if not is_capturable(optimizer):
        return
    prepare(optimizer, META)
    recorders = []
    for _ in range(4):
        with Recorder(META) as recorder:
            optimizer.zero_grad()
            layer(torch.zeros(4, 3, device=META)).sum().backward()
            optimizer.step()
        recorders.append(recorder)
    require_all_same(recorders[1:])


def test_optimizers_that_can_be_captured_are_known():
    found = {name for name in OPTIMIZERS if is_capturable(getattr(torch.optim, name)([torch.zeros(2, 2)], lr=0.1))}
    assert found >= {"Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"}
    assert not found & {"SGD", "Adagrad", "LBFGS"}
    assert is_capturable(torch.optim.SGD([torch.zeros(2)], lr=0.1, fused=True))


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


def graphed_counter(fake_cuda, optimizer, batch_size=2):
    position, seen = Position(), []

    def step(rows):
        position.steps += 1
        seen.append(rows.tolist())
        return

    graphed = graphed_step(step, optimizer, batch_size)
    fake_cuda(graphed, position)
    return graphed, position, seen


def graphed_step(step, optimizer, batch_size=2, begun=False):
    return CapturedStep(step, [optimizer], batch_size, torch.device("cpu"), compiled=False, graph=True, begun=begun)


def call(graphed, times):
    for _ in range(times):
        graphed(torch.zeros(2, dtype=torch.int64))


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.5)


def test_every_call_is_one_step_on_its_own_rows_and_most_are_replays(fake_cuda):
    graphed, position, seen = graphed_counter(fake_cuda, sgd())
    for i in range(20):
        graphed(torch.tensor([i, i]))
    assert position.steps == 20
    assert FakeGraph.captures == 1
    assert FakeGraph.replays == 19  # the first step is eager
    del seen[1 : 1 + COMPARED + 1]  # the warm-up check and the capture
    assert seen == [[i, i] for i in range(20)]


def test_a_run_that_has_begun_replays_its_first_step_too(fake_cuda):
    position = Position()

    def step(rows):
        position.steps += 1
        return

    graphed = graphed_step(step, sgd(), begun=True)
    fake_cuda(graphed, position)
    call(graphed, 5)
    assert position.steps == 5
    assert FakeGraph.replays == 5


def test_the_warm_up_check_leaves_no_trace(fake_cuda):
    """Weights, the optimizer's averages, sums, overlapping views and random numbers are as before."""
    weight, memory = torch.ones(4, requires_grad=True), torch.arange(6.0)
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    drawn = []

    def step(rows):
        drawn.append(torch.rand(1))
        memory[1:4].add_(1)
        memory[:3].mul_(2)
        optimizer.zero_grad()
        (weight * memory[:4]).sum().backward()
        optimizer.step()
        return

    def everything():
        state = optimizer.state[weight]
        return [each.clone() for each in (weight.detach(), memory, *state.values(), torch.get_rng_state())]

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


def test_a_momentum_that_changes_once_per_epoch_is_captured_again(fake_cuda, capsys):
    optimizer = sgd()
    graphed, position, _ = graphed_counter(fake_cuda, optimizer)
    for epoch in range(3):
        optimizer.param_groups[0]["momentum"] = 0.5 + epoch / 10
        call(graphed, 10)
    assert position.steps == 30
    assert FakeGraph.captures == 3
    assert FakeGraph.replays == 29
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
        graphed(torch.zeros(2, dtype=torch.int64))
    assert position.steps == 20
    assert FakeGraph.replays == 2
    assert capsys.readouterr().out.count("every step runs eagerly") == 1


def test_a_run_that_is_resumed_just_before_a_change_stays_a_graph(fake_cuda, capsys):
    optimizer = sgd()
    graphed, _, _ = graphed_counter(fake_cuda, optimizer)
    for epoch, steps in enumerate((3, 10, 10)):
        optimizer.param_groups[0]["momentum"] = 0.5 + epoch / 10
        call(graphed, steps)
    assert FakeGraph.captures == 3
    assert not capsys.readouterr().out


def test_a_changing_step_is_one_line_that_names_the_flag(fake_cuda):
    position, calls = Position(), []

    def step(rows):
        calls.append(0)
        position.steps.mul_(len(calls))
        return

    graphed = graphed_step(step, sgd())
    with pytest.raises(UserError, match=r"not the same in every step.*--no-cuda-graph") as caught:
        call(graphed, 20)
    assert len(str(caught.value).splitlines()) == 1


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


@pytest.fixture
def train_on_fake_cuda(fake_cuda, tmp_path, monkeypatch):
    """A function that trains a counter and a weight in tmp_path/run, as on CUDA; returns the optimizer."""

    def train(resume=None, **options):
        position, weight = Position(), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        run = start(
            tmp_path / "run", {"position": position, "optimizer": optimizer}, batch_size=1, resume=resume, **options
        )
        run.device = lambda: torch.device("cuda")  # which `capture` asks

        class Graphed(CapturedStep):
            def __init__(self, step, optimizers, batch_size, device, **how):
                super().__init__(step, optimizers, batch_size, torch.device("cpu"), **how)
                fake_cuda(self, position)

        def train_step(images, labels):
            position.steps += 1
            return {"loss": torch.zeros(())}

        monkeypatch.setattr(captured, "CapturedStep", Graphed)
        monkeypatch.setattr(utils, "Meter", lambda device, meter=utils.Meter: meter("cpu"))
        utils.train(run, train_step, ten_images(batch_size=1))
        return optimizer

    return train


def test_a_dry_run_on_cuda_captures_and_replays(train_on_fake_cuda):
    train_on_fake_cuda(dry_run=True)
    assert FakeGraph.captures == 1
    assert FakeGraph.replays > 0


def test_a_resumed_run_is_captured_with_its_learning_rate_on_the_device(train_on_fake_cuda, tmp_path):
    for resume, epochs in ((None, 1), (str(tmp_path / "run"), 2)):
        optimizer = train_on_fake_cuda(resume, epochs=epochs)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert FakeGraph.captures == 2


def test_an_optimizer_that_cannot_be_captured_runs_eagerly_and_is_said(tmp_path, capsys):
    optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], lr=0.1)
    run = start(tmp_path / "run", {"optimizer": optimizer})
    run.device = lambda: torch.device("cuda")
    run.meter = utils.Meter()
    step = utils.make_step(run, lambda images, labels: {"loss": torch.zeros(())}, ten_images(batch_size=2))
    assert capsys.readouterr().out.count("every step runs eagerly: Adagrad") == 1
    step(torch.tensor([1, 2]))
