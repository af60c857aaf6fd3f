"""The machine fails: no space, no right to write, no folder, no memory. What was saved stays, and can be resumed."""

import ctypes
import shutil
import sys

import pytest
import torch
from helpers import DIGITS, PROCESSES, assert_one_line, run, train

from datasets import Batches
from engine.errors import UserError
from models.vae import VAE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")

FLAGS = [*DIGITS, "--model", "mlp", "--save-interval", "1000"]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run of one epoch, and a twin of two that nothing disturbed."""
    monkeypatch.chdir(tmp_path)
    train(*FLAGS, "--epochs", 2, "--output-dir", "whole")
    train(*FLAGS, "--epochs", 1, "--output-dir", "run")
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_resumes(folder):
    """Once the reason is gone."""
    run("train_classifier.py", "--resume", folder, "--epochs", 2, cwd=folder.parent)
    assert (folder / "metrics.csv").read_bytes() == (folder.parent / "whole" / "metrics.csv").read_bytes()


def no_space():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def no_rights():
    """Root may write anywhere: give that up."""
    version_3, whole_process = 0x20080522, 0
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, whole_process), (ctypes.c_uint32 * 6)())


def test_a_full_disk_leaves_the_last_checkpoint(begun):
    before = contents(begun)
    flags = ["--resume", "run", "--epochs", 2]
    _, errors = run("train_classifier.py", *flags, cwd=begun.parent, code=1, before=no_space)
    assert_one_line(errors, "run/checkpoint.pt", "File too large", "free space")
    after = contents(begun)
    assert after.keys() == before.keys()
    for name in ("checkpoint.pt", "previous.pt"):
        assert after.get(name) == before.get(name)
    assert_resumes(begun)


def test_a_folder_without_the_right_to_write_leaves_the_last_checkpoint(begun):
    before = contents(begun)
    begun.chmod(0o555)
    flags = ["--resume", "run", "--epochs", 2]
    _, errors = run("train_classifier.py", *flags, cwd=begun.parent, code=1, before=no_rights)
    assert_one_line(errors, "could not be written", "allow writing", "run/")
    assert contents(begun) == before
    begun.chmod(0o755)
    assert_resumes(begun)


@pytest.mark.parametrize(("script", "flags"), [("train_classifier.py", FLAGS), ("evaluate.py", ["run"])])
def test_no_right_to_make_a_folder_is_one_line(begun, script, flags):
    for folder in (begun, begun.parent):
        folder.chmod(0o555)
    _, errors = run(script, *flags, cwd=begun.parent, code=1, before=no_rights)
    for folder in (begun, begun.parent):
        folder.chmod(0o755)
    assert_one_line(errors, "cannot be created (Permission denied)", "allow writing", "run")


def test_a_folder_that_vanishes_is_named(tmp_path, monkeypatch):
    whole = Batches.rows

    def rows(self, epoch, start=0):
        if epoch == 1:
            shutil.rmtree(tmp_path / "run")
        return whole(self, epoch, start)

    monkeypatch.setattr(Batches, "rows", rows)
    with pytest.raises(UserError, match=r"run/checkpoint\.pt could not be written \(No such file or directory\)"):
        train(*FLAGS, "--epochs", 2, "--output-dir", tmp_path / "run")


def no_memory_in_the_second_epoch():
    """Its second batch is so large that it does not fit."""
    import resource

    whole = Batches.rows

    def rows(self, epoch, start=0):
        for i, (numbers,) in enumerate(whole(self, epoch, start), start):
            if (epoch, i) == (1, 1):
                with open("/proc/self/statm") as file:
                    size = int(file.read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
                numbers = torch.cat([numbers] * 5000)
            yield (numbers,)

    Batches.rows = rows


def test_out_of_memory_names_the_batch_size_and_can_be_resumed(begun):
    before = (begun / "checkpoint.pt").read_bytes()
    flags = ["--resume", "run", "--epochs", 2]
    _, errors = run("train_classifier.py", *flags, cwd=begun.parent, code=1, before=no_memory_in_the_second_epoch)
    assert_one_line(errors, "out of memory", "--batch-size")
    assert (begun / "checkpoint.pt").read_bytes() == before
    assert_resumes(begun)


def little_memory():
    """256 MiB more than this process has now."""
    import resource

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))


def test_a_bound_of_too_many_samples_is_one_line(tmp_path):
    flags = ["--model", "vae", "--dataset", "digits", "--importance-samples", 10**6, "--output-dir", "run"]
    _, errors = run("train_likelihood.py", *flags, cwd=tmp_path, code=1, before=little_memory)
    assert_one_line(errors, "out of memory", "--batch-size")


def score_with_little_memory(block):
    little_memory()
    images = torch.zeros(40, 1, 28, 28)
    VAE(hidden=20, latent=5).log_likelihood(images, block=block)


@pytest.mark.parametrize(("block", "code"), [(1000, 0), (10**6, 1)])
def test_the_bound_of_five_thousand_samples_is_computed_in_blocks(block, code):
    process = PROCESSES.Process(target=score_with_little_memory, args=(block,))
    process.start()
    process.join(60)
    assert process.exitcode == code
