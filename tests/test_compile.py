"""--compile: the compiled step against the eager one.

The compiled step draws the same random numbers, so the losses of the two may differ by rounding alone. Training
multiplies such differences: where a gradient is nothing but rounding errors, Adam makes a step of full size of it. The
two are therefore compared in double precision.
"""

import argparse
import itertools
import os
from functools import partial

import pytest
import torch
from helpers import DIGITS, assert_same_run, few_digits, killed_at, run, tensors, train
from helpers import load as load_checkpoint
from test_capture import CASES as EVERY_STEP
from test_loop import fit, start, ten_images

import models
import train_classifier
import utils
from datasets import Batches, load
from engine import captured, compiler, flags, products
from models.resnet import ResNet

CASES = {  # the quick one, and those of test_capture.py that have operations of their own
    "mlp lecture": (train_classifier, ["--model", "mlp", "--weight-decay", "0.1"]),
    **{name: case for name, case in EVERY_STEP.items() if name not in ("mlp", "gan", "gan paper", "cgan")},
}
ROWS = {"hmm": 4, "rnn": 4}  # of the middle of the images: the graph grows with them, and a compilation takes minutes
STEPS = 20  # more would not see more: rounding in double precision stays below 1e-14, and a fault shows at once


def losses(case, folder, *more):
    """The losses of each of the first steps, and the state after them."""
    script, words = CASES[case]
    words = [*words, *DIGITS, "--batch-size", "20", "--output-dir", str(folder), *more]
    args = flags.parse_args(script.get_args_parser(), script.RECIPES, script.VARIANTS, words)
    torch.manual_seed(0)
    images, labels = load("digits", None)
    images = images[:, :, 12 : 12 + ROWS[case]] if case in ROWS else images
    batches = Batches(images, labels, args.batch_size, "cpu", black=getattr(args, "black", 0.0))
    state, train_step, _ = script.build(args, torch.device("cpu"), batches)
    run = utils.Run(args, state)
    step, means = utils.make_step(run, train_step, batches), []
    rows = (rows for epoch in itertools.count() for rows in batches.rows(epoch) if len(rows) == args.batch_size)
    for batch in itertools.islice(rows, STEPS):
        step(batch)
        run.batch += 1
        means.append([value for name, value in run.meter.report().items() if name.startswith("loss")])
    run.lock.release()
    return torch.tensor(means), run.content()


def small_resnet(classes):
    """The residual network with one block: each of its operations once or twice, which saves a minute."""
    layers = [*ResNet(classes).model]
    return torch.nn.Sequential(*layers[:4], *layers[-3:-1], torch.nn.Linear(48, classes))


@pytest.fixture
def double_precision(monkeypatch):
    monkeypatch.setitem(models.CLASSIFIERS, "resnet", small_resnet)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "mlp lecture")) for case in CASES]
)
def test_the_compiled_step_is_the_eager_step_but_for_rounding(double_precision, case, tmp_path, capsys):
    eager, eager_state = losses(case, tmp_path / "eager")
    compiled, compiled_state = losses(case, tmp_path / "compiled", "--compile")
    assert "\ncompiled in" in capsys.readouterr().out
    assert compiled[0].ne(compiled[-1]).all()  # it learns
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)
    for (name, a), (_, b) in zip(tensors(compiled_state), tensors(eager_state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


MLP = [*DIGITS, "--model", "mlp", "--recipe", "best", "--epochs", "2", "--val-size", "137"]


def kill_and_resume(tmp_path, at, *flags):
    """A run, within an epoch: it ends as the uninterrupted one."""
    train(*MLP, *flags, "--output-dir", tmp_path / "whole")
    with killed_at(at):
        train(*MLP, *flags, "--save-interval", 0, "--output-dir", tmp_path / "run")
    train("--resume", tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_compiled_run_that_is_killed_before_its_step_is_captured_resumes_exactly(tmp_path):
    kill_and_resume(tmp_path, (0, 1), "--compile")


KINDS = {
    "adam, beta 0": (torch.optim.Adam, {"betas": (0.0, 0.9), "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd, momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "maximize": (torch.optim.SGD, {"maximize": True}),
    "frozen": (torch.optim.Adam, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_updates_are_torchs(name, tmp_path, capsys):
    """Over 40 steps, compiled once, while a schedule changes the learning rate, and `after_epoch` the momentum and
    the learning rate, to a number.

    Of a layer whose weight was frozen at first, weight and bias have a bias correction each.
    """
    kind, options = KINDS[name]
    weights = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(1, 30)
        optimizer = kind(layer.parameters(), lr=0.1, fused=True, **options)
        for _ in range(50 if name == "frozen" else 0):  # of the bias alone
            layer.bias.grad = torch.ones_like(layer.bias)
            optimizer.step()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))

        def change(row, group=optimizer.param_groups[0]):
            if group.get("momentum"):
                group["momentum"] -= 0.01
            group["lr"] = float(group["lr"])

        state = {"layer": layer, "optimizer": optimizer, "schedule": schedule}
        run = start(tmp_path / str(compiled), state, epochs=8, compile=compiled)
        utils.train(run, fit(layer, optimizer), ten_images(batch_size=2), after_epoch=change)
        weights[compiled] = layer.weight.detach()
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-5, atol=1e-7)
    assert capsys.readouterr().out.count("compiled in") == (name not in ("amsgrad", "maximize"))  # which run eagerly


def test_a_step_that_sets_random_numbers_back_is_not_compiled_but_runs_eagerly_and_is_said_once(tmp_path, capsys):
    network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, network, use_reentrant=False)
    before = network[0].weight.detach().clone()
    run = start(tmp_path / "run", {"network": network, "optimizer": optimizer}, compile=True)
    utils.train(run, fit(recomputed, optimizer), ten_images(batch_size=2))
    assert not torch.equal(network[0].weight, before)
    reason = "when compiled, it draws other random numbers, as with torch.utils.checkpoint or, on CUDA, torch.bernoulli"
    assert capsys.readouterr().out.count(f"not compiled: {reason}\n") == 1


def test_dropout_within_attention_is_not_compiled():
    """Its memory is in another order than its dimensions, which Inductor changes."""
    x = torch.rand(5, 3, 4).transpose(0, 1)
    with pytest.raises(RuntimeError, match="dropout of a transposed tensor"):
        compiler.compile_step(lambda x: torch.empty_like(x).bernoulli_(0.5), [x], {}, {}, {})


def products_of(layer, x, out):
    """Products with and without a bias, of matrices in other memory orders, expanded ones, and a bias that is none."""
    y = torch.addmm(layer.bias, x, layer.weight.t())
    z = y.t() @ y + y.mean().expand(6, 6) @ layer.weight[:, :6]
    out.copy_(torch.addmm(z, layer.weight, layer.weight.t()) + torch.addmm(layer.bias, z, z, beta=0.5))


def test_products_by_onednn_are_torchs_but_for_rounding(monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_, **__: graphs.append(graph) or graph)
    layer, x, out, graphs = torch.nn.Linear(7, 6), torch.rand(5, 7), torch.empty(6, 6), []
    run = argparse.Namespace(args=argparse.Namespace(products="onednn"), device=lambda: torch.device("cpu"))
    step, inputs = partial(products_of, layer), [x, out]
    with torch.no_grad():
        compiler.compile_step(step, inputs, {}, {}, products.in_compiled(step, inputs, run))(*inputs)
        products_of(layer, x, expected := torch.empty(6, 6))
    torch.testing.assert_close(out, expected)
    operations = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("onednn_products.mm" in name for name in operations) == 3
    assert sum("aten.addmm" in name for name in operations) == 2  # whose biases are a matrix, and scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_eager_step_has_onednns_products_until_it_ends(dtype, monkeypatch):
    layer, x, out, calls = torch.nn.Linear(7, 6, dtype=dtype), torch.rand(5, 7, dtype=dtype), torch.empty(6, 6), []
    onednn = products.onednn
    monkeypatch.setattr(products, "onednn", lambda *args: calls.append(args) or onednn(*args))
    with torch.no_grad():
        products.by_onednn(products_of, layer, x, out)
        replaced = len(calls)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            products.by_onednn(torch.mm, x, x)
        assert products.by_onednn(torch.mm, x[:, :0], x[:0]).tolist() == [[0] * 7] * 5
        products_of(layer, x, expected := torch.empty(6, 6))
    torch.testing.assert_close(out, expected)
    assert len(calls) == replaced == (3 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("flags", [[], pytest.param(["--compile"], marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_run_chooses_the_faster_products_and_a_resumed_run_keeps_them(flags, tmp_path, monkeypatch, capsys):
    few_digits(500)
    monkeypatch.setattr(products, "WORTH", 0.9)
    seconds = itertools.cycle([0.001, 0.0005])  # torch's, oneDNN's
    monkeypatch.setattr(products, "seconds", lambda products: next(seconds))
    kill_and_resume(tmp_path, (1, 4), *flags)
    assert capsys.readouterr().out.count("products: onednn (torch's take 1.00 ms a step, ") == 2
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["options"]["products"] == "onednn"
    losses = {}
    for name in ("torch", "onednn"):
        train(*MLP, *flags, "--products", name, "--output-dir", tmp_path / name)
        losses[name] = [row["loss"] for row in load_checkpoint(tmp_path / name / "checkpoint.pt")["history"]]
    assert losses["torch"] == pytest.approx(losses["onednn"], abs=0.01)  # Adam multiplies rounding
    assert losses["torch"] != losses["onednn"]


def set_cache(folder, path):
    os.environ.update({"TORCHINDUCTOR_CACHE_DIR": folder, **path})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path"), [("empty", {"PATH": ""}), ("my cache", {})])
def test_without_a_compiler_or_with_a_space_in_its_paths_a_process_trains(tmp_path, name, path):
    """In the second case, compiled or not: Inductor does not quote the paths it gives to the compiler."""
    before = partial(set_cache, str(tmp_path / name), path)
    output, errors = run("train_classifier.py", *MLP, "--compile", "--dry-run", cwd=tmp_path, before=before)
    assert output.count("not compiled: ") == 1 or (not path and "\ncompiled in" in output)
    assert "Traceback" not in errors


@pytest.mark.parametrize(("processes", "reason"), [(2, "there are several processes"), (1, "Adagrad takes its")])
def test_what_cannot_be_captured_runs_eagerly_and_says_so(tmp_path, monkeypatch, capsys, processes, reason):
    monkeypatch.setattr(captured, "world_size", lambda: processes)
    weight = torch.zeros(1, requires_grad=True)
    state = {"weight": weight, "optimizer": torch.optim.Adagrad([weight], lr=0.1)}
    step = captured.capture(len, start(tmp_path / "run", state, compile=True), 2)
    assert not isinstance(step, captured.CapturedStep)
    assert capsys.readouterr().out.count(f"every step runs eagerly: {reason}") == 1
