"""The notebook, cell by cell, and what notebooks need: one-line errors, threads, returned metrics."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, ROOT
from PIL import Image

import train_classifier
from models.cnn import conv_output_size

NOTEBOOK = ROOT / "notebooks" / "lecture.ipynb"
PAGE = (ROOT / "docs" / "lecture.md").read_text()
PICTURES = {path.stem for path in (ROOT / "assets" / "lecture").iterdir()}
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def run_cells(copy, without=()):
    """The code cells with their outputs, run in a copy of the repository; without those of these tags."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "tests", "assets", "data"))
    notebook = nbformat.read(copy / "notebooks" / NOTEBOOK.name, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not {*without} & {*cell.metadata.get("tags", ())}]
    resources = {"metadata": {"path": str(copy / "notebooks")}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return run_cells(tmp_path_factory.mktemp("copy") / "repository", without=["slow"])


def text_of(cell):
    return "".join(output.get("text", "") + str(output.get("data", "")) for output in cell.outputs)


def test_every_cell_shows_what_it_promises(cells):
    trained, read = (next(cell for cell in cells if word in cell.source) for word in ("--lr", "a {probabilities"))
    assert "'folder': 'runs/mlp-digits'" in text_of(trained)
    assert "'epoch': 20" in text_of(trained)
    assert "a 7, with probability" in text_of(read)
    sevens = next(cell for cell in cells if ".sum().item()" in cell.source and "cgan" in cell.source)
    assert int(sevens.outputs[0]["data"]["text/plain"]) > 90
    shown = [cell for cell in cells if re.search(r"^(show\(|Image\(|drawing$)", cell.source, flags=re.MULTILINE)]
    assert len(shown) > 10
    assert [cell for cell in shown if "image/png" not in cell.outputs[-1].get("data", {})] == []


@pytest.mark.slow
def test_the_whole_notebook_makes_the_pictures_of_the_page_and_one_gan_collapses(tmp_path):
    run_cells(tmp_path / "repository")
    made = tmp_path / "repository" / "runs" / "lecture"
    assert {path.stem for path in made.iterdir()} == PICTURES
    rows = np.asarray(Image.open(made / "collapse.png"), dtype=float).reshape(2, 56, 8, 56)
    collapsed, other = rows.std(axis=2).mean(axis=(1, 2))  # of each pixel over the eight samples
    assert collapsed < 5 < 10 < other


def test_the_page_shows_each_picture_of_the_notebook_and_they_are_small():
    assert {*re.findall(r'^show\("([\w-]+)"', "\n".join("".join(c["source"]) for c in CELLS), re.MULTILINE)} == PICTURES
    assert [path for path in (ROOT / "assets" / "lecture").iterdir() if path.stat().st_size > 60_000] == []


def test_the_numbers_by_hand_are_those_of_a_pencil_and_of_pytorch():
    names = {"torch": torch, "F": F, "conv_output_size": conv_output_size}
    for cell in CELLS:
        if "by-hand" in cell["metadata"].get("tags", ()):
            exec("".join(cell["source"]), names)
    assert names["h"].tolist() == [2.5, 0, 1]
    assert names["loss"].item() == pytest.approx(math.log(1 + math.exp(5.25)))  # Y = (-0.75, 4.5)
    assert torch.equal(names["dw1"], names["w1"].grad)
    assert torch.equal(names["dw2"], names["w2"].grad)
    assert torch.equal(names["w1"], names["before"] - names["rho"] * names["dw1"])
    for (p, s), output in zip(names["cases"], names["outputs"]):
        seven, w = names["seven"][None, None], names["w"][None, None]
        assert torch.equal(output, F.conv2d(seven, w, stride=s, padding=p)[0, 0])
        assert f"| 7 | 3 | {p} | {s} | {len(output)} |" in PAGE


def test_an_error_of_the_user_is_one_line_in_the_notebook(cells):
    (error,) = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    reason = "does not exist: this is not a run, or nothing was saved yet; name another run"
    assert error.traceback == [f"UserError: runs/no-such-run {reason}"]


def test_the_notebook_is_committed_without_outputs():
    assert [cell for cell in CELLS if cell["outputs"] or cell["execution_count"] is not None] == []


def test_training_works_in_a_thread_and_returns_its_folder_and_last_metrics():
    results = []
    flags = [*DIGITS, "--model", "mlp", "--epochs", "2", "--output-dir", "run"]
    thread = threading.Thread(target=lambda: results.append(train_classifier.main(flags)))
    thread.start()
    thread.join()
    (result,) = results
    assert result["folder"] == "run"
    assert result["epoch"] == 2
    assert 0 < result["loss"] < 3


def test_importing_the_scripts_is_quick_and_changes_nothing(tmp_path):
    """--help costs what torch costs. Neither output, nor files, nor threads, nor random numbers, nor a GPU."""
    program = """
import sys, torch
before = torch.get_num_threads(), torch.get_rng_state().tolist(), torch.get_float32_matmul_precision()
import evaluate, train_cgan, train_classifier, train_gan, train_likelihood
slow = {"torchvision", "torchmetrics", "sklearn", "scipy", "matplotlib", "PIL", "sympy", "torch._dynamo"}
assert not {*slow, "engine.compiler"} & sys.modules.keys()
import demo
model = evaluate.load_model("weights/cnn.pt")
assert before == (torch.get_num_threads(), torch.get_rng_state().tolist(), torch.get_float32_matmul_precision())
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
