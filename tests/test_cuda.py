"""The loop on a CUDA device: the step as a CUDA graph against the ordinary one."""

import csv

import pytest
import torch
from helpers import DIGITS, ROOT, load, run
from test_loop import Position, start, ten_images

import evaluate
import train_cgan
import train_classifier
import train_gan
import utils
from datasets import Batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = [*DIGITS[:2], "--device", "cuda", "--epochs", "2"]
SCRIPTS = {
    "mlp": (train_classifier, ["--model", "mlp", "--recipe", "best"]),
    "cnn": (train_classifier, ["--model", "cnn", "--recipe", "best"]),
    "maxout": (train_classifier, ["--recipe", "paper"]),
    "gan": (train_gan, ["--recipe", "best"]),
    "gan paper": (train_gan, ["--recipe", "paper"]),
    "cgan": (train_cgan, ["--recipe", "best"]),
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def losses(folder):
    return [float(row[key]) for row in csv.DictReader((folder / "metrics.csv").open()) for key in row if "loss" in key]


@pytest.mark.parametrize("name", SCRIPTS)
def test_graph_and_ordinary_steps_give_the_same_losses(tmp_path, name):
    """With the schedule, the short last batch, dropout, noise and distortions of the recipes."""
    script, flags = SCRIPTS[name]
    for folder, more in (("graphed", []), ("ordinary", ["--no-cuda-graph"])):
        script.main([*CUDA, *flags, *more, "--output-dir", folder])
    assert losses(tmp_path / "graphed") == pytest.approx(losses(tmp_path / "ordinary"), rel=0.02)


@pytest.mark.parametrize("name", ["mlp", "gan"])
def test_a_run_under_graphs_resumes_exactly(tmp_path, monkeypatch, name):
    """Stopped and saved in the middle of the second epoch; the steps after it are ordinary, then graphed again."""
    script, flags = SCRIPTS[name]
    script.main([*CUDA, *flags, "--output-dir", "whole"])
    whole_rows = Batches.rows

    def interrupted(self, epoch, start=0):
        for i, rows in enumerate(whole_rows(self, epoch, start), start):
            if self.shuffle and (epoch, i) == (1, 4):
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(Batches, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main([*CUDA, *flags, "--save-interval", "0", "--output-dir", "run"])
    monkeypatch.setattr(Batches, "rows", whole_rows)
    assert load(tmp_path / "run" / "checkpoint.pt")["batch"] == 4
    script.main(["--resume", "run"])
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_every_replay_draws_new_noise(tmp_path, capsys):
    drawn = torch.zeros(12, device="cuda")
    position = Position().cuda()

    def train_step(images, labels):
        drawn.index_copy_(0, position.steps.view(1), torch.rand(1, device="cuda"))
        position.steps += 1
        return {"loss": torch.zeros((), device="cuda")}

    batches = ten_images(batch_size=5)
    batches = Batches(batches.images, batches.labels, 5, "cuda")
    utils.train(start(tmp_path / "run", {"position": position}, epochs=6, batch_size=5), train_step, batches)
    assert len(set(drawn.tolist())) == 12
    assert "not replayed" not in capsys.readouterr().out


# A loss that waits for the device, in G's stage of the step too, where D is frozen.
WAITS = """
import sys
sys.path.insert(0, {root!r})
import torch.nn.functional as F
import train_gan, utils
softplus = F.softplus
F.softplus = lambda logits: softplus(logits) + 0 * logits.sum().item()
utils.run_script(train_gan.main)
"""


def test_a_step_that_cannot_be_captured_ends_with_a_line_and_trains_without_graphs(tmp_path):
    driven = tmp_path / "train_gan.py"
    driven.write_text(WAITS.format(root=str(ROOT)))
    _, errors = run(driven, *CUDA, "--recipe", "best", cwd=tmp_path, code=1)
    assert "cannot be a CUDA graph" in errors
    assert "--no-cuda-graph" in errors
    assert "Traceback" not in errors
    run(driven, *CUDA, "--recipe", "best", "--no-cuda-graph", cwd=tmp_path)


def test_graphs_can_be_turned_off_when_a_run_goes_on(tmp_path):
    run("train_gan.py", *CUDA, "--recipe", "best", "--epochs", "1", "--output-dir", "run", cwd=tmp_path)
    run("train_gan.py", "--resume", "run", "--no-cuda-graph", "--epochs", "2", cwd=tmp_path)


def test_a_schedule_of_the_momentum_takes_the_ordinary_way_and_says_so_once(tmp_path):
    output, _ = run("train_gan.py", *CUDA, "--recipe", "paper", cwd=tmp_path)
    assert output.count("not replayed as a CUDA graph") == 1


@pytest.mark.parametrize("recipe", [["train_classifier.py", "--model", "mlp"], ["train_gan.py"]])
def test_nothing_is_remarked_on(tmp_path, recipe):
    script, *flags = recipe
    output, errors = run(script, *CUDA, *flags, "--recipe", "best", cwd=tmp_path)
    assert "not replayed" not in output
    assert not errors


def test_a_run_from_the_gpu_goes_on_on_the_cpu_and_back(tmp_path):
    run("train_gan.py", *CUDA, "--recipe", "best", "--epochs", "1", "--output-dir", "run", cwd=tmp_path)
    run("train_gan.py", "--resume", "run", "--device", "cpu", "--epochs", "2", cwd=tmp_path)
    run("train_gan.py", "--resume", "run", "--device", "cuda", "--epochs", "3", cwd=tmp_path)
    assert load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 3


@pytest.mark.parametrize("script", [train_gan, train_cgan])
def test_a_generator_is_measured_and_drawn_from(tmp_path, script):
    script.main([*CUDA, "--recipe", "best", "--dry-run", "--output-dir", "run"])
    evaluate.main(["run", "--device", "cuda"])
    evaluate.main(["run", "--device", "cuda", "--samples", "4"])
    assert (tmp_path / "run" / "evaluation" / "metrics.json").is_file()


def test_a_classifier_is_measured(tmp_path):
    train_classifier.main([*CUDA, "--recipe", "best", "--dry-run", "--output-dir", "run"])
    evaluate.main(["run", "--device", "cuda"])
    assert (tmp_path / "run" / "evaluation" / "metrics.json").is_file()


def test_mixed_precision_trains(tmp_path):
    run("train_classifier.py", *CUDA, "--recipe", "best", "--amp", cwd=tmp_path)
    with (tmp_path / "runs" / "cnn-digits" / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["accuracy"]) > 0.5
