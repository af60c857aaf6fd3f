"""The README against what it speaks of."""

import re
import shlex
import sys

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import reproduce
import tables

import train_cgan
import train_classifier
import train_gan

TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (\S+\.py) ?(.*)$", TEXT, flags=re.MULTILINE)


def test_tables_are_the_measured_results():
    assert tables.fill(TEXT) == TEXT


def test_rows_are_what_their_commands_gave_classifiers_with_five_seeds():
    rows = tables.json.loads(tables.RESULTS.read_text())
    assert rows.keys() <= reproduce.ROWS.keys()
    for name, row in rows.items():
        assert row["command"] == f"python {reproduce.ROWS[name][0]}"
        assert len(row.get("test_errors", [])) >= 5 or len(row["seeds"]) >= 1


def test_every_training_command_has_valid_flags():
    for module in (train_classifier, train_gan, train_cgan):
        commands = [flags for script, flags in COMMANDS if script == f"{module.__name__}.py"]
        assert commands
        for flags in commands:
            module.get_args_parser().parse_args(shlex.split(flags))


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"`((?:models|datasets|benchmarks|results|tests|assets)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_picture_that_the_readme_shows_exists():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert pictures
    for path in pictures:
        assert (ROOT / path).is_file(), path
