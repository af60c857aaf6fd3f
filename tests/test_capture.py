"""Without a GPU: can each training step be a CUDA graph, and is a step detected that cannot?

The steps run on `meta` tensors, which stand for the GPU's: they have shapes and no values, so that every read on the
host fails. `engine.recorder.Recorder` records each operation, as it does in the first steps on a GPU.
"""

import contextlib
import sys

import pytest
import torch
from helpers import DIGITS, assert_one_line
from torch.distributions import Normal

import train_cgan
import train_classifier
import train_gan
import train_likelihood
import utils
from datasets import Batches
from engine import flags, recorder
from engine.captured import COMPARED
from engine.recorder import NotCapturable, difference, is_capturable, prepare

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
        return utils.Run(args, state), train_step, batches

    return build


def record(run, train_step, batches, steps=COMPARED):
    """Run the step as on a GPU, and record all but the first call."""
    for optimizer in run.optimizers():
        assert is_capturable(optimizer, META)
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
        if reason := difference(recorders[0], other):
            raise NotCapturable(reason)


CASES = {  # each has operations that no other has
    "mlp": (train_classifier, ["--model", "mlp", "--recipe", "best", "--loss", "mse"]),
    "resnet": (train_classifier, ["--model", "resnet", "--recipe", "best"]),
    "maxout": (train_classifier, ["--recipe", "paper"]),
    "gan": (train_gan, ["--loss", "saturating"]),
    "gan paper": (train_gan, ["--recipe", "paper"]),
    "gan large": (train_gan, ["--recipe", "best", "--networks", "large", "--loss", "relativistic"]),
    "cgan": (train_cgan, ["--recipe", "best"]),
    "cgan paper": (train_cgan, ["--recipe", "paper"]),
    "iwae": (train_likelihood, ["--model", "vae", "--recipe", "best", "--importance-samples", "5"]),
    "rbm": (train_likelihood, ["--model", "rbm"]),
    "hmm": (train_likelihood, ["--model", "hmm", "--states", "64"]),
    "rnn": (train_likelihood, ["--model", "rnn", "--recipe", "best", "--hidden", "16"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_the_same_operations_on_the_same_tensors(build, name):
    script, words = CASES[name]
    recorders = record(*build(script, *words), steps=3)
    assert len(recorders[0].operations) > 20
    require_all_same(recorders)


FAULTS = {  # what a user might do with the loss of call number i, and what is said of it
    "a Python number": (lambda i, loss: loss / i, 'gets the number 2, then 3; compute it from state["step"]'),
    "read on the host": (lambda i, loss: loss * loss.item(), "waits for a value on the device, as .item()"),
    "read as a list": (lambda i, loss: loss * loss.view(1).tolist()[0], "reads values on the host, as .tolist()"),
    "a comparison": (lambda i, loss: loss * torch.equal(loss, loss), "as `if` on a comparison does; use torch.where"),
    "a boolean mask": (lambda i, loss: (x := loss.view(1))[x > 0].sum(), "images[mask] does; use torch"),
    "a distribution": (lambda i, loss: loss + Normal(loss, 1).mean, "build distributions before the first step"),
    "on the CPU": (lambda i, loss: loss * torch.rand(()), "uses a tensor on the cpu in aten.rand"),
    "copied to the CPU": (lambda i, loss: torch.zeros(()).copy_(loss), "make it with device=images.device"),
    "every other step": (lambda i, loss: loss.exp() if i % 2 else loss, "does not do the same in every step, as after"),
    "a metric": (lambda i, loss: i, 'gets the number 2.0, then 3.0; compute it from state["step"]'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_detected_and_its_line_is_named(build, name):
    run, train_step, batches = build(train_classifier, "--model", "mlp")
    calls, (change, part) = [], FAULTS[name]

    def faulty_step(images, labels):
        calls.append(0)
        return {"loss": change(len(calls), train_step(images, labels)["loss"])}

    where = "a metric of train_step, " if name == "a metric" else r"tests/test_capture.py:\d+ "
    with pytest.raises(NotCapturable, match=f"^{where}") as caught:
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
    for device in ("cpu", "mps"):  # unless it is fused
        assert not is_capturable(optimizer, torch.device(device))
    if not is_capturable(optimizer, META):
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
