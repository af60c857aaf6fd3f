"""The README against what it speaks of."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, run
from PIL import Image

from datasets import load

sys.path.insert(0, str(ROOT / "benchmarks"))
import reproduce
import tables

import train_classifier
import utils

TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (\S+\.py) ?(.*)$", TEXT, flags=re.MULTILINE)


def test_tables_are_the_measured_results():
    assert tables.fill(TEXT) == TEXT


# Options in which a row's runs differ from what its command gives now: they were stopped at their last epoch, and the
# first weights of the paper's networks were not an option of their own yet.
STOPPED = {"gan-paper": {"epochs": 500, "init": "torch"}, "cgan-paper": {"epochs": 100}}


def test_rows_were_made_with_the_options_of_their_commands_classifiers_with_five_seeds():
    rows = tables.json.loads(tables.RESULTS.read_text())
    assert rows.keys() == reproduce.ROWS.keys()
    for name, row in rows.items():
        assert row["command"] == f"python {reproduce.ROWS[name][0]}"
        script, *flags = reproduce.ROWS[name][0].split()
        script = importlib.import_module(script.removesuffix(".py"))
        options = vars(utils.parse_args(script.get_args_parser(), script.RECIPES, script.VARIANTS, flags))
        options.update(STOPPED.get(name, {}))
        assert row["options"].items() <= options.items(), name
        assert len(row.get("test_errors", row.get("seeds"))) == (5 if script is train_classifier else 1)


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """Where a reader stands who has followed the README so far: with MNIST in data, and a picture."""
    folder = tmp_path_factory.mktemp("reader of the README")
    (folder / "data").symlink_to(data_dir)
    pixels = 255 - load("digits", "", train=False)[0][0, 0].numpy()
    Image.fromarray(pixels).resize((280, 280)).save(folder / "mine.jpg")
    return folder


def test_every_command_runs(folder):
    """In the README's order; trainings with --dry-run."""
    assert len(COMMANDS) > 8
    for script, flags in COMMANDS:
        if script.startswith("train_") and "--resume" not in flags:
            flags += " --dry-run"
        elif not script.startswith(("train_", "evaluate")):
            flags = "--help"
        run(script, *shlex.split(flags), cwd=folder)


def test_every_torchrun_runs(folder):
    """With two processes for eight; the two machines are both this one."""
    commands = re.findall(r"^torchrun (.*)$", TEXT, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        machines = 2 if "--nnodes" in command else 1
        command = command.replace("--nproc-per-node 8", f"--nproc-per-node {2 // machines}")
        words = shlex.split(command.replace("HOST", "localhost"))
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words[place] = str(ROOT / words[place])
        if machines == 1:
            words.insert(0, "--standalone")
        line = [sys.executable, "-m", "torch.distributed.run", *words, "--dry-run", "--device", "cpu"]
        started = [subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True) for _ in range(machines)]
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"`((?:models|datasets|benchmarks|results|tests|assets)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_picture_that_the_readme_shows_exists():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert pictures
    for path in pictures:
        assert (ROOT / path).is_file(), path
