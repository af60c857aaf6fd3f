"""The loop on a CUDA device: the step as a CUDA graph against the eager one, and everything else a GPU changes."""

import csv
import subprocess
import sys

import pytest
import torch
from helpers import DIGITS, ROOT, assert_close, killed_at, load
from test_graph import captured_step
from test_loop import Position, fit, start, ten_images

import evaluate
import train_cgan
import train_classifier
import train_gan
import train_likelihood
import utils
from datasets import Batches
from engine.errors import UserError
from measures.parzen import SIGMAS, parzen_log_likelihood

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = [*DIGITS[:2], "--device", "cuda", "--epochs", "2"]
SCRIPTS = {
    "mlp": (train_classifier, ["--model", "mlp", "--recipe", "best"]),
    "cnn amp": (train_classifier, ["--model", "cnn", "--recipe", "best", "--amp"]),
    "maxout paper": (train_classifier, ["--recipe", "paper"]),
    "gan lecture": (train_gan, []),
    "gan": (train_gan, ["--recipe", "best"]),
    "gan amp": (train_gan, ["--recipe", "best", "--amp"]),
    "gan paper": (train_gan, ["--recipe", "paper"]),
    "cgan": (train_cgan, ["--recipe", "best"]),
    "cgan paper": (train_cgan, ["--recipe", "paper"]),
    **{model: (train_likelihood, ["--model", model]) for model in ("vae", "rbm", "rnn", "hmm")},
}


@pytest.fixture
def replays(monkeypatch):
    """Counts the replays of graphs, so that no test compares eager steps with eager steps."""
    counted, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: counted.append(graph) or replay(graph))
    return counted


@pytest.mark.parametrize("name", SCRIPTS)
def test_graphed_and_eager_steps_end_with_the_same_state(tmp_path, monkeypatch, capsys, replays, name):
    """Convolutions add in the same order, which cuDNN leaves to chance otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    script, flags = SCRIPTS[name]
    script.main([*CUDA, *flags, "--output-dir", "graphed"])
    assert len(replays) > 5
    assert "every step runs eagerly" not in capsys.readouterr().out
    del replays[:]
    script.main([*CUDA, *flags, "--no-cuda-graph", "--output-dir", "eager"])
    assert not replays
    assert_close(tmp_path / "graphed", tmp_path / "eager")


@pytest.mark.parametrize("name", ["mlp", "gan", "maxout paper"])
def test_a_run_under_graphs_resumes_exactly(tmp_path, replays, name):
    """Stopped and saved in the middle of the second epoch. The steps after it are eager, then graphed again."""
    script, flags = SCRIPTS[name]
    script.main([*CUDA, *flags, "--output-dir", "whole"])
    with killed_at((1, 4)):
        script.main([*CUDA, *flags, "--save-interval", "0", "--output-dir", "run"])
    assert load(tmp_path / "run" / "checkpoint.pt")["batch"] == 4
    script.main(["--resume", "run"])
    assert replays
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def on_cuda(batch_size):
    batches = ten_images(batch_size)
    return Batches(batches.images, batches.labels, batch_size, "cuda")


def test_every_replay_draws_new_noise(tmp_path, replays):
    drawn = torch.zeros(24, device="cuda")
    position = Position().cuda()

    def train_step(images, labels):
        drawn.index_copy_(0, position.steps.view(1), torch.rand(1, device="cuda"))
        position.steps.add_(1)
        return {"loss": torch.zeros((), device="cuda")}

    utils.train(start(tmp_path / "run", {"position": position}, epochs=12, batch_size=5), train_step, on_cuda(5))
    assert len(replays) == 12  # the first step of each epoch is eager
    assert len(set(drawn.tolist())) == 24


def test_what_only_capture_notices_names_its_cause():
    position = Position().cuda()

    def waiting(rows):
        position.steps.add_(1)
        torch.cuda.synchronize()
        return ()

    step = captured_step(waiting, {}, "cuda", graph=True)
    with pytest.raises(UserError, match=r"capturing.*--no-cuda-graph"):
        step(torch.zeros(2, device="cuda"))
    drawn = torch.zeros(2, device="cuda")

    def drawing(rows):
        drawn.copy_(torch.rand(2, device="cuda"))
        return ()

    step = captured_step(drawing, {}, "cuda", graph=True)
    step(torch.zeros(2, device="cuda"))  # a notebook can go on
    assert drawn.any()


OPTIMIZERS = ["Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop", "SGD", "Adagrad"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_alike_with_and_without_a_graph(tmp_path, capsys, name):
    moved = {}
    for graph in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(1, 1, device="cuda")
        first = layer.weight.item()
        more = {"capturable": True} if name == "RAdam" else {}  # on the GPU, its float32 is off by up to 2 %
        optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.01, **more)

        state = {"layer": layer, "optimizer": optimizer}
        run = start(tmp_path / str(graph), state, epochs=10, batch_size=5, cuda_graph=graph)
        utils.train(run, fit(layer, optimizer), on_cuda(5))
        moved[graph] = layer.weight.item() - first
    assert moved[True] == pytest.approx(moved[False], rel=1e-4, abs=1e-6)
    assert ("every step runs eagerly" in capsys.readouterr().out) == (name in ("SGD", "Adagrad"))


def test_a_gpu_run_resumes_on_the_cpu_and_back_without_graphs_with_new_noise(tmp_path):
    train_gan.main([*CUDA, "--recipe", "best", "--epochs", "1", "--output-dir", "run"])
    first = load(tmp_path / "run" / "checkpoint.pt")["ranks"][0]["random"]["cuda"]
    train_gan.main(["--resume", "run", "--device", "cpu", "--epochs", "2"])
    train_gan.main(["--resume", "run", "--device", "cuda", "--no-cuda-graph", "--epochs", "3"])
    checkpoint = load(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["epoch"] == 3
    assert not torch.equal(checkpoint["ranks"][0]["random"]["cuda"], first)


def test_one_seed_gives_the_same_first_weights_on_every_device():
    weights = []
    for device in ("cuda", "cpu"):
        args = train_gan.flags.parse_args(train_gan.get_args_parser(), train_gan.RECIPES, argv=["--recipe", "paper"])
        torch.manual_seed(0)
        images = torch.randint(0, 256, (200, 1, 28, 28), dtype=torch.uint8)
        state, _, _ = train_gan.build(args, device, Batches(images, torch.zeros(200).long(), 100, device))
        weights.append([p.cpu() for name in ("generator", "discriminator") for p in state[name].parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("script", [train_classifier, train_gan, train_cgan])
def test_a_run_is_evaluated(tmp_path, script):
    script.main([*CUDA, "--recipe", "best", "--dry-run", "--output-dir", "run"])
    evaluate.main(["run", "--device", "cuda"])
    assert (tmp_path / "run" / "evaluation" / "metrics.json").is_file()
    if script != train_classifier:
        evaluate.main(["run", "--device", "cuda", "--samples", "4"])


def test_parzen_windows_are_the_cpus():
    torch.set_float32_matmul_precision("high")
    samples, images = torch.rand(1000, 1, 28, 28), torch.rand(100, 1, 28, 28)
    on_cpu, on_gpu = (parzen_log_likelihood(samples.to(d), images.to(d), SIGMAS).cpu() for d in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu)


@pytest.mark.parametrize("flags", [["--amp"], ["--compile"], ["--compile", "--amp"]])
def test_mixed_precision_and_compiled_networks_train(tmp_path, capsys, replays, flags):
    train_classifier.main([*CUDA, "--recipe", "best", *flags, "--output-dir", "run"])
    assert replays
    assert ("\ncompiled in" in capsys.readouterr().out) == ("--compile" in flags)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[-1]["accuracy"]) > 0.5


@pytest.mark.parametrize("script", [train_gan, train_cgan])
def test_compiled_generators_train(capsys, script):
    script.main([*CUDA, "--compile", "--dry-run"])
    assert "\ncompiled in" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_nccl_trains_like_one_process(tmp_path, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two CUDA devices")
    flags = [*CUDA, "--model", "mlp", "--batch-size", "32", "--optimizer", "sgd", "--lr", "0.01", "--val-size", "29"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = str(ROOT / "train_classifier.py")
    subprocess.run([*command, script, *flags, "--output-dir", "ranks"], cwd=tmp_path, check=True, timeout=300)
    train_classifier.main([*flags, "--output-dir", "one"])
    assert_close(tmp_path / "one", tmp_path / "ranks")
