"""Fault-injection tests: kill and stop trainings, and change bytes of files.

python benchmarks/reliability.py kills --count 200
python benchmarks/reliability.py signals --count 90
python benchmarks/reliability.py damage --count 1000 --data-dir data

kills, signals: two scripts train for two epochs of three steps and save after each. A process gets SIGKILL, or one or
two other signals, at a chosen point. It is resumed, and must end as an uninterrupted run does.
damage: checkpoints and MNIST's test files are cut short, and one byte at a time is changed.
With --record, the experiment's row goes into benchmarks/results/reliability.csv.
"""

import contextlib
import csv
import io
import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads could not be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib.figure  # noqa: F401 (as the next two, imported here so that the forked processes need not)
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
from helpers import load, same

import train_classifier
import train_gan
import utils
from datasets import mnist
from engine import checkpoint, flags
from engine.errors import DataError, UserError, run_script

RESULTS = ROOT / "benchmarks" / "results" / "reliability.csv"
FLAGS = "--dataset digits --device cpu --epochs 2 --save-interval 0 --batch-size 500 --log-interval 2"
SCRIPTS = {
    "classifier": (train_classifier, "--model mlp --recipe best --val-size 20"),
    "gan": (train_gan, "--ema 0.9 --val-size 20"),
}
SIGNALS: dict[str, list[tuple[int, ...]]] = {
    "kills": [(SIGKILL,)],
    "signals": [(SIGINT,), (SIGTERM,), (SIGHUP,), (SIGUSR1,), (SIGINT, SIGINT)],
}
UPDATED = "after add"  # the point at which a step has updated the weights
Trials = Iterator[tuple[str, bool]]  # what was done, and whether it passed


# Kills and signals ----------------------------------------------------------------------------------------------------


class Points:
    """Lists the points that a process passes, and sends it the signal `at[number]` at each number there."""

    def __init__(self, at: dict[int, int]):
        self.at = at
        self.passed: list[str] = []
        calls = [
            (torch.Tensor, "backward"),
            (utils.Meter, "add"),
            (utils, "evaluating"),
            (os, "fsync"),
            (os, "replace"),
        ]
        for owner, name in calls:
            setattr(owner, name, self.around(getattr(owner, name)))
        points = self

        class Halfway(io.FileIO):
            """A file that passes a point when half of its content is on its way to the disk."""

            def write(self, content: Any) -> int:
                half = super().write(content[: len(content) // 2])
                points.reach("half of a checkpoint" if ".pt" in str(self.name) else "half of a table or plot")
                return half + super().write(content[len(content) // 2 :])

        vars(checkpoint)["open"] = Halfway  # write_atomically's

    def reach(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) - 1 in self.at:
            os.kill(os.getpid(), self.at[len(self.passed) - 1])

    def around(self, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            self.reach(f"before {function.__name__}")
            result = function(*args, **kwargs)
            self.reach(f"after {function.__name__}")
            return result

        return wrapped


def train_here(name: str, argv: list[str], at: dict[int, int], stem: str) -> None:
    """In a process of its own: STEM.points gets the names of the points passed, STEM.errors what stderr shows."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{stem}.errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    points = Points(at)
    try:
        run_script(lambda: SCRIPTS[name][0].main(argv))
    finally:
        Path(f"{stem}.points").write_text("\n".join(points.passed))


class Whole:
    """The uninterrupted run of a script: its folder, and the names of the points that it passed."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder / f"{name}-whole"
        self.flags = [*FLAGS.split(), *SCRIPTS[name][1].split(), "--output-dir"]
        assert self.train(self.folder) == 0, Path(f"{self.folder}.errors").read_text()
        self.points = Path(f"{self.folder}.points").read_text().splitlines()

    def train(self, run: Path, at: dict[int, int] | None = None, resume: bool = False) -> int | None:
        """The exit status of a forked process that trains in `run`; negative for a signal."""
        argv = ["--resume", str(run)] if resume else [*self.flags, str(run)]
        arguments = (self.name, argv, at or {}, str(run))
        process = multiprocessing.get_context("fork").Process(target=train_here, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    def chosen(self, end: int) -> Iterator[int]:
        """The numbers of the points before `end`, a random one of each kind in turn."""
        kinds: dict[str, list[int]] = {}
        for number, point in enumerate(self.points[:end]):
            kinds.setdefault(point, []).append(number)
        for numbers in kinds.values():
            random.Random(0).shuffle(numbers)
        for turn in itertools.zip_longest(*kinds.values()):
            yield from (number for number in turn if number is not None)

    def passes(self, number: int, sent: tuple[int, ...]) -> bool:
        """Whether a run that gets these signals at this point ends, once resumed, as the uninterrupted one."""
        run = self.folder.with_name(f"{self.name}-{number}-{sum(sent)}")
        status = self.train(run, {number + i: each for i, each in enumerate(sent)})
        saved = bool(list(run.glob("*.pt")))
        if SIGKILL in sent:
            good = status == -SIGKILL
        else:  # at most one more step, and one line, which says how to resume
            line = Path(f"{run}.errors").read_text()
            steps = Path(f"{run}.points").read_text().splitlines()[number + 1 :].count(UPDATED)
            begun = "before backward" in self.points[:number] and len(sent) == 1
            good = status == 128 + sent[0] and line.count("\n") == 1 and steps <= 1
            good &= not begun or (f"--resume {run}" in line and saved)
        if not saved:
            shutil.rmtree(run, ignore_errors=True)
        good &= self.train(run, resume=saved) == 0 and same(contents(self.folder), contents(run))
        shutil.rmtree(run)
        return good


def contents(run: Path) -> dict[Path, Any]:
    """What two equal runs have in common: checkpoints, tables and samples, without times; and no temporary file."""
    found: dict[Path, Any] = {}
    for path in run.rglob("*"):
        if path.suffix in (".pt", ".csv", ".png", ".gif", ".tmp") and path.name not in ("curves.png", "seconds.csv"):
            found[path.relative_to(run)] = {**load(path), "seconds": 0} if path.suffix == ".pt" else path.read_bytes()
    return found


def interruptions(name: str, what: str, folder: Path, count: int) -> list[tuple[str, bool]]:
    whole = Whole(name, folder)
    end = len(whole.points)
    if what == "signals":  # after the last step, nothing is left to stop
        end -= whole.points[::-1].index(UPDATED)
    chosen = zip(itertools.islice(whole.chosen(end), count), itertools.cycle(SIGNALS[what]))
    return [(f"{name}, {whole.points[number]}: {sent}", whole.passes(number, sent)) for number, sent in chosen]


# Damage ---------------------------------------------------------------------------------------------------------------


def damage(path: Path, count: int, read: Callable[[], Any]) -> Trials:
    """`count` times, cut the file short or change one of its bytes.

    It passes if `read` fails with one line that names the file, or returns what it held (a byte of no effect).
    """
    content, whole, rng = path.read_bytes(), read(), random.Random(0)
    for place in [0, *(rng.randrange(len(content)) for _ in range(count - 1))]:
        cut, changed = content[:place], bytes([content[place] ^ rng.randrange(1, 256)])
        cut_short = place == 0 or rng.random() < 0.5
        path.write_bytes(cut if cut_short else cut + changed + content[place + 1 :])
        try:
            good = same(read(), whole)
        except (DataError, UserError) as error:
            good = str(path) in str(error) and len(str(error).splitlines()) == 1
        yield f"{path.name}, {'cut short' if cut_short else 'changed'} at byte {place}", good
    path.write_bytes(content)


def damaged_files(folder: Path, count: int, data_dir: str) -> Trials:
    """Checkpoints, and copies of MNIST's test files."""
    run = Whole("classifier", folder).folder
    previous = checkpoint.read_checkpoint(run / "previous.pt")
    for name in ("checkpoint.pt", "best.pt"):
        for what, good in damage(run / name, count, partial(checkpoint.read_checkpoint, run / name)):
            if name == "checkpoint.pt":  # previous.pt must be used instead
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    good &= same(checkpoint.load_checkpoint(run), previous)
                good &= str(run / "previous.pt") in said.getvalue()
            yield what, good
    for stem in mnist.part_stems("MNIST", "t10k"):
        source = mnist.find_idx(Path(data_dir), stem)
        assert source, f"there is no MNIST in {data_dir}"
        path = folder / source.relative_to(data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        yield from damage(path, count, partial(mnist.read_idx, folder, stem))


def main() -> None:
    parser = flags.ArgumentParser("reliability.py", __doc__)
    add = parser.add_argument
    add("what", choices=[*SIGNALS, "damage"], help="what to do to runs or files")
    add("--count", type=flags.number(int, 1), default=200, help="kills or signals; or damages to each file")
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--record", action="store_true", help="write the row to benchmarks/results/reliability.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        each = partial(interruptions, what=args.what, folder=Path(folder), count=-(-args.count // len(SCRIPTS)))
        if args.what == "damage":
            trials = list(damaged_files(Path(folder), args.count, args.data_dir))
        else:
            with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
                trials = [trial for own in pool.map(each, SCRIPTS) for trial in own]
    failed = [what for what, good in trials if not good]
    row = [args.what, str(len(trials)), str(len(trials) - len(failed))]
    print(",".join(row), *failed, sep="\n")
    if args.record:
        kept = [own for own in csv.reader(RESULTS.open()) if own[0] != args.what]
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([*kept, row])
    if failed:
        raise UserError(f"{len(failed)} of {len(trials)} failed")


if __name__ == "__main__":
    run_script(main)
