"""The notebook, cell by cell, and what notebooks need: one-line errors, threads, returned metrics."""

import shutil
import subprocess
import sys
import threading

import pytest
import torch
from helpers import DIGITS, ROOT

import train_classifier
from engine.errors import Stopped, UserError

NOTEBOOK = ROOT / "notebooks" / "lecture.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The outputs of the notebook's cells, run in a copy of the repository."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    copy = tmp_path_factory.mktemp("copy") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "tests", "assets", "data"))
    notebook = nbformat.read(copy / "notebooks" / NOTEBOOK.name, as_version=4)
    resources = {"metadata": {"path": str(copy / "notebooks")}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.get("text", "") + str(output.get("data", "")) for output in cell.outputs)


def test_every_cell_shows_what_it_promises(cells):
    trained, read = (next(cell for cell in cells if word in cell.source) for word in ("--lr", "a {probabilities"))
    assert "'folder': 'runs/mlp-digits'" in text_of(trained)
    assert "'epoch': 20" in text_of(trained)
    assert "a 7, with probability" in text_of(read)
    sevens = next(cell for cell in cells if ".sum().item()" in cell.source)
    assert int(sevens.outputs[0]["data"]["text/plain"]) > 90
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 5


def test_an_error_of_the_user_is_one_line_in_the_notebook(cells):
    (error,) = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    reason = "does not exist: this is not a run, or nothing was saved yet; start a new run"
    assert error.traceback == [f"UserError: runs/no-such-run {reason}"]


def test_the_notebook_is_committed_without_outputs():
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_errors_and_stops_are_shown_as_their_message():
    assert UserError("no such file; name another")._render_traceback_() == ["UserError: no such file; name another"]
    assert Stopped(2, "stopped and saved")._render_traceback_() == ["Stopped: stopped and saved"]


def test_training_works_in_a_thread_and_returns_its_folder_and_last_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = []
    flags = [*DIGITS, "--model", "mlp", "--epochs", "2", "--output-dir", "run"]
    thread = threading.Thread(target=lambda: results.append(train_classifier.main(flags)))
    thread.start()
    thread.join()
    (result,) = results
    assert result["folder"] == "run"
    assert result["epoch"] == 2
    assert 0 < result["loss"] < 3


def test_importing_the_scripts_changes_nothing(tmp_path):
    """Neither output, nor files, nor threads, nor random numbers, nor a GPU."""
    program = """
import torch
before = torch.get_num_threads(), torch.get_rng_state().tolist(), torch.get_float32_matmul_precision()
import demo, evaluate, train_cgan, train_classifier, train_gan, train_likelihood
model = evaluate.load_model("weights/cnn.pt")
assert before == (torch.get_num_threads(), torch.get_rng_state().tolist(), torch.get_float32_matmul_precision())
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()
