"""Several processes that torchrun starts, here two on the CPU, against one."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import helpers
import pytest
import torch
from helpers import DIGITS, ROOT, load, tensors

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills processes with POSIX signals")

# 1,408 images: 44 batches of 32. SGD, because Adam turns rounding in a gradient near 0 into a whole step.
FLAGS = [*DIGITS, "--epochs", "2", "--batch-size", "32", "--val-size", "29", "--optimizer", "sgd", "--lr", "0.01"]
SCRIPTS = {
    "mlp": ("train_classifier.py", ["--model", "mlp", *FLAGS, "--batch-size", "33"]),  # parts of 17 and 16
    "cnn": ("train_classifier.py", ["--model", "cnn", "--amp", *FLAGS]),  # whose weights lie channels last then
    "gan": ("train_gan.py", [*FLAGS, "--r1", "0.5", "--ema", "0.99"]),
    "cgan": ("train_cgan.py", FLAGS),
}

# Runs a script without dropout and with noise that is drawn for the whole batch, whatever the number of processes, and
# --amp without its rounding.
WITHOUT_CHANCE = """
import contextlib, runpy, sys
sys.path.insert(0, {root!r})
import torch
import models.cgan, models.gan
from engine.distributed import rank, world_size
torch.nn.Dropout.forward = lambda self, x: x
torch.autocast = lambda *args, **options: contextlib.nullcontext()
calls = 0
def for_all_ranks(noise):
    def whole_noise(self, n, generator=None, device=None):
        global calls
        if generator:
            return noise(self, n, generator, device)
        calls += 1
        return noise(self, n * world_size(), torch.Generator().manual_seed(calls)).tensor_split(world_size())[rank()]
    return whole_noise
for kind in (models.gan.Generator, models.cgan.ConditionalGenerator):
    kind.noise = for_all_ranks(kind.noise)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""

# Runs a script; the second process dies when it comes to the tenth batch of the second epoch, the first time only.
ONE_DIES = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from datasets import Batches
whole = Batches.rows
def rows(self, number, start=0):
    for i, batch in enumerate(whole(self, number, start), start):
        first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if self.shuffle and (number, i) == (1, 10) and os.environ["RANK"] == "1" and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
Batches.rows = rows
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""

# Runs a script without a network.
CLOSED_MIRROR = """
import runpy, sys
sys.path.insert(0, {root!r})
from datasets.mnist import MIRRORS
MIRRORS["MNIST"] = "http://127.0.0.1:1/"
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""

# Trains on ten images, numbered, in batches of 4, 4 and 2; each process writes down what it was given and drew.
TEN_IMAGES = """
import argparse, json, sys
sys.path.insert(0, {root!r})
import torch
import utils
from datasets import Batches
from engine.device import pick_device
from engine.distributed import rank
args = argparse.Namespace(epochs=1, batch_size=4, log_interval=1, output_dir="run")
device = pick_device("cpu")
torch.manual_seed(0)
seen, drawn = [], []
def train_step(images, labels):
    seen.extend(labels.tolist())
    drawn.append(torch.rand(()).item())
    return {{"label": labels.float().mean()}}
batches = Batches(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.arange(10), 4, device)
utils.train(utils.Run(args, {{}}), train_step, batches)
open(f"seen-{{rank()}}.json", "w").write(json.dumps([seen, drawn]))
torch.distributed.destroy_process_group()
"""


def start(processes, script, *flags, cwd, more=()):
    """Start a script in so many processes, by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *more]
    command = [sys.executable, *launcher, str(script), *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def torchrun(*args, code=0, **kwargs):
    process = start(*args, **kwargs)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output + errors
    return output, errors


def run(processes, script, *flags, cwd):
    """What torchrun does for so many processes, without the seconds that its own start and theirs cost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = [partial(be_one_of, processes, i, port) for i in range(processes)] if processes > 1 else [None]
    with ThreadPoolExecutor(processes) as pool:
        done = [pool.submit(helpers.run, script, *flags, cwd=cwd, before=function) for function in before]
    for one in done:
        one.result()


def be_one_of(processes, i, port):
    places = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {"RESTART_COUNT": 0, "MAX_RESTARTS": 0, "USE_AGENT_STORE": False, "RUN_ID": "test"}
    places.update({f"TORCHELASTIC_{name}": value for name, value in settings.items()})
    os.environ.update({name: str(value) for name, value in places.items()})


def driver(code, script, folder):
    path = folder / f"driven_{script}"
    path.write_text(code.format(root=str(ROOT), script=str(ROOT / script)))
    return path


def test_the_death_of_a_process_ends_the_job_with_a_line_that_says_so(tmp_path):
    driven = driver(ONE_DIES, "train_classifier.py", tmp_path)
    _, errors = torchrun(2, driven, *SCRIPTS["mlp"][1], "--output-dir", "run", cwd=tmp_path, code=1)
    assert "another process of this job has ended" in errors
    assert load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


@pytest.mark.slow
def test_auto_resume_needs_a_folder_that_a_restart_finds_again(tmp_path):
    flags = [*SCRIPTS["mlp"][1], "--auto-resume"]
    script = ROOT / "train_classifier.py"
    _, errors = torchrun(2, script, *flags, cwd=tmp_path, more=["--max-restarts", "1"], code=1)
    assert "train_classifier.py: error: --auto-resume needs --output-dir" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_restart_takes_over_nothing_that_another_job_left(tmp_path):
    (tmp_path / "run").mkdir()
    before = {"theirs.txt": "theirs", "config.json": '{"commit": "another"}'}
    for path, text in before.items():
        (tmp_path / "run" / path).write_text(text)
    flags = [*DIGITS, "--auto-resume", "--output-dir", "run"]
    _, errors = torchrun(2, ROOT / "train_classifier.py", *flags, cwd=tmp_path, more=["--max-restarts", "1"], code=1)
    lines = [line for line in errors.splitlines() if line.startswith("train_classifier.py: error: ") and "run" in line]
    assert sum("is not empty" in line for line in lines) >= 2  # at the start, and at the restart
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == before


def test_an_error_in_the_data_is_printed_once(tmp_path):
    """Rank 0 alone tries to download. The mirror is a closed local port."""
    driven = driver(CLOSED_MIRROR, "train_classifier.py", tmp_path)
    _, errors = torchrun(2, driven, "--data-dir", "data", "--output-dir", "run", cwd=tmp_path, code=1)
    assert errors.count("could not be downloaded") == 1
    assert errors.count("train-images-idx3-ubyte is missing") == 1
    assert errors.count("Traceback") == 1  # torchrun's own, after the script's lines
    assert not (tmp_path / "run").exists()


def test_batch_norm_over_a_part_of_one_image_is_one_line(tmp_path):
    flags = [*DIGITS, "--model", "mlp", "--batch-norm", "--batch-size", "6"]  # the last 3 in parts of 2 and 1
    _, errors = torchrun(2, ROOT / "train_classifier.py", *flags, cwd=tmp_path, code=1)
    assert "batch norm: one of 1437 images would form a batch by itself" in errors


@pytest.mark.slow
def test_fewer_images_in_a_batch_than_processes_is_one_line(tmp_path):
    flags = [*DIGITS, "--batch-size", "1", "--output-dir", "run"]
    _, errors = torchrun(2, ROOT / "train_classifier.py", *flags, cwd=tmp_path, code=1)
    assert "--batch-size 1 is less than the 2 processes" in errors


def test_a_last_batch_that_is_left_out_is_in_no_report(tmp_path):
    """With a report after every step; of 1,437 images, batches of 4 leave one."""
    flags = [*DIGITS, "--model", "mlp", "--batch-size", "4", "--log-interval", "1", "--output-dir", "run"]
    run(2, ROOT / "train_classifier.py", *flags, "--epochs", "1", cwd=tmp_path)
    assert len(load(tmp_path / "run" / "checkpoint.pt")["curve"]) == 359


def assert_close(a, b):
    others = dict(tensors(load(b / "checkpoint.pt")["state"]))
    for name, value in tensors(load(a / "checkpoint.pt")["state"]):
        torch.testing.assert_close(value, others[name], atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["mlp", "cnn", "gan", pytest.param("cgan", marks=pytest.mark.slow)])
def test_two_processes_end_with_the_weights_and_metrics_of_one(tmp_path, name):
    script, flags = SCRIPTS[name]
    driven = driver(WITHOUT_CHANCE, script, tmp_path)
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, driven, *flags, "--output-dir", folder, cwd=tmp_path)
    assert_close(tmp_path / "one", tmp_path / "two")
    one, two = (list(csv.DictReader((tmp_path / folder / "metrics.csv").open())) for folder in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        assert [float(value) for value in row.values()] == pytest.approx(
            [float(value) for value in other.values()], abs=1e-3
        )


def test_each_image_goes_to_one_process_and_each_draws_its_own_noise(tmp_path):
    run(2, driver(TEN_IMAGES, "x.py", tmp_path), cwd=tmp_path)
    (seen, drawn), (others, others_drawn) = (json.loads((tmp_path / f"seen-{i}.json").read_text()) for i in (0, 1))
    assert len(seen) == len(others) == 5
    assert sorted(seen + others) == list(range(10))
    assert not set(drawn) & set(others_drawn)
    assert float(next(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))["label"]) == 4.5


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_resumes_with_another_number_of_processes(tmp_path, before, after):
    driven = driver(WITHOUT_CHANCE, "train_classifier.py", tmp_path)
    flags = SCRIPTS["mlp"][1]
    run(1, driven, *flags, "--output-dir", "whole", cwd=tmp_path)
    stopped = start(before, driven, *flags, "--save-interval", "0", "--output-dir", "run", cwd=tmp_path)
    for line in stopped.stdout:
        if line.startswith("epoch 1/"):
            break
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=120)
    assert "stopped and saved; resume with: python train_classifier.py --resume run" in errors
    assert load(tmp_path / "run" / "checkpoint.pt")["epoch"] < 2
    run(after, driven, "--resume", "run", cwd=tmp_path)
    assert_close(tmp_path / "whole", tmp_path / "run")


def test_after_the_death_of_a_process_torchrun_ends_with_the_same_run(tmp_path):
    flags = [*SCRIPTS["mlp"][1], "--save-interval", "0"]
    driven = driver(ONE_DIES, "train_classifier.py", tmp_path)
    more = ["--max-restarts", "1"]
    run(2, ROOT / "train_classifier.py", *flags, "--output-dir", "whole", cwd=tmp_path)
    torchrun(2, driven, *flags, "--auto-resume", "--output-dir", "run", cwd=tmp_path, more=more)
    whole, again = (load(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "run"))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(whole["state"]), tensors(again["state"])))
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "run" / "metrics.csv").read_bytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """Such a thread aborts the process now and then, when Python has shut down before it."""
    list_threads = "print([open(f'/proc/self/task/{{t}}/comm').read() for t in os.listdir('/proc/self/task')])"
    driven = driver(ONE_DIES + list_threads, "train_classifier.py", tmp_path)
    output, _ = torchrun(1, driven, *SCRIPTS["mlp"][1], "--epochs", "1", "--output-dir", "run", cwd=tmp_path)
    threads = output.splitlines()[-1]
    assert "python" in threads
    assert "gloo" not in threads


@pytest.mark.slow
def test_two_machines_end_with_the_same_run_too(tmp_path, monkeypatch):
    """Two agents, of which only the one whose process died counts a restart."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    driven = driver(ONE_DIES, "train_classifier.py", tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"localhost:{probe.getsockname()[1]}"
    launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", place, "--rdzv-id", "mine"]
    flags = [*SCRIPTS["mlp"][1], "--save-interval", "0", "--auto-resume", "--output-dir", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(driven), *flags]
    agents = [subprocess.Popen(command, cwd=tmp_path, text=True, stderr=subprocess.PIPE) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors
    assert [row["epoch"] for row in load(tmp_path / "run" / "checkpoint.pt")["history"]] == [1, 2]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["processes"] == 2
    assert "job" not in config
