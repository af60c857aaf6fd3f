"""The training scripts as their user runs them: real files, and real processes where one dies, speaks or exits."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import DIGITS, ROOT, assert_one_line, load, run, same, save_sealed, train

import train_cgan
import train_classifier
import train_gan
import train_likelihood
from datasets import Batches
from engine import provenance
from engine import run as run_module
from engine.checkpoint import load_checkpoint, write_atomically
from engine.device import pick_device
from engine.errors import Stopped, UserError
from engine.folder import new_folder
from models import CLASSIFIERS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills processes with POSIX signals")

EVERYTHING = [*DIGITS, "--recipe", "best", "--model", "mlp", "--epochs", "3", "--val-size", "137"]

# Runs a script and kills the process the hard way when it asks for the batch EPOCH, BATCH.
KILLED_AT = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from datasets import Batches
whole = Batches.rows
def rows(self, number, start=0):
    for i, batch in enumerate(whole(self, number, start), start):
        if self.shuffle and (number, i) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
Batches.rows = rows
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_same_run(a, b):
    """Weights, optimizer, schedule, EMA, random state, position, history; and the table, byte for byte."""
    for name in sorted({path.name for path in a.glob("*.pt")} - {"previous.pt"}):
        first, second = (load(folder / name) for folder in (a, b))
        for key in first.keys() - {"options", "seconds"}:  # save_interval may differ, and time does
            assert same(first[key], second[key]), key
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run("train_classifier.py", *EVERYTHING, "--output-dir", "run", cwd=folder)
    return folder / "run"


def kill_at(at, save_interval, folder, flags=EVERYTHING, script="train_classifier.py"):
    code = KILLED_AT.format(root=str(ROOT), script=str(ROOT / script), at=at)
    flags = [*flags, "--output-dir", "run", "--save-interval", str(save_interval)]
    killed = subprocess.run([sys.executable, "-c", code, *flags], cwd=folder, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize(
    ("at", "save_interval"), [((0, 1), 0), ((1, 4), 0), ((2, 10), 0), ((0, 3), 1000), ((1, 4), 1000)]
)
def test_killed_at_a_step_and_resumed_gives_the_same_run(undisturbed, tmp_path, at, save_interval):
    kill_at(at, save_interval, tmp_path)
    epoch, batch = at
    checkpoint = load(tmp_path / "run" / "checkpoint.pt")
    assert (checkpoint["epoch"], checkpoint["batch"]) == ((epoch, batch) if save_interval == 0 else (epoch, 0))
    run("train_classifier.py", "--resume", "run", cwd=tmp_path)
    assert_same_run(undisturbed, tmp_path / "run")
    seconds = load(tmp_path / "run" / "checkpoint.pt")["seconds"]
    assert seconds[epoch] > checkpoint["seconds"][epoch] >= 0  # the time before the kill counts too


OTHERS = {
    "cnn with amp": (train_classifier, ["--model", "cnn", "--amp", "--batch-size", "200", "--val-size", "37"]),
    "maxout paper": (train_classifier, ["--recipe", "paper"]),
    "gan lecture": (train_gan, ["--batch-size", "100", "--ema", "0.99", "--val-size", "37"]),
    "gan paper with amp": (train_gan, ["--recipe", "paper", "--val-size", "137", "--amp"]),
    "cgan paper": (train_cgan, ["--recipe", "paper", "--val-size", "137"]),
    "vae": (train_likelihood, ["--model", "vae", "--importance-samples", "3", "--ema", "0.9"]),
    "rbm": (train_likelihood, ["--model", "rbm"]),  # with persistent chains
    "rnn": (train_likelihood, ["--model", "rnn", "--val-size", "37", "--amp"]),
    "hmm": (train_likelihood, ["--model", "hmm", "--states", "56", "--binarise", "fixed"]),
}


LONG = ("gan paper with amp", "cgan paper")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in OTHERS])
def test_other_networks_resume_exactly_too(tmp_path, name):
    script, flags = OTHERS[name]
    flags = [*DIGITS, "--epochs", "2", *flags]
    script.main([*flags, "--output-dir", "whole"])
    kill_at((1, 3), 0, tmp_path, flags, Path(script.__file__).name)
    script.main(["--resume", "run"])
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    for picture in (tmp_path / "whole").glob("**/epoch-*.png"):
        assert picture.read_bytes() == (tmp_path / "run" / "samples" / picture.name).read_bytes()


def test_a_generator_that_never_ended_an_epoch_can_be_drawn_from(tmp_path):
    kill_at((0, 3), 0, tmp_path, DIGITS, "train_gan.py")
    run("evaluate.py", "run", "--samples", "4", cwd=tmp_path)
    assert (tmp_path / "run" / "evaluation" / "samples-4-seed0.npz").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_resume_and_loses_nothing(undisturbed, tmp_path, number):
    flags = [*EVERYTHING, "--output-dir", "run", "--save-interval", "0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_classifier.py"), *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "previous.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert_one_line(errors, "train_classifier.py --resume run")
    assert load(tmp_path / "run" / "checkpoint.pt")["epoch"] < 3
    run("train_classifier.py", "--resume", "run", cwd=tmp_path)
    assert_same_run(undisturbed, tmp_path / "run")


def test_the_large_networks_train_on_the_digits_too():
    train_gan.main([*DIGITS, "--recipe", "best", "--networks", "large", "--dry-run"])


@pytest.mark.parametrize("script", [train_gan, train_cgan])
@pytest.mark.parametrize("recipe", train_gan.RECIPES)
def test_every_recipe_of_a_generator_writes_everything_in_a_dry_run(tmp_path, script, recipe):
    script.main([*DIGITS, "--recipe", recipe, "--dry-run", "--output-dir", "run"])
    expected = {".lock", "config.json", "metrics.csv", "curves.png", "checkpoint.pt", "previous.pt", "samples"}
    expected |= {"samples.gif", "curve.csv", "seconds.csv"}
    validated = recipe == "paper"
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected | ({"best.pt"} if validated else set())
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["epoch-0001.png"]
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    columns = {"epoch", "loss_d", "loss_g", "D(x)", "D(G(z))"}
    assert set(row) == columns | ({"val_log_likelihood"} if validated else set())


def test_a_generator_stopped_in_its_first_epoch_says_how_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(Batches, "rows", interrupted(Batches.rows))
    with pytest.raises(Stopped, match="--resume run"):
        train_gan.main([*DIGITS, "--output-dir", "run"])
    assert load(tmp_path / "run" / "checkpoint.pt")["batch"] == 1


def interrupted(epoch):
    """`Batches.rows`, during whose first batch Ctrl-C is pressed."""

    def batches(self, number, start=0):
        signal.raise_signal(signal.SIGINT)
        yield from epoch(self, number, start)

    return batches


def test_run_folder_holds_what_is_promised(undisturbed):
    names = {".lock", "config.json", "metrics.csv", "curve.csv", "seconds.csv", "curves.png"}
    names |= {"checkpoint.pt", "previous.pt", "best.pt"}
    assert {path.name for path in undisturbed.iterdir()} == names
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["options"]["epochs"] == 3
    assert config["torch"] == torch.__version__
    with open(undisturbed / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) == {"epoch", "loss", "accuracy", "val_loss", "val_accuracy"}


def test_dry_run_takes_a_few_steps_and_writes_everything(tmp_path, capsys):
    train(*EVERYTHING, "--dry-run")
    folder = tmp_path / "runs" / "mlp-digits"
    checkpoint = load(folder / "checkpoint.pt")
    assert checkpoint["state"]["schedule"]["last_epoch"] == 8
    assert "python evaluate.py" in capsys.readouterr().out
    for name in ("best.pt", "metrics.csv", "curves.png", "config.json"):
        assert (folder / name).stat().st_size > 0


def test_new_runs_take_the_next_free_folder(tmp_path):
    for _ in range(2):
        train(*DIGITS, "--dry-run")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cnn-digits", "cnn-digits-2"]


def test_runs_started_in_the_same_moment_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, [None] * 8, ["cnn-mnist"] * 8))
    assert len(set(folders)) == 8
    assert all(folder.is_dir() for folder in folders)


def test_a_finished_run_resumes_with_more_epochs(tmp_path, capsys):
    flags = [*DIGITS, "--model", "mlp"]
    train(*flags, "--epochs", 1, "--output-dir", "a")
    train("--resume", "a")
    assert "finished" in capsys.readouterr().out
    train("--resume", "a", "--epochs", 2)
    train(*flags, "--epochs", 2, "--output-dir", "b")
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == (tmp_path / "b" / "metrics.csv").read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["options"]["epochs"] == 2


@pytest.mark.parametrize("schedule", ["cosine", "burda"])
def test_a_schedule_that_ends_with_the_last_epoch_refuses_another_one(schedule):
    train_likelihood.main([*DIGITS, "--schedule", schedule, "--epochs", "1", "--dry-run", "--output-dir", "run"])
    with pytest.raises(UserError, match="--epochs 2: this run's learning rate ends with its last epoch"):
        train_likelihood.main(["--resume", "run", "--epochs", "2"])


def test_without_a_terminal_each_report_and_each_epoch_is_one_line(tmp_path):
    flags = [*DIGITS, "--model", "mlp", "--epochs", 2, "--log-interval", 20]
    output, errors = run("train_classifier.py", *flags, cwd=tmp_path)
    lines = [line.split("  ")[0] for line in output.splitlines() if line.startswith("epoch")]
    steps = ["step 20/45", "step 40/45"]
    assert lines == [
        *(f"epoch 1 {step}" for step in steps),
        "epoch 1/2",
        *(f"epoch 2 {step}" for step in steps),
        "epoch 2/2",
    ]
    assert "\r" not in errors  # no progress bar


@pytest.mark.parametrize("ema", [[], ["--ema", "0.9"]])
def test_a_new_run_starts_from_the_weights_of_another(tmp_path, ema):
    flags = [*DIGITS, "--model", "mlp", "--epochs", 1]
    train(*flags, *ema, "--output-dir", "first")
    train(*flags, "--ema", "0.5", "--lr", 0, "--start-from", "first", "--output-dir", "second")
    first, second = (load(tmp_path / name / "checkpoint.pt")["state"] for name in ("first", "second"))
    expected = first["ema"]["model"] if ema else first["model"]
    assert same(second["model"], expected)
    assert all(value.allclose(expected[name]) for name, value in second["ema"]["model"].items())
    train("--resume", "second", "--epochs", 2)  # goes on from its own weights


def test_a_new_run_starts_from_the_shipped_weights():
    with pytest.raises(UserError, match=r"its model is another network"):
        train(*DIGITS, "--model", "mlp", "--start-from", ROOT / "weights" / "cnn.pt")
    flags = ["--batch-norm", "--start-from", ROOT / "weights" / "cnn.pt", "--lr", 0, "--dry-run"]
    train(*DIGITS, *flags, "--output-dir", "run")
    assert load(Path("run") / "checkpoint.pt")["history"][0]["accuracy"] > 0.8
    with pytest.raises(UserError, match="it has no weights of the discriminator"):
        train_cgan.main([*DIGITS, "--start-from", str(ROOT / "weights" / "cgan.pt")])
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        train(*DIGITS, "--start-from", "nowhere")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "1", "cpu:0"])
def test_a_device_that_does_not_exist_is_named(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(*DIGITS[:2], "--device", name)
    assert f"must be auto, cpu, cuda, cuda:1, ... or mps, not {name}" in capsys.readouterr().err


def test_a_gpu_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--device cuda:2: the last GPU of this machine is cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("slower", [1, 3])
def test_a_cpu_that_emulates_bfloat16_is_a_warning(slower, monkeypatch, capsys):
    seconds = {torch.float32: 1, torch.bfloat16: slower}
    monkeypatch.setattr("engine.device.seconds_of_product", seconds.get)
    pick_device("cpu")
    assert not capsys.readouterr().out
    pick_device("cpu", amp=True)
    warning = "warning: --amp: this CPU emulates bfloat16, which is slower than float32; omit --amp\n"
    assert capsys.readouterr().out == (warning if slower > 2 else "")


def test_a_flag_beats_the_recipe_and_is_shown(tmp_path, capsys):
    train(*DIGITS, "--recipe", "best", "--lr", "0.5", "--dry-run")
    options = capsys.readouterr().out.splitlines()[0].split()
    assert options[:2] == ["recipe", "best"]
    assert "lr=0.5" in options
    assert "weight_decay" not in " ".join(options)  # only what differs from the recipe
    config = json.loads((tmp_path / "runs" / "cnn-digits" / "config.json").read_text())
    assert config["options"]["lr"] == 0.5
    assert config["options"]["weight_decay"] == 0.05


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--model", "nope"], 2, ["--model", "nope", "vae"]),
        (["--importance-samples", "0"], 2, ["--importance-samples", "at least 1"]),
        ([*DIGITS, "--model", "hmm", "--hidden", "5"], 1, ["hmm", "--hidden"]),
    ],
)
def test_bad_flags_of_a_likelihood_model_get_one_line_and_leave_nothing(tmp_path, flags, code, parts):
    _, errors = run("train_likelihood.py", *flags, cwd=tmp_path, code=code)
    assert_one_line(errors, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--output-dir", "other"], ["--auto-resume", "--output-dir", "other"]])
def test_a_resumed_run_has_one_folder(flags):
    train(*DIGITS, "--dry-run", "--output-dir", "run")
    train(*DIGITS, "--dry-run", "--output-dir", "other", "--lr", "0.5")
    with pytest.raises(UserError, match="--resume names the run folder; omit --output-dir"):
        train("--resume", "run", *flags)


def test_batch_norm_of_one_image_is_refused_where_it_cannot_train():
    lone = [*DIGITS, "--batch-norm", "--batch-size", "1436", "--epochs", "1"]  # of 1,437 images
    with pytest.raises(UserError, match="batch norm: one of 1437 images would form a batch by itself"):
        train(*lone, "--model", "mlp")
    train(*lone, "--model", "cnn")  # it has several pixels


@pytest.mark.parametrize("model", CLASSIFIERS)
@pytest.mark.parametrize("recipe", ["lecture", "best", "paper"])
def test_every_recipe_runs_on_every_model(model, recipe):
    train(*DIGITS, "--recipe", recipe, "--model", model, "--dry-run")


def test_amp_trains(tmp_path):
    train(*DIGITS, "--model", "mlp", "--amp", "--lr", "1e-3", "--epochs", 3, "--output-dir", "run")
    assert load(tmp_path / "run" / "checkpoint.pt")["history"][-1]["accuracy"] > 0.85


# What a user can do wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--model", "vgg"], 2, ["--model", "vgg", "cnn"]),
        (["--batch-size", "0"], 2, ["--batch-size", "whole number from 1"]),
        (["--lr", "nan"], 2, ["--lr"]),
        (["--no-such-flag"], 2, ["--no-such-flag"]),
        (["--learning-rat", "1"], 2, ["--learning-rat"]),
        (["--batchsize", "8"], 2, ["--batchsize", "did you mean --batch-size?"]),
        (["--resume", "nowhere"], 1, ["nowhere", "no such run folder"]),
        ([*DIGITS, "--auto-resume"], 1, ["--auto-resume", "--output-dir"]),
        (["--betas", "1", "0.9"], 2, ["--betas"]),
        (["--batch-size", "9" * 30], 2, ["--batch-size"]),
        ([*DIGITS, "--schedule", "maxout"], 1, ["--schedule maxout", "--optimizer sgd"]),
        ([*DIGITS, "--model", "mlp", "--batch-norm", "--batch-size", "1"], 1, ["batch norm", "--batch-size"]),
        (["--dataset", "digits", "--val-size", "5000"], 1, ["--val-size", "1437"]),
        ([*DIGITS, "--patience", "3"], 1, ["--patience", "--val-size"]),
        ([*DIGITS, "--model", "maxout", "--batch-norm"], 1, ["maxout", "--batch-norm"]),
        ([*DIGITS, "--model", "mlp", "--batch-norm", "--batch-size", "4"], 1, ["batch norm", "--batch-size"]),
        pytest.param(
            ["--device", "cuda"],
            1,
            ["--device cuda", "--device auto"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_flags_get_one_line_and_leave_nothing(tmp_path, flags, code, parts):
    _, errors = run("train_classifier.py", *flags, cwd=tmp_path, code=code)
    assert_one_line(errors, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_touched(undisturbed, tmp_path):
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    _, errors = run("train_classifier.py", *DIGITS, "--output-dir", undisturbed, cwd=tmp_path, code=1)
    assert_one_line(errors, undisturbed, "--resume")
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_resume_with_another_model_is_refused(undisturbed, tmp_path):
    _, errors = run("train_classifier.py", "--resume", undisturbed, "--model", "cnn", cwd=tmp_path, code=1)
    assert_one_line(errors, "--model cnn", "mlp")


def test_resume_with_another_recipe_is_refused(undisturbed, tmp_path):
    _, errors = run("train_classifier.py", "--resume", undisturbed, "--recipe", "lecture", cwd=tmp_path, code=1)
    assert_one_line(errors, "--recipe lecture", "best")


def test_a_run_resumes_without_compile(undisturbed, tmp_path):
    checkpoint = load(undisturbed / "checkpoint.pt")
    checkpoint["options"]["compile"] = True
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    train("--resume", "run", "--no-compile")


def test_resume_with_another_end_of_the_schedule_is_refused(undisturbed, tmp_path):
    _, errors = run("train_classifier.py", "--resume", undisturbed, "--epochs", "9", cwd=tmp_path, code=1)
    assert_one_line(errors, "--epochs 9", "learning rate")


def test_resume_from_previous_pt_keeps_it_until_a_valid_checkpoint_is_there(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    good = (tmp_path / "run" / "previous.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    checkpoint = load_checkpoint(tmp_path / "run")
    write_atomically(tmp_path / "run" / "checkpoint.pt", good)
    assert (tmp_path / "run" / "previous.pt").read_bytes() == good
    assert checkpoint["epoch"] == 2


def test_resume_reads_what_another_process_saved_before_it_released_the_lock(tmp_path, monkeypatch, capsys):
    train(*DIGITS, "--model", "mlp", "--epochs", 1, "--output-dir", "run")

    def late(folder, *, lock=run_module.lock):
        monkeypatch.setattr(run_module, "lock", lock)
        train("--resume", "run", "--epochs", 2)
        capsys.readouterr()
        return lock(folder)

    monkeypatch.setattr(run_module, "lock", late)
    train("--resume", "run", "--epochs", 3)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")] == ["3/3"]


def test_config_names_every_commit_that_a_run_was_trained_with(tmp_path, monkeypatch):
    whole = run_module.environment
    train(*DIGITS, "--model", "mlp", "--epochs", 1, "--output-dir", "run")
    for commit in ("first-dirty", "first", "second", "second"):
        monkeypatch.setattr(run_module, "environment", lambda commit=commit: {**whole(), "commit": commit})
        train("--resume", "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["commit"].endswith(", then first-dirty, then first, then second")
    assert config["device"] == "cpu"


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


def test_resume_after_the_network_was_edited_is_refused(undisturbed, tmp_path):
    checkpoint = load(undisturbed / "checkpoint.pt")
    checkpoint["state"]["model"].pop("linear4.bias")
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    _, errors = run("train_classifier.py", "--resume", "run", cwd=tmp_path, code=1)
    assert_one_line(errors, "run", "linear4.bias")


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(tmp_path):
    flags = [*DIGITS, "--model", "mlp", "--optimizer", "sgd", "--lr", "1e30", "--save-interval", "0"]
    _, errors = run("train_classifier.py", *flags, "--output-dir", "run", cwd=tmp_path, code=1)
    assert_one_line(errors, "not finite", "--lr", "step")
    paths = list((tmp_path / "run").glob("*.pt"))
    assert paths
    for path in paths:
        checkpoint = load(path)
        assert all(value.isfinite().all() for value in checkpoint["state"]["model"].values())
        assert all(
            value.isfinite().all() for value in map(torch.tensor, checkpoint["ranks"][0]["meter"]["sums"].values())
        )


# Runs that ended before their first step, and --auto-resume -----------------------------------------------------------


def test_a_folder_of_a_run_that_ended_before_its_first_step_can_be_used_again(undisturbed, tmp_path, monkeypatch):
    flags = [*EVERYTHING, "--output-dir", "run"]

    def killed(self, name="checkpoint.pt"):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module.Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(*flags)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}
    (tmp_path / "run" / "checkpoint.pt.tmp").write_bytes(b"killed while writing")
    train(*flags)
    assert_same_run(undisturbed, tmp_path / "run")


def test_auto_resume_starts_a_run_and_resumes_it(undisturbed, tmp_path, capsys):
    flags = [*EVERYTHING, "--auto-resume", "--output-dir", "run"]
    kill_at((0, 3), 0, tmp_path, [*EVERYTHING, "--auto-resume"])
    assert load(tmp_path / "run" / "checkpoint.pt")["batch"] == 3
    train(*flags)
    assert_same_run(undisturbed, tmp_path / "run")
    capsys.readouterr()
    train(*flags)
    assert "finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("name", "words"), [("theirs.txt", "is not empty"), ("checkpoint.pt", "is damaged")])
def test_auto_resume_changes_nothing_that_is_no_run(tmp_path, name, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("theirs")
    _, errors = run("train_classifier.py", *DIGITS, "--auto-resume", "--output-dir", "run", cwd=tmp_path, code=1)
    assert_one_line(errors, "run", words)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    assert (tmp_path / "run" / name).read_text() == "theirs"


def test_auto_resume_refuses_other_options(undisturbed, tmp_path):
    flags = [*EVERYTHING, "--lr", "0.5", "--auto-resume", "--output-dir", undisturbed]
    _, errors = run("train_classifier.py", *flags, cwd=tmp_path, code=1)
    assert_one_line(errors, "--lr 0.5", "lr=0.002")


def test_a_change_of_the_code_is_a_warning_when_a_run_is_resumed(undisturbed, tmp_path):
    checkpoint = load(undisturbed / "checkpoint.pt")
    checkpoint["code"]["models/mlp.py"] = "another"
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    _, errors = run("train_classifier.py", "--resume", "run", cwd=tmp_path)
    assert_one_line(errors, "warning: models/mlp.py changed since run was saved")


# On real MNIST --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_lecture_on_mnist_learns_within_memory(tmp_path, data_dir):
    flags = ["--model", "mlp", "--data-dir", str(data_dir), "--device", "cpu"]
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train_classifier.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
status = open("/proc/self/status").read()  # not getrusage, which counts what the process was forked from
print("peak", 1024 * int(status.split("VmHWM:")[1].split()[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split("peak")[1]) < 1.5e9
    run("evaluate.py", "runs/mlp-mnist", cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / "mlp-mnist" / "evaluation" / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.90


def test_a_run_that_is_being_trained_is_not_resumed_a_second_time(tmp_path):
    flags = [*DIGITS, "--model", "mlp", "--epochs", "1000", "--save-interval", "0", "--output-dir", "run"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_classifier.py"), *flags], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "previous.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        _, errors = run("train_classifier.py", "--resume", "run", cwd=tmp_path, code=1)
        assert "another process is training in run" in errors.splitlines()[-1]
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    epoch = load_checkpoint(tmp_path / "run")["epoch"]
    run("train_classifier.py", "--resume", "run", "--epochs", epoch + 1, cwd=tmp_path)


def test_nothing_slow_is_imported_before_it_is_used(tmp_path):
    """--help and usage errors cost what torch costs."""
    code = (
        "import sys, evaluate, train_cgan, train_classifier, train_gan\n"
        "print({'torchvision', 'torchmetrics', 'sklearn', 'scipy', 'matplotlib', 'PIL'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
