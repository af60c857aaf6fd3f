"""Fault-injection tests: kill and stop trainings, leave out parts of what they saved, change bytes of files.

python benchmarks/reliability.py kills --count 200
python benchmarks/reliability.py signals --count 90
python benchmarks/reliability.py dropped
python benchmarks/reliability.py changes --count 1000 --data-dir data

Three scripts train for two epochs on a few small images and save after each step. A first run lists the points that it
passes. Then a process is killed (SIGKILL) or stopped (SIGINT, SIGTERM, two SIGINT) at a chosen point and resumed, and
its run is compared with the uninterrupted one.
dropped: the control experiment. One part of a checkpoint is set back to what it was before the first step; the resumed
run must differ from the uninterrupted one.
changes: checkpoints and MNIST's test files are cut short, and one byte at a time is changed.
With --record, the rows (experiment, subject, what, times, passed) go into benchmarks/results/reliability.csv.
"""

import collections
import contextlib
import csv
import gzip
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads could not be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib.figure  # noqa: F401 (as the next, imported here so that the forked processes need not)
import torch
import torch._dynamo
from helpers import load, same, save_sealed

import train_cgan
import train_classifier
import train_gan
import utils
from datasets import mnist
from engine import checkpoint as checkpoint_module
from engine import flags
from engine.checkpoint import POSITION, load_checkpoint, read_checkpoint
from engine.errors import UserError, run_script

RESULTS = ROOT / "benchmarks" / "results" / "reliability.csv"
FLAGS = ["--dataset", "fashion-mnist", "--device", "cpu", "--epochs", "2", "--save-interval", "0", "--batch-size", "32"]
FLAGS += ["--log-interval", "2"]
SCRIPTS = {
    "train_classifier.py": (train_classifier, ["--model", "mlp", "--recipe", "best", "--val-size", "20"]),
    "train_gan.py": (train_gan, ["--ema", "0.9", "--val-size", "20"]),
    "train_cgan.py": (train_cgan, ["--recipe", "paper", "--val-size", "0"]),
}
Trial = tuple[str, str, bool]  # script or file, what was done to it, whether it passed
Trials = Iterator[Trial]


def write_images(folder: Path, count: int = 120) -> None:
    """Random images in Fashion-MNIST's files, which this process then takes for the published ones."""
    pixels = torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = (torch.arange(count) % 10).to(torch.uint8)
    (folder / "FashionMNIST" / "raw").mkdir(parents=True)
    for kind, header, items in (
        ("images-idx3", struct.pack(">4I", 0x803, count, 28, 28), pixels),
        ("labels-idx1", struct.pack(">2I", 0x801, count), labels),
    ):
        name = f"FashionMNIST/raw/train-{kind}-ubyte.gz"
        content = gzip.compress(header + items.numpy().tobytes())
        (folder / name).write_bytes(content)
        mnist.SHA256[name] = hashlib.sha256(content).hexdigest()


# Trainings that pass points -------------------------------------------------------------------------------------------


class Points:
    """Lists the points that a process passes, and sends it the signal `at[number]` at each number there."""

    def __init__(self, at: dict[int, int]):
        self.at = at
        self.passed: list[str] = []
        self.around(gzip.GzipFile, "read", before="data is unpacked")
        self.around(torch.Tensor, "backward", after="in a step, before the update")
        self.around(utils.Meter, "add", after="in a step, after the update")
        self.around(os, "fsync", "a file is written, before the flush", "after the flush")
        self.around(os, "replace", "before a rename", "after a rename")
        self.around(utils, "evaluating", before="before an evaluation")
        points = self

        class Halfway(io.FileIO):
            """A file that passes a point when half of its content is on its way to the disk."""

            def write(self, content: Any) -> int:
                super().write(content[: len(content) // 2])
                kind = "checkpoint" if ".pt" in Path(str(self.name)).name else "table or plot"
                points.reach(f"half of a {kind} is written")
                return super().write(content[len(content) // 2 :])

        opened = lambda path, mode="r": Halfway(path, mode) if mode == "wb" else open(path, mode)  # noqa: E731, SIM115
        vars(checkpoint_module)["open"] = opened

    def reach(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) - 1 in self.at:
            os.kill(os.getpid(), self.at[len(self.passed) - 1])

    def around(self, module: Any, name: str, before: str = "", after: str = "") -> None:
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


def train(name: str, argv: list[str], at: dict[int, int] | None = None, stem: Path | None = None) -> int:
    """Train in a forked process, which gets signals at points; its exit status, negative for a signal.

    stem: STEM.points gets the names of the points passed, STEM.errors what was printed on stderr.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{stem}.errors" if stem else os.devnull, os.O_WRONLY | os.O_CREAT), 2)
    points, status = Points(at or {}), 1
    try:
        run_script(lambda: SCRIPTS[name][0].main(argv))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
    finally:
        if stem:
            Path(f"{stem}.points").write_text("\n".join(points.passed))
        sys.stderr.flush()
        os._exit(status)


class Whole:
    """The uninterrupted run of a script: its folder, its flags, and the names of the points it passed."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder / f"{name}-whole"
        self.flags = [*FLAGS, *SCRIPTS[name][1], "--data-dir", str(folder / "data")]
        assert train(name, [*self.flags, "--output-dir", str(self.folder)], stem=self.folder) == 0
        self.points = Path(f"{self.folder}.points").read_text().splitlines()
        self.places = collections.defaultdict(list)  # name of a point -> the numbers at which it was passed
        for number, point in enumerate(self.points):
            self.places[point].append(number)

    def start(self, run: Path, at: dict[int, int] | None = None) -> int:
        return train(self.name, [*self.flags, "--output-dir", str(run)], at, run)

    def ends_alike(self, run: Path, restart: bool = False) -> bool:
        """Whether `run`, resumed (or started again), ends as this one; removes it."""
        if restart:
            shutil.rmtree(run, ignore_errors=True)
        status = self.start(run) if restart else train(self.name, ["--resume", str(run)])
        good = status == 0 and same_run(self.folder, run)
        shutil.rmtree(run)
        return good


def same_run(a: Path, b: Path) -> bool:
    """Whether checkpoints, tables and samples of two runs are equal, byte by byte or tensor by tensor; but for time."""
    for path in a.rglob("*"):
        other = b / path.relative_to(a)
        if path.suffix == ".pt":
            equal = other.exists() and same(*({**load(each), "seconds": None} for each in (path, other)))
        elif path.suffix in (".csv", ".png", ".gif") and path.name not in ("curves.png", "seconds.csv"):
            equal = other.exists() and path.read_bytes() == other.read_bytes()
        else:
            equal = True
        if not equal:
            return False
    return not list(b.rglob("*.tmp"))


# The experiments ------------------------------------------------------------------------------------------------------


def kills(whole: Whole, count: int) -> Trials:
    """`count` kills: at each kind of point in turn, at 1/2, 1/4, 3/4, 1/8, ... of its occurrences."""
    chosen: dict[int, None] = {}  # as an ordered set
    for turn in range(1, len(whole.points) + 1):
        fraction = int(f"{turn:016b}"[::-1], 2) / 2**16
        chosen.update((numbers[int(fraction * len(numbers))], None) for numbers in whole.places.values())
    for number in list(chosen)[: -(-count // len(SCRIPTS))]:
        run = whole.folder.with_name(f"{whole.name}-{number}")
        assert whole.start(run, {number: signal.SIGKILL}) == -signal.SIGKILL
        yield whole.name, whole.points[number], whole.ends_alike(run, restart=not list(run.glob("*.pt")))


def signals(whole: Whole, count: int) -> Trials:
    """`count` trials, of one or two signals at every kind of point: at most one more step, one line, and resumable."""
    kinds = ((signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT))
    trials = [(numbers[len(numbers) // 3], sent) for numbers in whole.places.values() for sent in kinds]
    every = max(1, len(trials) * len(SCRIPTS) // count)
    for number, sent in trials[:: every + (every % len(kinds) == 0)]:  # not always the first kind
        names = " ".join(each.name for each in sent)
        run = whole.folder.with_name(f"{whole.name}-{number}-{names.replace(' ', '-')}")
        status = whole.start(run, {number + i: each for i, each in enumerate(sent)})
        line = Path(f"{run}.errors").read_text()
        steps = Path(f"{run}.points").read_text().splitlines()[number + 1 :].count("in a step, after the update")
        started, saved = "in a step, before the update" in whole.points[:number], bool(list(run.glob("*.pt")))
        good = status == 128 + sent[0] and line.count("\n") == 1 and steps <= 1
        good &= f"--resume {run}" in line or len(sent) > 1 or not started
        good &= whole.ends_alike(run) if saved else len(sent) > 1 or not started
        yield whole.name, f"{whole.points[number]}: {names}", good


def dropped(whole: Whole, _: int) -> Trials:
    """The loss of each part of a checkpoint, from the middle of the second epoch, must be detected."""
    killed, fresh = whole.folder.with_name(f"{whole.name}-killed"), whole.folder.with_name(f"{whole.name}-fresh")
    whole.start(killed, {whole.places["in a step, after the update"][7]: signal.SIGKILL})
    whole.start(fresh, {whole.places["in a step, before the update"][0]: signal.SIGKILL})
    checkpoint = load(killed / "checkpoint.pt")
    assert [(c["epoch"], c["batch"]) for c in (checkpoint, load(fresh / "checkpoint.pt"))] == [(1, 3), (0, 0)]
    parts: list[tuple] = [(), *(("state", name) for name in checkpoint["state"]), *((name,) for name in POSITION)]
    parts += [("ranks", 0, key, name) for key in ("random", "meter") for name in checkpoint["ranks"][0][key]]
    for part in parts:
        run = killed.with_name("-".join(map(str, (whole.name, "without", *part))))
        shutil.copytree(killed, run)
        if part:
            edited = load(killed / "checkpoint.pt")
            then, now = load(fresh / "checkpoint.pt"), edited
            for key in part[:-1]:
                then, now = then[key], now[key]
            now[part[-1]] = then[part[-1]]
            save_sealed(edited, run / "checkpoint.pt")
        yield whole.name, f"without {' '.join(map(str, part)) or 'nothing'}", whole.ends_alike(run) is not bool(part)


def spoil(path: Path, count: int) -> Iterator[str]:
    """Cut the file short at up to `count` edges, change one byte at `count` places, and yield the kind each time."""
    content = path.read_bytes()
    size = len(content)
    edges = {*range(min(40, size)), *range(max(0, size - 40), size), *range(0, size, size // 100 + 1)}
    if zipfile.is_zipfile(path):  # where the parts of a checkpoint begin and end
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                edges |= {item.header_offset, item.header_offset + 30, item.header_offset + 30 + len(item.filename)}
    for place in sorted(edges)[:: -(-len(edges) // count)]:
        os.truncate(path, place)
        yield "cut short"
        path.write_bytes(content)
    rng = random.Random(0)
    for _ in range(count):
        place = rng.randrange(size)
        for byte in (content[place] ^ rng.randrange(1, 256), content[place]):
            with open(path, "r+b") as file:
                file.seek(place)
                file.write(bytes([byte]))
            if byte != content[place]:
                yield "one byte changed"


def is_detected(path: Path, read: Callable, whole: Any = None) -> bool:
    """Whether reading a spoilt file fails with one line that names it, or gives what it held (a byte of no effect)."""
    try:
        return same(read(), whole)
    except (mnist.DataError, UserError) as error:
        return str(path) in str(error) and len(str(error).splitlines()) == 1


def changed_checkpoints(folder: Path, count: int) -> Trials:
    """previous.pt must be used instead of a damaged checkpoint.pt."""
    run = Whole("train_classifier.py", folder).folder
    previous = load(run / "previous.pt")
    for name in ("checkpoint.pt", "best.pt"):
        for kind in spoil(run / name, count):
            good, said = is_detected(run / name, partial(read_checkpoint, run / name)), io.StringIO()
            if name == "checkpoint.pt":
                with contextlib.redirect_stderr(said):
                    good &= same(load_checkpoint(run), previous) and str(run / "previous.pt") in said.getvalue()
            yield name, kind, good


def changed_data(folder: Path, count: int, data_dir: str) -> Trials:
    """MNIST's test files, raw and gzipped."""
    for stem in mnist.part_stems("MNIST", "t10k"):
        source = mnist.find_idx(Path(data_dir), stem)
        raw = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
        read = partial(mnist.read_idx, folder, stem, (28, 28) if "images" in stem else (), mnist.LARGEST["t10k"])
        for suffix, content in (("", raw), (".gz", gzip.compress(raw, mtime=0))):
            path = folder / (stem + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            whole = read()
            for kind in spoil(path, count):
                yield path.name, kind, is_detected(path, read, whole)
            path.unlink()


def of_script(experiment: str, name: str, folder: Path, count: int) -> list[Trial]:
    return list(globals()[experiment](Whole(name, folder), count))


def run(args: Namespace, folder: Path) -> list[Trial]:
    write_images(folder / "data")
    if args.what == "changes":
        return [*changed_checkpoints(folder, args.count), *changed_data(folder, args.count, args.data_dir)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        trials = pool.map(partial(of_script, args.what, folder=folder, count=args.count), SCRIPTS)
        return [trial for each in trials for trial in each]


def main() -> None:
    parser = flags.ArgumentParser("reliability.py", __doc__)
    add = parser.add_argument
    add("what", choices=["kills", "signals", "dropped", "changes"], help="what to do to the runs")
    add("--count", type=flags.number(int, 1), default=200, help="kills or signals; changes of each file")
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--record", action="store_true", help="write the rows to benchmarks/results/reliability.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = run(args, Path(folder))
    times = collections.Counter(trial[:2] for trial in trials)
    passed = collections.Counter(trial[:2] for trial in trials if trial[2])
    rows = [[args.what, *key, str(count), str(passed[key])] for key, count in times.items()]
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    if args.record:
        kept = [row for row in csv.reader(RESULTS.open()) if row[0] != args.what]
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([*kept, *rows])
    if passed != times:
        raise UserError(f"{times.total() - passed.total()} of {times.total()} failed")


if __name__ == "__main__":
    run_script(main)
