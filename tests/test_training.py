"""The training scripts as their user runs them. A new process starts only where it dies, gets a signal, or exits."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import DIGITS, ROOT, act_at, assert_same_run, few_digits, killed_at, load, run, same, save_sealed, train
from test_loop import start

import datasets
import evaluate
import train_cgan
import train_classifier
import train_gan
import train_likelihood
from engine import flags, folder, provenance
from engine import run as run_module
from engine.checkpoint import load_checkpoint, write_atomically
from engine.device import pick_device
from engine.errors import UserError
from models import CLASSIFIERS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills processes with POSIX signals")

MLP = [*DIGITS, "--model", "mlp"]
EVERYTHING = [*MLP, "--recipe", "best", "--epochs", "3", "--val-size", "137"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(*EVERYTHING, "--output-dir", folder)
    return folder


# Killed, stopped, resumed ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("at", "save_interval"), [((0, 1), 0), ((1, 4), 1000)])
def test_killed_at_a_step_and_resumed_gives_the_same_run(undisturbed, tmp_path, at, save_interval):
    with killed_at(at):
        train(*EVERYTHING, "--output-dir", "run", "--save-interval", save_interval)
    epoch, batch = at
    checkpoint = load(tmp_path / "run" / "checkpoint.pt")
    assert (checkpoint["epoch"], checkpoint["batch"]) == ((epoch, batch) if save_interval == 0 else (epoch, 0))
    train("--resume", "run")
    assert_same_run(undisturbed, tmp_path / "run")
    seconds = load(tmp_path / "run" / "checkpoint.pt")["seconds"]
    assert seconds[epoch] > checkpoint["seconds"][epoch] >= 0  # the time before the kill counts too


def test_a_process_that_is_killed_resumes_with_the_same_command(undisturbed, tmp_path, capsys):
    """SIGKILL, and --auto-resume."""
    words = [*EVERYTHING, "--auto-resume", "--output-dir", "run"]
    before = partial(act_at, (0, 3))
    run("train_classifier.py", *words, "--save-interval", 0, cwd=tmp_path, code=-signal.SIGKILL, before=before)
    assert load(tmp_path / "run" / "checkpoint.pt")["batch"] == 3
    Path("run/checkpoint.pt").rename("run/previous.pt")  # as if it had been killed between the two renames of a save
    train(*words)
    assert_same_run(undisturbed, tmp_path / "run")
    capsys.readouterr()
    train(*words)
    assert "finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


OTHERS = {
    "rbm": (train_likelihood, ["--model", "rbm", "--hidden", "16"]),  # with persistent chains
    "hmm": (train_likelihood, ["--model", "hmm", "--states", "56", "--binarise", "fixed"]),
    "vae": (train_likelihood, ["--model", "vae", "--importance-samples", "3", "--ema", "0.9"]),
    "maxout paper": (train_classifier, ["--recipe", "paper", "--val-size", "10"]),
    "cgan": (train_cgan, ["--ema", "0.99"]),
    "gan paper with amp": (train_gan, ["--recipe", "paper", "--val-size", "10", "--amp"]),
    "rnn": (train_likelihood, ["--model", "rnn", "--val-size", "10"]),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name not in ("rbm", "hmm")]


@pytest.mark.parametrize("name", ["rbm", "hmm", *SLOW])
def test_other_networks_resume_exactly_too(tmp_path, name):
    few_digits(110)
    script, words = OTHERS[name]
    words = [*DIGITS, "--epochs", "2", "--batch-size", "20", *words]
    script.main([*words, "--output-dir", "whole"])
    with killed_at((1, 3)):
        script.main([*words, "--output-dir", "run", "--save-interval", "0"])
    script.main(["--resume", "run"])
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    for image in (tmp_path / "whole").glob("**/epoch-*.png"):
        assert image.read_bytes() == (tmp_path / "run" / "samples" / image.name).read_bytes()


# What may change on resume --------------------------------------------------------------------------------------------
def test_the_page_lists_the_flags_that_may_change_on_resume():
    text = (ROOT / "docs" / "how.md").read_text()
    listed = re.findall(r"`--([a-z-]+)`", text.partition("You may change")[2].partition("\n\n")[0])
    where = {"resume", "output_dir", "auto_resume"}  # of the run itself
    assert {flag.replace("-", "_") for flag in listed} == flags.FREE_ON_RESUME - where


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model cnn", "--model cnn: .* was trained with model=mlp; omit --model cnn"),
        ("--betas 0.5 0.9", r"--betas 0.5 0.9: .* was trained with betas=\[0.9, 0.999\]; omit --betas 0.5 0.9"),
        ("--recipe lecture", "--recipe lecture: .*recipe=best"),
        ("--no-augment", "--no-augment: .*augment=True"),
        ("--epochs 9", "--epochs 9: this run's schedule ends with its last epoch; .* --start-from"),
        ("--output-dir other", "--resume names the run folder; omit --output-dir"),
    ],
)
def test_any_other_flag_is_refused_on_resume(undisturbed, words, message):
    with pytest.raises(UserError, match=message):
        train("--resume", undisturbed, *words.split())


def test_resume_after_the_network_was_edited_is_refused(undisturbed, tmp_path):
    checkpoint = load(undisturbed / "checkpoint.pt")
    del checkpoint["state"]["model"]["linear4.bias"]
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match=r"run does not match the code.*linear4\.bias"):
        train("--resume", "run")


def test_resume_from_previous_pt_keeps_it_until_a_valid_checkpoint_is_there(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    good = (tmp_path / "run" / "previous.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    checkpoint = load_checkpoint(tmp_path / "run")
    write_atomically(tmp_path / "run" / "checkpoint.pt", good)
    assert (tmp_path / "run" / "previous.pt").read_bytes() == good
    assert checkpoint["epoch"] == 2


# The run folder -------------------------------------------------------------------------------------------------------
def test_a_dry_run_takes_a_few_steps_and_writes_all_files_of_a_run(tmp_path, capsys):
    train(*EVERYTHING, "--dry-run")
    folder = tmp_path / "runs" / "dry-run-mlp-digits"
    names = {".lock", "config.json", "metrics.csv", "curve.csv", "seconds.csv", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names | {"checkpoint.pt", "previous.pt", "best.pt"}
    assert load(folder / "checkpoint.pt")["state"]["schedule"]["last_epoch"] == 8
    config = json.loads((folder / "config.json").read_text())
    assert (config["options"]["epochs"], config["torch"]) == (3, torch.__version__)
    (row,) = csv.DictReader((folder / "metrics.csv").open())
    assert set(row) == {"epoch", "loss", "accuracy", "val_loss", "val_accuracy"}
    output = capsys.readouterr().out
    assert "whose results mean nothing; to train, omit --dry-run" in output
    assert "evaluate" not in output


def test_a_run_that_is_being_trained_is_not_resumed_a_second_time(undisturbed):
    lock = folder.lock(undisturbed)
    with pytest.raises(UserError, match=r"another process is training in .*run"):
        train("--resume", undisturbed)
    lock.release()
    train("--resume", undisturbed)


def test_resume_reads_what_another_process_saved_before_it_released_the_lock(monkeypatch, capsys):
    train(*MLP, "--epochs", 1, "--output-dir", "run")

    def late(folder, *, lock=run_module.lock):
        monkeypatch.setattr(run_module, "lock", lock)
        train("--resume", "run", "--epochs", 2)
        capsys.readouterr()
        return lock(folder)

    monkeypatch.setattr(run_module, "lock", late)
    train("--resume", "run", "--epochs", 3)
    with pytest.raises(UserError, match=r"^--epochs 2: run has trained 3; omit --epochs, or name more$"):
        train("--resume", "run", "--epochs", 2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")] == ["3/3"]


def test_config_names_every_commit_that_a_run_was_trained_with(tmp_path, monkeypatch):
    whole = run_module.environment
    for commit in ("first-dirty", "first", "second", "second"):
        monkeypatch.setattr(run_module, "environment", lambda commit=commit: {**whole(), "commit": commit})
        begun = start(tmp_path / "run", {}, resume=str(tmp_path / "run") if commit != "first-dirty" else None)
        begun.write_config()
        begun.lock.release()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["commit"] == "first-dirty, then first, then second"
    assert config["device"] == "cpu"


def test_a_checkpoint_names_the_code_that_trains_and_not_an_edit_that_follows(tmp_path, monkeypatch):
    begun = start(tmp_path / "run", {})
    monkeypatch.setattr(run_module, "code_fingerprint", lambda script: {"models/mlp.py": "edited since"})
    begun.save()
    assert load(tmp_path / "run" / "checkpoint.pt")["code"] == begun.code != run_module.code_fingerprint("")


def test_results_do_not_make_a_commit_dirty_and_code_does(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for name in ("utils.py", "results.json"):
        (tmp_path / name).touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "results.json").write_text("{}")
    assert provenance.environment()["commit"] == commit
    (tmp_path / "utils.py").write_text("edited")
    assert provenance.environment()["commit"] == f"{commit}-dirty"


# Options --------------------------------------------------------------------------------------------------------------
def test_without_a_terminal_each_report_and_each_epoch_is_one_line(capsys):
    train(*MLP, "--epochs", 2, "--log-interval", 20)
    output, errors = capsys.readouterr()
    lines = [line.split("  ")[0] for line in output.splitlines() if line.startswith("epoch")]
    assert lines == [f"epoch {epoch}{end}" for epoch in (1, 2) for end in (" step 20/45", " step 40/45", "/2")]
    assert "\r" not in errors  # no progress bar


def test_validation_evaluation_and_classify_use_the_ema_and_the_runs_own_loss_and_black():
    """The last images are validated."""
    words = ["--val-size", 137, "--ema", 0.9, "--loss", "mse", "--black", 0, "--lr", 0.01, "--dry-run"]
    train(*MLP, *words, "--output-dir", "run")
    network, checkpoint = evaluate.load_model("run"), load("run/checkpoint.pt")
    images, labels = (part[-137:] for part in datasets.load("digits", ""))
    logits, row = network(images / 255).detach(), checkpoint["history"][0]
    loss = torch.nn.functional.mse_loss(logits.softmax(1), torch.eye(10)[labels]).item()
    assert row["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert row["val_loss"] == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(evaluate.classify(network, images), logits.softmax(1))
    assert same(network.state_dict(), checkpoint["state"]["ema"]["model"])
    assert not same(network.state_dict(), checkpoint["state"]["model"])
    images, labels = datasets.load("digits", "", train=False)
    expected = torch.nn.functional.cross_entropy(network(images / 255), labels).item()
    assert evaluate.main(["run"])["test_loss"] == pytest.approx(expected, rel=1e-4)


def test_patience_ends_the_training_after_so_many_epochs_without_a_better_one():
    few_digits(60)
    words = [*MLP, "--lr", "0", "--val-size", "20", "--patience", "2", "--epochs", "9"]
    assert train_classifier.main(words)["epoch"] == 3


@pytest.mark.parametrize("ema", [[], ["--ema", "0.9"]])
def test_a_new_run_starts_from_the_weights_of_another(tmp_path, ema):
    words = [*MLP, "--dry-run"]
    train(*words, *ema, "--output-dir", "first")
    train(*words, "--ema", "0.5", "--lr", 0, "--start-from", "first", "--output-dir", "second")
    first, second = (load(tmp_path / name / "checkpoint.pt")["state"] for name in ("first", "second"))
    expected = first["ema"]["model"] if ema else first["model"]
    assert all(torch.equal(value, expected[name]) for name, value in second["model"].items())
    assert all(value.allclose(expected[name]) for name, value in second["ema"]["model"].items())
    shutil.rmtree("first")  # on which nothing else depends
    train("--resume", "second")


def test_a_new_run_starts_from_the_shipped_weights():
    with pytest.raises(UserError, match="it has no weights that fit the model"):
        train(*MLP, "--start-from", ROOT / "weights" / "cnn.pt")
    words = ["--batch-norm", "--start-from", ROOT / "weights" / "cnn.pt", "--lr", 0, "--dry-run"]
    train(*DIGITS, *words, "--output-dir", "run")
    assert load(Path("run") / "checkpoint.pt")["history"][0]["accuracy"] > 0.8
    with pytest.raises(UserError, match="it has no weights that fit the discriminator"):
        train_cgan.main([*DIGITS, "--start-from", str(ROOT / "weights" / "cgan.pt")])
    with pytest.raises(UserError, match="nowhere does not exist"):
        train(*DIGITS, "--start-from", "nowhere")
    assert not list(Path().glob("runs/*"))  # whose name the next run would lack


@pytest.mark.parametrize(
    ("name", "gpus", "words"), [("cuda", 0, ".*--device auto"), ("cuda:2", 2, "the last GPU of this machine is cuda:1")]
)
def test_a_gpu_that_does_not_exist_is_named(monkeypatch, name, gpus, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=f"--device {name}: {words}"):
        pick_device(name)


@pytest.mark.parametrize("slower", [1, 3])
def test_a_cpu_that_emulates_bfloat16_is_a_warning(slower, monkeypatch, capsys):
    seconds = {torch.float32: 1, torch.bfloat16: slower}
    monkeypatch.setattr("engine.device.seconds_of_product", seconds.get)
    pick_device("cpu")
    assert not capsys.readouterr().out
    pick_device("cpu", amp=True)
    warning = "warning: --amp: this CPU emulates bfloat16, which is slower than float32; omit --amp\n"
    assert capsys.readouterr().out == (warning if slower > 2 else "")


def test_a_flag_beats_the_recipe_and_is_shown(capsys):
    words = [*DIGITS, "--recipe", "best", "--lr", "0.5"]
    args = flags.parse_args(train_classifier.get_args_parser(), train_classifier.RECIPES, argv=words)
    assert (args.lr, args.weight_decay) == (0.5, 0.05)
    shown = capsys.readouterr().out.split()
    assert shown[:2] == ["recipe", "best"]
    assert "lr=0.5" in shown
    assert "weight_decay" not in " ".join(shown)  # only what differs from the recipe


def test_batch_norm_of_one_image_is_refused_where_it_cannot_train():
    few_digits(41)
    lone = [*DIGITS, "--batch-norm", "--batch-size", "40", "--dry-run"]
    with pytest.raises(UserError, match=r"batch norm of the model: one image .*; change --batch-size"):
        train(*lone, "--model", "mlp")
    train(*lone, "--model", "cnn")  # it has several pixels


@pytest.mark.slow
@pytest.mark.parametrize("model", CLASSIFIERS)
@pytest.mark.parametrize("recipe", ["best", "paper"])  # `lecture` is every other test's
def test_every_recipe_runs_on_every_model(model, recipe):
    train(*DIGITS, "--recipe", recipe, "--model", model, "--dry-run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_lecture_on_mnist_learns_within_memory(tmp_path, data_dir):
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train_classifier.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
status = open("/proc/self/status").read()  # not getrusage, which counts what the process was forked from
print("peak", 1024 * int(status.split("VmHWM:")[1].split()[0]))
"""
    command = [sys.executable, "-c", code, "--model", "mlp", "--data-dir", str(data_dir), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split("peak")[1]) < 1.5e9
    evaluate.main(["runs/mlp-mnist"])
    metrics = json.loads((tmp_path / "runs" / "mlp-mnist" / "evaluation" / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.90


def test_a_training_does_not_take_a_dry_run_for_its_own():
    words = [*MLP, "--auto-resume", "--output-dir", "run"]
    train(*words, "--dry-run")
    train(*words, "--dry-run")
    with pytest.raises(UserError, match=r"^run is a dry run; delete it, or name another --output-dir$"):
        train(*words)


def test_a_dry_run_does_not_warn_of_samples_that_eight_steps_cannot_make(capsys):
    train_gan.main([*DIGITS, "--dry-run"])
    assert "warning" not in capsys.readouterr().out
