"""Fault-injection tests: kill and stop trainings, and change bytes of files.

python benchmarks/reliability.py kills --count 200
python benchmarks/reliability.py signals --count 90
python benchmarks/reliability.py damage --count 1000 --data-dir data

kills, signals: two scripts train for two epochs of three steps and save after each. A process gets SIGKILL, or one or
two other signals, at a line of utils.py or engine/. It is resumed, and must end as an uninterrupted run does.
damage: checkpoints and MNIST's test files are cut short, and one byte at a time is changed.
With --record, the experiment's row goes into benchmarks/results/reliability.csv.
"""

import csv
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
import torch._dynamo  # noqa: F401
from helpers import load, same

import train_classifier
import train_gan
from datasets import mnist
from engine import flags
from engine.checkpoint import read_checkpoint
from engine.errors import UserError, run_script
from engine.meter import Meter

RESULTS = ROOT / "benchmarks" / "results" / "reliability.csv"
FLAGS = "--dataset digits --device cpu --epochs 2 --save-interval 0 --batch-size 500 --log-interval 2"
FLAGS += " --products torch"  # else each run chooses by time, until it has saved its choice
SCRIPTS = {
    "classifier": (train_classifier.main, "--model mlp --recipe best --val-size 20"),
    "gan": (train_gan.main, "--ema 0.9 --val-size 20"),
}
SIGNALS: dict[str, list[tuple[int, ...]]] = {
    "kills": [(SIGKILL,)],
    "signals": [(SIGINT,), (SIGTERM,), (SIGHUP,), (SIGUSR1,), (SIGINT, SIGINT)],
}
PLACES = (str(ROOT / "engine"), str(ROOT / "utils.py"))  # where training is interrupted
STEP = f"meter.py:{Meter.add.__code__.co_firstlineno}"  # which each training step comes to once
Trials = Iterator[tuple[str, bool]]  # what was done, and whether it passed


# Kills and signals ----------------------------------------------------------------------------------------------------


def train_apart(name: str, argv: list[str], at: dict[int, int], stem: str) -> None:
    """In a process of its own, train, and send it the signal at[number] at the line of this number.

    STEM.lines gets the lines of utils.py and engine/ that it came to, STEM.errors what stderr shows.
    """
    lines: list[str] = []

    def trace(frame: Any, *_: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        if len(lines) - 1 in at:
            os.kill(os.getpid(), at[len(lines) - 1])
        return trace

    def main() -> None:
        sys.settrace(trace)
        try:
            SCRIPTS[name][0](argv)
        finally:
            sys.settrace(None)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{stem}.errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        run_script(main)
    finally:
        Path(f"{stem}.lines").write_text("\n".join(lines))


def train(name: str, run: Path, at: dict[int, int], resume: bool = False) -> tuple[int | None, list[str]]:
    """Train in `run`, in a forked process; its exit status, negative for a signal, and the lines that it came to."""
    argv = ["--resume", str(run)] if resume else [*FLAGS.split(), *SCRIPTS[name][1].split(), "--output-dir", str(run)]
    process = multiprocessing.get_context("fork").Process(target=train_apart, args=(name, argv, at, str(run)))
    process.start()
    process.join()
    lines = Path(f"{run}.lines")
    return process.exitcode, lines.read_text().splitlines() if lines.is_file() else []


def passes(name: str, whole: Path, number: int, sent: tuple[int, ...], begun: bool) -> bool:
    """Whether a run that gets these signals at this line ends, once resumed, as the uninterrupted one.

    begun: whether a step was made before.
    """
    run = whole.with_name(f"{name}-{number}-{sum(sent)}")
    status, lines = train(name, run, {number + i: each for i, each in enumerate(sent)})
    saved = bool(list(run.glob("*.pt")))
    if SIGKILL in sent:
        good = status == -SIGKILL
    else:  # at most one more step, and one line, which says how to resume
        said = Path(f"{run}.errors").read_text()
        good = status == 128 + sent[0] and said.count("\n") == 1 and lines[number + 1 :].count(STEP) <= 1
        good &= not begun or len(sent) > 1 or (f"--resume {run}" in said and saved)
    if not saved:
        shutil.rmtree(run, ignore_errors=True)
    good &= train(name, run, {}, resume=saved)[0] == 0 and same(contents(whole), contents(run))
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
    """`count` times, at a random line of those that an uninterrupted run comes to, each line once before any twice."""
    whole = folder / f"{name}-whole"
    status, lines = train(name, whole, {})
    assert status == 0, Path(f"{whole}.errors").read_text()
    last = len(lines) - lines[::-1].index(STEP) if what == "signals" else len(lines)  # then nothing is left to stop
    order = random.Random(0).sample(range(last), last)
    first = {lines[number]: number for number in order}
    chosen = zip(
        sorted(order, key=lambda number: first[lines[number]] != number)[:count], itertools.cycle(SIGNALS[what])
    )
    begun = lines.index(STEP)
    return [(f"{name}, {lines[n]} ({n}): {sent}", passes(name, whole, n, sent, n > begun)) for n, sent in chosen]


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
        except UserError as error:
            good = str(path) in str(error) and len(str(error).splitlines()) == 1
        yield f"{path.name}, {'cut short' if cut_short else 'changed'} at byte {place}", good
    path.write_bytes(content)


def damaged_files(folder: Path, count: int, data_dir: str) -> Trials:
    """Checkpoints, and copies of MNIST's test files."""
    run = folder / "run"
    train("classifier", run, {})
    for name in ("checkpoint.pt", "best.pt"):
        yield from damage(run / name, count, partial(read_checkpoint, run / name))
    for stem in mnist.part_stems("MNIST", "t10k"):
        source: Any = mnist.find_idx(Path(data_dir), stem)
        path = folder / source.relative_to(data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        yield from damage(path, count, partial(mnist.read_idx, folder, stem))


def main() -> None:
    parser = flags.ArgumentParser("reliability.py", __doc__)
    add = parser.add_argument
    add("what", choices=[*SIGNALS, "damage"], help="which fault to inject")
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
