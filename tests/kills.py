"""Kill real training processes at every kind of point, resume each, and compare with an undisturbed run.

python tests/kills.py --kills 200

Each of the three scripts trains for two epochs on a few small gzipped images and saves after each step. A first run
counts the points it passes; then one process for each chosen point is killed there (SIGKILL), and another one resumes.
Processes are forked from this one, which saves the seconds that importing torch takes.
"""

import argparse
import collections
import gzip
import os
import shutil
import signal
import struct
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads could not be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.figure  # noqa: F401 (as the next, imported here so that the forked processes need not)
import torch
import torch._dynamo
from helpers import load, same

import train_cgan
import train_classifier
import train_gan
import utils

FLAGS = ["--dataset", "fashion-mnist", "--device", "cpu", "--epochs", "2", "--save-interval", "0", "--batch-size", "32"]
SCRIPTS = {
    "train_classifier.py": (train_classifier, ["--model", "mlp", "--recipe", "best", "--val-size", "20"]),
    "train_gan.py": (train_gan, ["--average", "0.9", "--val-size", "20"]),
    "train_cgan.py": (train_cgan, ["--recipe", "paper", "--val-size", "20"]),
}


def write_images(folder, count=120):
    """Random images in Fashion-MNIST's files, whose SHA-256 is not pinned."""
    raw = Path(folder) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    header = struct.pack(">4I", 0x803, count, 28, 28)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.numpy().tobytes()))
    labels = (torch.arange(count) % 10).to(torch.uint8)
    header = struct.pack(">2I", 0x801, count)
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.numpy().tobytes()))


class Points:
    """Counts the points that a process passes, and kills it at number `kill_at`."""

    def __init__(self, kill_at=None):
        self.kill_at, self.passed = kill_at, []

    def reach(self, name):
        if len(self.passed) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def around(self, module, name, before=None, after=None):
        """Make `module.name` pass the points named `before` and `after` whenever it is called."""
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            if before:
                self.reach(before)
            result = function(*args, **kwargs)
            if after:
                self.reach(after)
            return result

        setattr(module, name, wrapped)

    def set_up(self):
        self.around(gzip.GzipFile, "read", "data is unpacked")
        self.around(torch.Tensor, "backward", after="in a step, before the update")
        self.around(utils.Run, "add", "in a step, after the update")
        self.around(os, "fsync", "a file is written, before the flush", "after the flush")
        self.around(os, "replace", "before a rename", "after a rename")
        evaluating, whole_open, points = utils.evaluating, open, self

        @contextmanager
        def evaluating_with_point(model):
            with evaluating(model):
                points.reach("in an evaluation")
                yield

        def open_with_point(path, mode="r"):
            file = whole_open(path, mode)
            if mode == "wb":
                write = file.write
                kind = "checkpoint" if ".pt" in Path(path).name else "table or picture"
                file = Halfway(file, write, lambda: points.reach(f"half of a {kind} is written"))
            return file

        utils.evaluating, utils.open = evaluating_with_point, open_with_point


class Halfway:
    """A file whose `write` reports when half is on its way to the disk."""

    def __init__(self, file, write, report):
        self.file, self.whole_write, self.report = file, write, report

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.whole_write(content[: len(content) // 2])
        self.file.flush()
        self.report()
        self.whole_write(content[len(content) // 2 :])


def fork(function):
    """Run `function()` in a process of its own; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def train(script, flags, kill_at=None, names=None):
    """A function for `fork`: train, be killed at a point, or write the names of the points into the file `names`."""

    def run():
        points = Points(kill_at)
        points.set_up()
        script.main(flags)
        if names:
            names.write_text("\n".join(points.passed))

    return run


def same_run(a, b):
    """Whether checkpoints, table and samples of two runs are equal, byte by byte or tensor by tensor."""
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.suffix in (".pt", ".csv", ".png", ".gif"))
    for name in names:
        if not (b / name).exists():
            return False
        if name.suffix == ".pt":
            if not same(load(a / name), load(b / name)):
                return False
        elif name.name != "curves.png" and (a / name).read_bytes() != (b / name).read_bytes():
            return False
    return not list(b.rglob("*.tmp"))


def spread(points, count):
    """`count` numbers of points: of each name in turn, at 1/2, 1/4, 3/4, 1/8, ... of its occurrences."""
    places = collections.defaultdict(list)
    for number, name in enumerate(points):
        places[name].append(number)
    chosen = {}  # as an ordered set
    for turn in range(1, len(points) + 1):
        share = int(f"{turn:016b}"[::-1], 2) / 2**16
        for numbers in places.values():
            chosen[numbers[int(share * len(numbers))]] = None
    return list(chosen)[:count]


def kill_and_resume(name, kills, folder):
    """Yield (name of the point, whether the resumed run equals the undisturbed one, whether it had to start anew)."""
    script, flags = SCRIPTS[name]
    flags = [*FLAGS, *flags, "--data-dir", str(folder / "data")]
    whole, names = folder / f"{name}-whole", folder / f"{name}-points"
    assert fork(train(script, [*flags, "--output-dir", str(whole)], names=names)) == 0
    points = names.read_text().splitlines()
    for number in spread(points, kills):
        run = folder / f"{name}-{number}"
        status = fork(train(script, [*flags, "--output-dir", str(run)], kill_at=number))
        assert status == -signal.SIGKILL, (points[number], status)
        anew = not list(run.glob("*.pt"))
        if anew:  # killed before the first step was saved
            shutil.rmtree(run, ignore_errors=True)
            resumed = fork(train(script, [*flags, "--output-dir", str(run)]))
        else:
            resumed = fork(train(script, ["--resume", str(run)]))
        yield points[number], resumed == 0 and same_run(whole, run), anew
        shutil.rmtree(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill (default: 200)")
    args = parser.parse_args()
    survived, killed, anew = collections.Counter(), collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "data")
        for i, name in enumerate(SCRIPTS):
            share = args.kills // len(SCRIPTS) + (i < args.kills % len(SCRIPTS))
            for point, good, started_anew in kill_and_resume(name, share, Path(folder)):
                killed[name, point] += 1
                survived[name, point] += good
                anew[name, point] += started_anew
    print("| script | killed | times | resumed to the same run | of these before anything was saved |")
    print("|---|---|---|---|---|")
    for key, count in killed.items():
        print(f"| {key[0]} | {key[1]} | {count} | {survived[key]} | {anew[key]} |")
    print(f"| all | | {killed.total()} | {survived.total()} | {anew.total()} |")
    return survived == killed


if __name__ == "__main__":
    sys.exit(not main())
