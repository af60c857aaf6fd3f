"""README.md and docs/ against what they describe: code, results, files, and commands that run."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from helpers import ROOT

import compare
import demo
import evaluate
import reproduce
import tables
import train_cgan
import train_classifier
import train_gan
import train_likelihood
from engine.checkpoint import load_checkpoint
from engine.flags import parse_args

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
HOW = ROOT / "docs" / "how.md"
EDITS = ROOT / "docs" / "extending.md"  # its commands follow its edits; tests/test_edits.py runs both
COMMANDS = [text for page, text in TEXTS.items() if page != EDITS]
FOLDERS = ("assets", "benchmarks", "datasets", "docs", "engine", "experiments", "measures", "models", "photos", "tests")
CODE = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]


def find(pattern, texts=None):
    """What matches in these texts (None: all pages), in order and without repetitions."""
    texts = TEXTS.values() if texts is None else texts
    return list(dict.fromkeys(match for text in texts for match in re.findall(pattern, text, flags=re.MULTILINE)))


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_the_measured_results(page):
    assert tables.fill(page) == page.read_text()


def test_a_deviation_above_half_of_the_mean_is_shown_as_a_range():
    assert tables.mean_or_range([3, 4, 5], 1) == "4.0 ± 1.0"
    assert tables.mean_or_range([1, 5], 0) == "1 to 5"
    assert tables.mean_or_range([0, 1e-4], 3) == "0.000"


def test_rows_were_made_with_the_options_of_their_commands_and_with_five_seeds():
    rows = tables.read("results.json")
    for name, row in rows.items():
        script, *flags = reproduce.ROWS[name].split()
        script = importlib.import_module(Path(script).stem)
        options = vars(parse_args(script.get_args_parser(), script.RECIPES, script.VARIANTS, flags))
        compared = options.keys() - {"compile", "script", "products", "threads"}  # a run chooses the last two itself
        expected = {key: value for key, value in row["options"].items() if key in compared}
        assert expected == {key: options[key] for key in expected}, name
        assert len(row.get("test_errors", row.get("seeds"))) == 5, name
        assert not (row["commit"] or "").endswith("-dirty"), name


def test_the_epochs_of_every_row_that_continues_no_other_were_timed_on_one_machine():
    measured = tables.read("minutes.json")
    assert list(measured["seconds"]) == [name for name in reproduce.ROWS if name != "maxout-paper"]
    assert (measured["threads"], measured["gpu"]) == (1, None)
    assert not measured["commit"].endswith("-dirty")


def test_the_page_shows_what_was_measured_of_the_pretrained_networks():
    for path in (ROOT / "weights").glob("*.pt"):
        seed = load_checkpoint(path)["measured"]
        if "test_errors" in seed:
            shown = [f"{100 * seed['test_accuracy']:.2f} %"]
        else:
            shown = [tables.nats([seed]), tables.conditional_accuracy([seed]), *tables.measures([seed])[1:]]
        (line,) = find(rf"^\| `{path.name}`.*$", [TEXTS[ROOT / "docs" / "results.md"]])
        assert all(value in line for value in shown), line


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """Where a reader stands who has followed the README so far: in a clone, with MNIST in data."""
    folder = tmp_path_factory.mktemp("reader of the README")
    (folder / "data").symlink_to(data_dir)
    (folder / "assets").symlink_to(ROOT / "assets")
    return folder


@pytest.mark.slow
def test_every_command_runs(folder, monkeypatch):
    """In the README's order, then in that of the pages: trainings with --dry-run, and others with --help."""
    monkeypatch.chdir(folder)
    commands = find(r"^(?:pip install .* && )?python (\S+\.py) ?(.*)$", COMMANDS)
    assert len(commands) > 10
    for script, flags in commands:
        module, words = importlib.import_module(Path(script).stem), shlex.split(flags)
        if script.startswith("train_"):
            folder = module.main([*words, "--dry-run"])["folder"]
            Path(folder).rename(folder.replace("dry-run-", ""))
        elif script == "evaluate.py":
            module.main(words)
        else:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit, match="0"):
                module.main()


def test_every_answer_of_how_do_i_works(tmp_path, monkeypatch, capsys):
    """In the page's order, with two or three epochs; afterwards, the files that it names exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    answers = "\n".join(find(r"^\| .*\? \| (.*) \|$", [TEXTS[HOW]]))
    for name, flags in find(r"`python (?:benchmarks/)?(\w+)\.py (.*?)`", [answers]):
        words = shlex.split(flags.replace("--epochs 60", "--epochs 3"))
        if name == "reproduce":  # tests/test_reproduce.py runs it
            reproduce.get_args_parser().parse_args(words)
        else:
            words += ["--epochs", "2"] if name == "train_classifier" and "--resume" not in words else []
            importlib.import_module(name).main(words)
    assert [file for file in find(r"`(runs/[\w./-]+|compare.png)`", [answers]) if not Path(file).exists()] == []
    output = capsys.readouterr().out
    assert "assets/seven.jpg: 7\n" in output  # not "7 (unsure)"
    assert "already finished at epoch 3" in output  # the run that was resumed for more epochs
    assert "python evaluate.py weights/cnn.pt --image assets/seven.jpg\n" in TEXTS[README]


@pytest.mark.slow
def test_every_torchrun_runs(folder):
    """With two processes for eight; the two machines are both this one."""
    commands = find(r"^torchrun (.*)$")
    assert len(commands) == 3
    for command in commands:
        machines = 2 if "--nnodes" in command else 1
        command = command.replace("--nproc-per-node 8", f"--nproc-per-node {2 // machines}")
        words = shlex.split(command.replace("HOST", "localhost"))
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words[place] = str(ROOT / words[place])
        if machines == 1 and "--standalone" not in words:
            words.insert(0, "--standalone")
        line = [sys.executable, "-m", "torch.distributed.run", *words, "--dry-run", "--device", "cpu"]
        started = [subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True) for _ in range(machines)]
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors


def test_every_row_that_a_command_reproduces_exists():
    names = find(r"python benchmarks/reproduce\.py ([a-z][\w -]*?)(?: --|`|$)")
    assert set(" ".join(names).split()) <= reproduce.ROWS.keys()


SCRIPTS = (train_classifier, train_gan, train_cgan, train_likelihood, evaluate, compare, demo, reproduce)
PARSERS = [script.get_args_parser() for script in SCRIPTS]


def test_every_flag_exists():
    known = {flag for parser in PARSERS for flag in parser._option_string_actions}
    known |= set(torch.distributed.run.get_args_parser()._option_string_actions)
    known |= {flag for path in CODE for flag in re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text())}
    assert set(find(r"(?<![\w-])(--[a-z][a-z0-9-]*)")) <= known


def test_the_slides_options_are_listed_with_their_choices():
    listed = re.findall(r"`(--[a-z-]+) \{(.*?)\}`", TEXTS[HOW])
    assert len(listed) > 2
    for flag, choices in listed:
        actions = [parser._option_string_actions.get(flag) for parser in PARSERS]
        assert choices.split(",") in [action.choices for action in actions if isinstance(action, argparse.Action)]


def templates():
    """Each text in the code, with … for what it fills in."""
    for path in CODE:
        if path.parent.name in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_is_one_of_the_code():
    rows = re.findall(r"^\| (`.*`) \| .* \|$", TEXTS[ROOT / "docs" / "troubleshooting.md"], flags=re.MULTILINE)
    messages = [message for row in rows for message in row.strip("`").split("`, `")]
    assert len(messages) > 10
    texts = list(templates())
    for message in messages:
        parts = [part for part in (part.strip(" :;,") for part in message.split("…")) if len(part) >= 9]
        assert parts, message
        assert all(any(part in text for text in texts) for part in parts), message


def test_every_file_that_a_page_names_exists():
    paths = find(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    found = {}
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        yield f"{slug}-{found[slug]}" if found[slug] else slug


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_image_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert target.suffix != ".md" or not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_links_to_every_page():
    assert {f"docs/{page.name}" for page in PAGES if page != README} <= set(find(r"\]\((.*?)\)", [TEXTS[README]]))
    assert len(TEXTS[README].split()) <= 900


def test_every_image_is_described_and_every_one_in_assets_is_shown():
    described = find(r"!\[[^\]]+\]\(([^)]+)\)") + find(r'<img src="([^"]+)"[^>]* alt="[^"]+">')
    assert set(described) == set(find(r"!\[[^\]]*\]\(([^)]*)\)") + find(r'<img src="([^"]+)"'))
    assert {path.name for path in (ROOT / "assets").rglob("*.*")} <= {path.rpartition("/")[2] for path in described}
