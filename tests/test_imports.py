"""Who imports whom: engine/ knows no model, models/ know torch alone, and no script knows another."""

import ast
import sys

from helpers import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"utils"}
PACKAGES = {"engine", "models", "datasets", "measures", "photos"}

# Where a file is -> what it may import besides the standard library: packages, or a module of one.
ALLOWED = {
    "engine": {"engine", "torch", "numpy", "filelock", "tqdm", "matplotlib", "PIL", "torchvision"},
    "models": {"models", "torch"},
    "photos": {"photos", "engine.errors", "engine.provenance", "torch", "numpy", "PIL", "scipy"},
    "datasets": {
        "datasets", "photos", "engine.errors", "engine.distributed", "torch", "torchvision", "numpy", "PIL", "sklearn",
        "tqdm",
    },
    "measures": {
        "measures", "models.KINDS", "models.build_network", "photos", "engine.errors", "engine.checkpoint",
        "engine.provenance", "torch", "numpy", "torchmetrics", "sklearn", "matplotlib", "tqdm",
    },
    "utils.py": {"engine", "torch", "tqdm"},
    **{f"{name}.py": {"utils", "torch", "numpy", *PACKAGES} for name in SCRIPTS},
    "demo.py": {"evaluate", "torch", "gradio", "starlette", "PIL", *PACKAGES},
}  # fmt: skip


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


def violations(root):
    """A line for each import that is not allowed."""
    found = []
    for path in files_of(root):
        place = path.relative_to(root).parts[0]
        allowed, modules = {*ALLOWED[place], *sys.stdlib_module_names}, dict.fromkeys(imports_of(path, root))
        wrong = [module for module in modules if not any(f"{module}.".startswith(f"{name}.") for name in allowed)]
        found += [f"{path.relative_to(root).as_posix()} imports {module}" for module in wrong]
    return found


def test_every_file_imports_only_what_its_place_allows(tmp_path):
    """And a wrong import would be found, within a function and relative too."""
    assert {path.relative_to(ROOT).parts[0] for path in files_of(ROOT)} == ALLOWED.keys()
    assert violations(ROOT) == []
    for folder in ("engine", "models"):
        (tmp_path / folder).mkdir()
    (tmp_path / "engine" / "run.py").write_text("def f():\n    from models.cnn import CNN\n")
    (tmp_path / "models" / "cnn.py").write_text("import torch\nfrom ..engine import optim\n")
    (tmp_path / "utils.py").write_text("import argparse, datasets\n")
    found = {"engine/run.py imports models.cnn", "models/cnn.py imports engine.optim", "utils.py imports datasets"}
    assert set(violations(tmp_path)) == found
