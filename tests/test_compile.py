"""--compile: the compiled step against the eager one.

The compiled step draws the same random numbers, so the losses of the two may differ by rounding alone. Training
multiplies such differences: where a gradient is nothing but rounding errors, Adam makes a step of full size of it. The
two are therefore compared in double precision.
"""

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import DIGITS, ROOT, run, tensors, train
from test_loop import Position, fit, start, ten_images
from test_training import assert_same_run, kill_at

import train_cgan
import train_classifier
import train_gan
import train_likelihood
import utils
from datasets import Batches, load
from engine import compiler, flags
from engine.errors import UserError

CASES = {
    "mlp lecture": (train_classifier, ["--model", "mlp"]),
    "mlp best": (train_classifier, ["--model", "mlp", "--recipe", "best"]),
    "cnn lecture": (train_classifier, ["--model", "cnn"]),
    "cnn best": (train_classifier, ["--model", "cnn", "--recipe", "best"]),
    "resnet best": (train_classifier, ["--model", "resnet", "--recipe", "best"]),
    "cnn fast": (train_classifier, ["--recipe", "fast"]),
    "maxout paper": (train_classifier, ["--recipe", "paper"]),
    **{
        f"{script.__name__} {recipe}": (script, ["--recipe", recipe])
        for script in (train_gan, train_cgan)
        for recipe in script.RECIPES
    },
    "relativistic gan": (train_gan, ["--recipe", "best", "--adversarial-loss", "relativistic"]),
    "large gan best": (train_gan, ["--recipe", "best", "--networks", "large"]),
    **{f"{model} {recipe}": (train_likelihood, ["--model", model, "--recipe", recipe])
       for model in ("vae", "rbm", "rnn", "hmm") for recipe in ("lecture", "best")},
    "vae paper": (train_likelihood, ["--model", "vae", "--recipe", "paper"]),
    "rbm paper": (train_likelihood, ["--model", "rbm", "--recipe", "paper"]),
}  # fmt: skip
QUICK = ["mlp lecture"]
STEPS = 200


def losses(case, folder, compiled):
    """The losses of each of the first steps, the step, and the state after them."""
    script, words = CASES[case]
    words = [*words, "--dataset", "digits", "--device", "cpu", "--output-dir", str(folder)]
    words += ["--compile"] if compiled else []
    args = flags.parse_args(script.get_args_parser(), script.RECIPES, script.VARIANTS, words)
    args.classes = [str(digit) for digit in range(10)]
    torch.manual_seed(0)
    images, labels = load("digits", None)
    batches = Batches(images, labels, args.batch_size, "cpu", black=getattr(args, "black", 0.0))
    state, train_step, _ = script.build(args, torch.device("cpu"), batches)
    run = utils.Run(args, state)
    run.meter = utils.Meter()
    schedules = [item for item in state.values() if isinstance(item, torch.optim.lr_scheduler.LRScheduler)]
    step, means = utils.make_step(run, train_step, batches), []
    rows = (rows for epoch in itertools.count() for rows in batches.rows(epoch) if len(rows) == args.batch_size)
    for batch in itertools.islice(rows, STEPS):
        names = step(batch)
        for schedule in schedules:
            schedule.step()
        means.append([run.meter.sums[name].item() / len(batch) for name in names if name.startswith("loss")])
        run.meter.reset()
    run.lock.release()
    return torch.tensor(means), step, state


@pytest.fixture
def double_precision(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand_like(p) < p).double())  # Inductor's: in float32 alone
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_compiled_step_is_the_eager_step_but_for_rounding(double_precision, case, tmp_path):
    """Losses of 200 steps, and the state after them."""
    eager, _, eager_state = losses(case, tmp_path / "eager", False)
    compiled, step, compiled_state = losses(case, tmp_path / "compiled", True)
    assert step.frozen is not step.step
    assert compiled[0].ne(compiled[-1]).all()  # it learns
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)
    for (name, a), (_, b) in zip(tensors(plain(compiled_state)), tensors(plain(eager_state)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def plain(state):
    return {name: item.state_dict() for name, item in state.items()}


MLP = [*DIGITS, "--model", "mlp", "--recipe", "best", "--epochs", "2", "--val-size", "137", "--compile"]


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_within_an_epoch_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(*MLP, "--output-dir", "whole")
    for at in ((0, 0), (0, 1), (1, 4)):
        kill_at(at, 0, tmp_path, MLP)
        train("--resume", "run")
        assert_same_run(tmp_path / "whole", tmp_path / "run")
        (tmp_path / "run").rename(f"killed at {at}")


def test_what_a_step_may_not_do_is_refused_in_one_line(tmp_path):
    position, calls = Position(), []

    def train_step(images, labels):
        calls.append(0)
        position.steps.add_(1)
        return {"loss": images.mean() / len(calls)}

    with pytest.raises(UserError, match=r"train_step cannot be compiled: .*not the same.*; omit --compile to run"):
        utils.train(start(tmp_path / "run", {"position": position}, compile=True), train_step, ten_images(batch_size=2))


def test_a_step_that_cannot_be_compiled_runs_eagerly_and_is_said_once(tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("no such operation\nmore lines")

    monkeypatch.setattr(compiler, "make_fx", broken)
    position = Position()

    def train_step(images, labels):
        position.steps += 1
        return {"loss": images.mean()}

    run = start(tmp_path / "run", {"position": position}, compile=True)
    utils.train(run, train_step, ten_images(batch_size=2))
    assert position.steps == 10
    assert capsys.readouterr().out.count("not compiled: no such operation\n") == 1


KINDS = {
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.999)}),
    "adam, beta 0": (torch.optim.Adam, {"betas": (0.0, 0.9), "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {}),
    "sgd, momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "maximize": (torch.optim.SGD, {"maximize": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_updates_are_torchs(name, tmp_path):
    """Over 40 steps, while a schedule changes the learning rate, and the momentum once."""
    kind, options = KINDS[name]
    weights = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(1, 30)
        optimizer = kind(layer.parameters(), lr=0.1, fused=True, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))

        def change(row, group=optimizer.param_groups[0]):
            if group.get("momentum"):
                group["momentum"] = 0.5

        state = {"layer": layer, "optimizer": optimizer, "schedule": schedule}
        run = start(tmp_path / str(compiled), state, epochs=8, compile=compiled)
        utils.train(run, fit(layer, optimizer), ten_images(batch_size=2), after_epoch=change)
        weights[compiled] = layer.weight.detach()
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-5, atol=1e-7)


def set_environment(values):
    os.environ.update(values)


def test_without_a_compiler_the_step_runs_eagerly(tmp_path):
    before = partial(set_environment, {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")})
    output, errors = run("train_classifier.py", *MLP, "--dry-run", cwd=tmp_path, before=before)
    assert output.count("not compiled: ") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_cache_on_a_path_with_a_space_is_used_or_refused_in_one_line(tmp_path):
    """Inductor does not quote the paths that it gives to the compiler (torch 2.14)."""
    before = partial(set_environment, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "my cache")})
    output, errors = run("train_classifier.py", *MLP, "--dry-run", cwd=tmp_path, before=before)
    assert "\ncompiled in" in output or output.count("not compiled: ") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_several_processes_run_eagerly_and_say_so(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train_classifier.py"), *MLP, "--dry-run", "--output-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.count("every step runs eagerly: there are several processes") == 1
