"""Who imports whom: engine/ knows no model, models/ know torch alone, and no script knows another."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"utils"}
PACKAGES = {"engine", "models", "datasets", "photos", "measures"}
STANDARD = sys.stdlib_module_names

# Where a file is -> what it may import besides the standard library: packages, or a module of one.
ALLOWED = {
    "engine": {"engine", "torch", "numpy", "filelock", "tqdm", "matplotlib", "PIL", "torchvision"},
    "models": {"models", "torch"},
    "datasets": {"datasets", "engine.errors", "photos", "torch", "numpy", "PIL", "sklearn", "tqdm"},
    "photos": {"photos", "engine.errors", "torch", "numpy", "PIL", "scipy"},
    "measures": {"measures", "models", "engine.errors", "torch", "torchmetrics", "sklearn", "matplotlib", "tqdm"},
    "utils.py": {"engine", "torch", "tqdm"},
    **{f"{name}.py": {"utils", "torch", "numpy", *PACKAGES} for name in SCRIPTS},
    "demo.py": {"evaluate", "torch", "gradio", *PACKAGES},
}


def files_of(root):
    """The product's files, in the root and in its packages."""
    return sorted([*root.glob("*.py"), *(path for name in PACKAGES for path in (root / name).rglob("*.py"))])


def imports_of(path, root):
    """The modules that a file imports, wherever in it: names joined by dots."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parts[: -node.level] if node.level else ()  # of a relative import
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from engine import errors` is engine.errors; `from engine.errors import UserError` is not one more module
            yield from (f"{module}.{alias.name}" if module in PACKAGES else module for alias in node.names)


def is_allowed(module, allowed):
    return any(module == name or module.startswith(f"{name}.") for name in {*allowed, *STANDARD})


def violations(root):
    """A line for each import that is not allowed."""
    found = []
    for path in files_of(root):
        place = path.relative_to(root).parts[0]
        modules = dict.fromkeys(imports_of(path, root))
        wrong = [module for module in modules if not is_allowed(module, ALLOWED[place])]
        found += [f"{path.relative_to(root).as_posix()} imports {module}" for module in wrong]
    return found


def test_every_file_imports_only_what_its_place_allows():
    assert violations(ROOT) == []


def test_only_the_demo_tests_and_benchmarks_import_a_script():
    importers = {
        (path.name, module) for path in files_of(ROOT) for module in imports_of(path, ROOT) if module in SCRIPTS
    }
    assert importers == {("demo.py", "evaluate")}
    paths = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "runs"))]
    others = {path.relative_to(ROOT).parts[0] for path in paths for name in imports_of(path, ROOT) if name in SCRIPTS}
    assert others <= {"tests", "benchmarks", "demo.py"}


def test_there_are_files_to_look_at():
    places = {path.relative_to(ROOT).parts[0] for path in files_of(ROOT)}
    assert places == ALLOWED.keys()
    assert {"train_classifier", "train_gan", "train_cgan", "evaluate"} <= SCRIPTS


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("utils.py", "import models", "models"),
        ("utils.py", "from datasets import Batches", "datasets.Batches"),
        ("utils.py", "def f():\n    from measures.parzen import SIGMAS", "measures.parzen"),
        ("engine/run.py", "import utils", "utils"),
        ("engine/run.py", "from models.cnn import CNN", "models.cnn"),
        ("models/cnn.py", "import numpy", "numpy"),
        ("models/cnn.py", "from engine.optim import EMA", "engine.optim"),
        ("models/cnn.py", "from ..engine import optim", "engine.optim"),
        ("datasets/mnist.py", "from engine.run import Run", "engine.run"),
        ("photos/ink.py", "import datasets", "datasets"),
        ("measures/watch.py", "from engine.run import Run", "engine.run"),
        ("measures/watch.py", "import datasets", "datasets"),
        ("train_gan.py", "import train_cgan", "train_cgan"),
        ("evaluate.py", "from train_gan import RECIPES", "train_gan"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line, found):
    """In a copy of the product."""
    for path in files_of(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    path = tmp_path / Path(file)
    path.write_text(path.read_text("utf-8") + f"\n{line}\n", "utf-8")
    assert violations(tmp_path) == [f"{file} imports {found}"]
