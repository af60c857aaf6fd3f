"""Several processes that torchrun starts, here two on the CPU, against one."""

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import helpers
import pytest
import torch
from helpers import DIGITS, ROOT, act_at, assert_close, assert_one_line, few_digits, load, same, train
from test_loop import start

import datasets
import datasets.mnist
import models.gan
import utils
from datasets import Batches
from demo import free_port
from engine import distributed, products
from engine import run as run_module
from engine.device import pick_device
from engine.distributed import rank, world_size
from engine.errors import UserError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills processes with POSIX signals")

# 416 images: 13 batches of 32. SGD, because Adam turns rounding in a gradient near 0 into a whole step.
FLAGS = [*DIGITS, "--epochs", "2", "--batch-size", "32", "--val-size", "29", "--optimizer", "sgd", "--lr", "0.01"]
MLP = ["--model", "mlp", *FLAGS, "--batch-size", "33"]  # parts of 17 and 16
SCRIPTS = {
    "mlp": ("train_classifier.py", MLP),
    "cnn": ("train_classifier.py", ["--model", "cnn", "--amp", *FLAGS]),  # whose weights lie channels last then
    "gan": ("train_gan.py", [*FLAGS, "--r1", "0.5", "--ema", "0.99"]),
}


# What a process does before it runs a script --------------------------------------------------------------------------
def without_chance():
    """No dropout, noise that is drawn for the whole batch by each process, and --amp without its rounding.

    Rank 0 finds that oneDNN is faster; the others do not compare.
    """
    few_digits(445)
    products.faster = lambda *_: "onednn" if rank() == 0 else 1 / 0
    torch.nn.Dropout.forward = lambda self, x: x
    torch.autocast = lambda *args, **options: contextlib.nullcontext()
    calls, noise = [], models.gan.UniformNoise.noise

    def whole_noise(self, n, generator=None, device=None):
        if generator:
            return noise(self, n, generator, device)
        calls.append(n)
        generator = torch.Generator().manual_seed(len(calls))
        return noise(self, n * world_size(), generator).tensor_split(world_size())[rank()]

    models.gan.UniformNoise.noise = whole_noise


def one_dies():
    """The second process dies when it comes to the tenth batch of the second epoch, the first time only."""
    few_digits(445)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        act_at((1, 10))


def the_terminal_closes():
    """The first process signals torchrun in the second epoch, and waits until torchrun has passed it on."""
    if os.environ["RANK"] == "0":
        act_at((1, 10), lambda: (os.kill(os.getppid(), signal.SIGHUP), time.sleep(3)))


def one_is_stopped():
    """The last process gets a signal within the second epoch."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        act_at((1, 10), partial(signal.raise_signal, signal.SIGTERM))


def closed_mirror():
    datasets.mnist.MIRRORS["MNIST"] = "http://127.0.0.1:1/"


def nine_images():
    """Train on nine numbered images, in batches of 4, 4 and 1; write down what this process was given and drew."""
    device, seen, drawn = pick_device("cpu"), [], []
    torch.manual_seed(0)

    def train_step(images, labels):
        seen.extend(labels.tolist())
        drawn.append(torch.rand(()).item())
        return {"label": labels.float().mean()}

    batches = Batches(torch.zeros(9, 1, 1, 1, dtype=torch.uint8), torch.arange(9), 4, device)
    run = utils.Run(argparse.Namespace(epochs=1, batch_size=4, log_interval=1, output_dir="run"), {})
    utils.train(run, train_step, batches)
    with open(f"seen-{rank()}.json", "w") as file:
        json.dump([seen, drawn, [row["label"] for row in run.curve]], file)
    torch.distributed.destroy_process_group()


def torchrun(folder, before, *words, code=0, launcher=("--standalone", "--nproc-per-node", "2"), agents=1):
    """Run train_classifier.py in processes that each call `before` first. Returns the errors."""
    path, script = folder / f"{before.__name__}.py", str(ROOT / "train_classifier.py")
    path.write_text(f"""import runpy, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import test_processes
test_processes.{before.__name__}()
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
""")
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(path), *words, "--output-dir", "run"]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=folder, **pipes) for _ in range(agents)]
    said = ""
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code, output + errors
        said += errors
    return said


def run(processes, script, *words, cwd, code=0, first=()):
    """What torchrun does for so many processes, without the seconds that its own start and theirs cost.

    first: what each calls before. Returns the output and the errors of each.
    """
    port = free_port()
    with ThreadPoolExecutor(processes) as pool:
        before = [partial(be_one_of, processes, i, port, first) for i in range(processes)]
        done = [pool.submit(helpers.run, script, *words, cwd=cwd, code=code, before=each) for each in before]
    return [one.result() for one in done]


def be_one_of(processes, i, port, first):
    if processes > 1:
        places = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        settings = {"RESTART_COUNT": 0, "MAX_RESTARTS": 0, "USE_AGENT_STORE": False, "RUN_ID": "test"}
        places.update({f"TORCHELASTIC_{name}": value for name, value in settings.items()})
        os.environ.update({name: str(value) for name, value in places.items()})
    for function in first:
        function()


def test_each_image_goes_to_one_process_and_each_draws_its_own_noise(tmp_path):
    """The last batch, with fewer images than processes, is left out, and is in no report.

    No thread of the process group outlives it: when Python has shut down before it, it aborts the process.
    """
    (tmp_path / "nine.py").write_text("""import glob, test_processes
test_processes.nine_images()
print([open(file).read() for file in glob.glob("/proc/self/task/*/comm")])
""")
    for output, _ in run(2, tmp_path / "nine.py", cwd=tmp_path):
        assert "gloo" not in output.splitlines()[-1]
    (seen, drawn, curve), (others, others_drawn, _) = (
        json.loads((tmp_path / f"seen-{i}.json").read_text()) for i in (0, 1)
    )
    assert len(seen) == len(others) == 4
    assert len({*seen, *others}) == 8
    assert not set(drawn) & set(others_drawn)
    assert curve == [sum(seen[i : i + 2] + others[i : i + 2]) / 4 for i in (0, 2)]
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert float(row["label"]) == sum(seen + others) / 8


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gan", "cnn"))])
def test_two_processes_end_with_the_weights_and_metrics_of_one(tmp_path, name):
    """Also where an edited step reads the gradients between backward() and step(): the MLP's are clipped."""
    script, words = SCRIPTS[name]
    if name == "mlp":
        text, backward = (ROOT / script).read_text(), "loss.backward()"
        script = tmp_path / script
        script.write_text(text.replace(backward, f"{backward}; nn.utils.clip_grad_norm_(model.parameters(), 0.1)"))
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, script, *words, "--output-dir", folder, cwd=tmp_path, first=[without_chance])
        assert load(tmp_path / folder / "checkpoint.pt")["options"]["products"] == "onednn"
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_and_another_number_of_processes_resumes(tmp_path, before, after):
    script, first = "train_classifier.py", [without_chance]
    run(1, script, *MLP, "--output-dir", "whole", cwd=tmp_path, first=first)
    words = [*MLP, "--output-dir", "run"]
    stopped = run(before, script, *words, cwd=tmp_path, code=128 + signal.SIGTERM, first=[*first, one_is_stopped])
    remedy = "train_classifier.py --resume run"
    assert [errors.count(remedy) for _, errors in stopped] == [1, 0][:before]
    checkpoint = load(tmp_path / "run" / "checkpoint.pt")
    assert (checkpoint["epoch"], checkpoint["batch"]) == (1, 11)
    run(after, script, "--resume", "run", cwd=tmp_path, first=first)
    assert_close(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_each_process_resumes_with_its_own_buffers_and_tensors(tmp_path, monkeypatch):
    def start_here(**options):
        network = torch.nn.Linear(1, 1)
        network.register_buffer("chains", torch.zeros(2))
        return start(tmp_path / "run", {"network": network, "queue": torch.zeros(1)}, **options), network

    run, _ = start_here()
    monkeypatch.setattr(run_module, "world_size", lambda: 2)
    of_second = {"network.chains": torch.ones(2), "queue": torch.ones(3)}
    monkeypatch.setattr(run_module, "all_gather", lambda part: [part, {**part, "buffers": of_second}])
    run.save()
    run.lock.release()
    monkeypatch.setattr(run_module, "rank", lambda: 1)
    run, network = start_here(resume=str(tmp_path / "run"))
    run.restore()
    assert network.chains.tolist() == [1, 1]
    assert run.state["queue"].tolist() == [1, 1, 1]


def test_a_frozen_weight_may_be_unfrozen_in_several_processes(monkeypatch):
    weight, summed = torch.ones(1), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "collective", contextlib.nullcontext)
    monkeypatch.setattr(distributed.dist, "all_reduce", summed.append)
    distributed.sum_gradients([weight], lambda: 0.5)
    assert not weight.requires_grad
    weight.requires_grad_().sum().backward()
    assert summed == [0.5]


def test_gradients_are_also_summed_of_weights_that_no_optimizer_holds(tmp_path, monkeypatch):
    layer, seen = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(run_module, "sum_gradients", lambda weights, _: seen.extend(weights))
    start(tmp_path / "run", {"layer": layer})
    assert {*layer.parameters()} < {*seen}


def test_a_signal_to_torchrun_saves_the_run(tmp_path):
    errors = torchrun(tmp_path, the_terminal_closes, *MLP, code=1)
    assert errors.count("stopped and saved") == 1
    assert load(tmp_path / "run" / "checkpoint.pt")["batch"] == 11


def test_an_error_in_the_data_is_printed_once(tmp_path):
    """Rank 0 alone tries to download. The mirror is a closed local port."""
    words = ["--data-dir", "data", "--output-dir", "run"]
    ended = run(2, "train_classifier.py", *words, cwd=tmp_path, code=1, first=[closed_mirror])
    said, other = sorted((errors for _, errors in ended), key=lambda errors: "downloaded" not in errors)
    assert_one_line(said, "could not be downloaded", "train-images-idx3-ubyte is missing")
    assert_one_line(other, "another process of this job has ended; its own message says why")
    assert not (tmp_path / "run").exists()


def test_the_reason_of_a_failed_collective_is_named():
    """NCCL's own failures come to every rank; out of memory has a message of its own."""
    with pytest.raises(UserError, match="says why, or this: NCCL error no shared memory"), distributed.collective():
        raise RuntimeError("NCCL error\nno shared memory")
    with pytest.raises(torch.OutOfMemoryError), distributed.collective():
        raise torch.OutOfMemoryError("CUDA out of memory")


class OnGPU(torch.Tensor):
    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_buffers_of_each_process_are_sent_from_the_cpu(tmp_path, monkeypatch):
    network, sent = torch.nn.Linear(1, 1), []
    network.register_buffer("chains", torch.zeros(2).as_subclass(OnGPU), persistent=False)
    begun = start(tmp_path / "run", {"network": network})
    monkeypatch.setattr(run_module, "world_size", lambda: 2)
    monkeypatch.setattr(run_module, "all_gather", lambda part: sent.append(part) or [part, part])
    begun.save()
    assert type(sent[0]["buffers"]["network.chains"]) is torch.Tensor


def test_batches_too_small_for_the_processes_are_refused(tmp_path, monkeypatch):
    for processes, size in ((2, 6), (4, 4)):  # the last 3 in parts of 2 and 1; all but the last, which is skipped
        monkeypatch.setattr(utils, "world_size", lambda processes=processes: processes)
        with pytest.raises(UserError, match="batch norm of the model: one image would form a batch by itself"):
            train(*DIGITS, "--model", "mlp", "--batch-norm", "--batch-size", size)
    monkeypatch.setattr("engine.run.world_size", lambda: 2)
    with pytest.raises(UserError, match="--batch-size 1 is less than the 2 processes"):
        train(*DIGITS, "--batch-size", "1", "--output-dir", tmp_path / "run")


@pytest.mark.slow
def test_after_the_death_of_a_process_torchrun_ends_with_the_same_run(tmp_path, monkeypatch):
    """On two machines: two agents, of which only the one whose process died counts a restart."""
    run(2, "train_classifier.py", *MLP, "--output-dir", "whole", cwd=tmp_path, first=[partial(few_digits, 445)])
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    place = f"localhost:{free_port()}"
    launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", place, "--rdzv-id", "mine"]
    errors = torchrun(tmp_path, one_dies, *MLP, "--save-interval", "0", "--auto-resume", launcher=launcher, agents=2)
    assert re.search("another process of this job has ended|: interrupted", errors)  # or torchrun stops it before that
    whole, again = (load(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "run"))
    assert same(whole["state"], again["state"])
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "run" / "metrics.csv").read_bytes()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["processes"] == 2
    assert "job" not in config
