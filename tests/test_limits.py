"""The machine fails: no space, no right to write, no folder, no memory. What was saved stays, and can be resumed."""

import ctypes
import errno
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from helpers import DIGITS, ROOT, act_at, assert_one_line, run, train

from engine.errors import UserError
from engine.folder import lock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")

FLAGS = [*DIGITS, "--model", "mlp", "--save-interval", "1000"]


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    """As Lustre often is. A marker, which filelock would leave there, would outlive a job that is killed."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    killed = []  # neither is released
    for host in ("one", "two"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        killed.append(lock(tmp_path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one epoch, and one of two that was uninterrupted."""
    folder = tmp_path_factory.mktemp("runs")
    train(*FLAGS, "--epochs", 2, "--output-dir", folder / "whole")
    train(*FLAGS, "--epochs", 1, "--output-dir", folder / "run")
    return folder


@pytest.fixture
def begun(runs, tmp_path):
    """A copy of the run of one epoch."""
    return shutil.copytree(runs, tmp_path, dirs_exist_ok=True) / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_space():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def no_rights():
    """Root may write anywhere: give that up."""
    version_3, whole_process = 0x20080522, 0
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, whole_process), (ctypes.c_uint32 * 6)())


@pytest.mark.parametrize("closed", ["", "runs"])
def test_no_right_to_make_a_folder_is_one_line(tmp_path, closed):
    folder = tmp_path / closed
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    _, errors = run("train_classifier.py", *FLAGS, cwd=tmp_path, code=1, before=no_rights)
    folder.chmod(0o755)
    assert_one_line(errors, "cannot be created (Permission denied)", "allow writing", "run")


def test_the_previous_checkpoint_stands_in_for_one_that_the_system_does_not_read(begun):
    (begun / "checkpoint.pt").rename(begun / "previous.pt")
    (begun / "checkpoint.pt").touch(0o000)
    output, errors = run("evaluate.py", "run", cwd=begun.parent, before=no_rights)
    assert "run/checkpoint.pt cannot be read (Permission denied)" in errors
    assert "using run/previous.pt" in errors
    assert "test accuracy" in output


def test_a_folder_that_vanishes_is_named(tmp_path):
    act_at((1, 0), lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match=r"run/metrics\.csv could not be written \(No such file or directory\)"):
        train(*FLAGS, "--epochs", 2, "--output-dir", tmp_path / "run")


def leave_memory(more=2**28):
    """So many bytes more than this process has now."""
    import resource

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def no_memory_in_the_second_epoch():
    act_at((1, 1), lambda: leave_memory(2**26) or torch.zeros(2**30))


@pytest.mark.parametrize(
    ("limit", "mode", "words"),
    [
        (no_space, 0o755, ["run/checkpoint.pt", "File too large", "free space"]),
        (no_rights, 0o555, ["could not be written", "allow writing", "run/"]),
        (no_memory_in_the_second_epoch, 0o755, ["out of memory", "--batch-size"]),
    ],
)
def test_the_last_checkpoint_stays_and_can_be_resumed_once_the_reason_is_gone(begun, limit, mode, words):
    before = contents(begun)
    begun.chmod(mode)
    command = ["train_classifier.py", "--resume", "run", "--epochs", 2]
    _, errors = run(*command, cwd=begun.parent, code=1, before=limit)
    assert_one_line(errors, *words)
    after = contents(begun)
    assert after.keys() == before.keys()
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    begun.chmod(0o755)
    train("--resume", begun, "--epochs", 2)
    assert (begun / "metrics.csv").read_bytes() == (begun.parent / "whole" / "metrics.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(  # damage: two checkpoints and two files of MNIST, cut short or changed
    ("what", "count", "trials"), [("kills", 4, 4), ("signals", 2, 2), ("damage", 8, 32)]
)
def test_a_run_survives(what, count, trials, data_dir, tmp_path):
    """The short forms of benchmarks/reliability.py."""
    script = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), what, "--count", str(count)]
    done = subprocess.run([*script, "--data-dir", data_dir], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, f"{what},{trials},{trials}\n"), done.stdout + done.stderr
