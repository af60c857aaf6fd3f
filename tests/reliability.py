"""Kill and stop trainings, leave out parts of what they saved, change bytes of files: do runs recover, is it noticed?

python tests/reliability.py kills --count 200
python tests/reliability.py signals --count 90
python tests/reliability.py dropped
python tests/reliability.py changes --count 1000 --data-dir data

kills: Each of the three scripts trains for two epochs on a few small gzipped images and saves after each step. A first
run counts the points that it passes; then one process for each chosen point is killed there (SIGKILL), another one
resumes, and its run is compared with the first one. Processes are forked from this one, which saves them importing
torch.
signals: SIGINT, SIGTERM and two SIGINT in a row there: the script finishes the step, saves, and says how to resume.
dropped: The control of these. Of a checkpoint from the middle of the second epoch, each part in turn is set back to
what it was before the first step; the run that resumes from there must differ from the undisturbed one.
changes: Checkpoints and MNIST's files are cut short, and one byte at a time is changed.
"""

import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads could not be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
from engine.checkpoint import POSITION, load_checkpoint, read_checkpoint
from engine.errors import DataError, UserError, run_script
from engine.provenance import environment

FLAGS = ["--dataset", "fashion-mnist", "--device", "cpu", "--epochs", "2", "--save-interval", "0", "--batch-size", "32"]
FLAGS += ["--log-interval", "2"]
SCRIPTS = {
    "train_classifier.py": (train_classifier, ["--model", "mlp", "--recipe", "best", "--val-size", "20"]),
    "train_gan.py": (train_gan, ["--ema", "0.9", "--val-size", "20"]),
    "train_cgan.py": (train_cgan, ["--recipe", "paper", "--val-size", "0"]),
}


def write_images(folder, count=120):
    """Random images in Fashion-MNIST's files, which this process then takes for the published ones."""
    raw = Path(folder) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    labels = (torch.arange(count) % 10).to(torch.uint8)
    for kind, header, items in (
        ("images-idx3", struct.pack(">4I", 0x803, count, 28, 28), pixels),
        ("labels-idx1", struct.pack(">2I", 0x801, count), labels),
    ):
        name = f"FashionMNIST/raw/train-{kind}-ubyte.gz"
        content = gzip.compress(header + items.numpy().tobytes())
        (Path(folder) / name).write_bytes(content)
        mnist.SHA256[name] = hashlib.sha256(content).hexdigest()


# Kills ----------------------------------------------------------------------------------------------------------------


class Points:
    """Counts the points that a process passes, and sends it the signal `at[number]` at each number there."""

    def __init__(self, at):
        self.at, self.passed = at, []

    def reach(self, name):
        number = len(self.passed)
        self.passed.append(name)
        if number in self.at:
            os.kill(os.getpid(), self.at[number])

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
        self.around(utils.Meter, "add", "in a step, after the update")
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

        utils.evaluating, checkpoint_module.open = evaluating_with_point, open_with_point


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


def fork(function, errors=os.devnull):
    """Run `function()` in a process of its own: its exit status, negative for a signal. errors: the file for stderr."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        try:
            run_script(function)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def train(script, flags, at=None, names=None):
    """A function for `fork`: train, get signals at points, and write the names of the points passed into a file."""

    def run():
        points = Points(at or {})
        points.set_up()
        try:
            script.main(flags)
        finally:
            if names:
                names.write_text("\n".join(points.passed))

    return run


def same_run(a, b):
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


def places_of(points):
    """Name of a point -> the numbers at which it was passed."""
    places = collections.defaultdict(list)
    for number, name in enumerate(points):
        places[name].append(number)
    return places


def spread(points, count):
    """`count` numbers of points: of each name in turn, at 1/2, 1/4, 3/4, 1/8, ... of its occurrences."""
    chosen = {}  # as an ordered set
    for turn in range(1, len(points) + 1):
        share = int(f"{turn:016b}"[::-1], 2) / 2**16
        for numbers in places_of(points).values():
            chosen[numbers[int(share * len(numbers))]] = None
    return list(chosen)[:count]


def undisturbed(name, folder):
    """Train the script `name` without a kill: its run folder, its flags, and the names of the points it passed."""
    script, flags = SCRIPTS[name]
    flags = [*FLAGS, *flags, "--data-dir", str(folder / "data")]
    run, names = folder / f"{name}-whole", folder / f"{name}-points"
    assert fork(train(script, [*flags, "--output-dir", str(run)], names=names)) == 0
    return run, flags, names.read_text().splitlines()


def undisturbed_runs(folder, pool):
    return dict(zip(SCRIPTS, pool.map(undisturbed, SCRIPTS, [folder] * len(SCRIPTS))))


def kill_and_resume(name, number, whole, flags, points):
    """Name of the point, whether the resumed run equals the undisturbed one, whether nothing was saved before."""
    script, run = SCRIPTS[name][0], whole.with_name(f"{name}-{number}")
    status = fork(train(script, [*flags, "--output-dir", str(run)], {number: signal.SIGKILL}))
    assert status == -signal.SIGKILL, (points[number], status)
    unsaved = not list(run.glob("*.pt"))
    if unsaved:  # killed before the first checkpoint: start again
        shutil.rmtree(run, ignore_errors=True)
        resumed = fork(train(script, [*flags, "--output-dir", str(run)]))
    else:
        resumed = fork(train(script, ["--resume", str(run)]))
    good = resumed == 0 and same_run(whole, run)
    shutil.rmtree(run)
    return name, points[number], good, unsaved


def kills(args, folder, pool):
    """A table of all kills, and whether every run recovered."""
    trials = []
    for i, (name, run) in enumerate(undisturbed_runs(folder, pool).items()):
        share = args.count // len(SCRIPTS) + (i < args.count % len(SCRIPTS))
        trials += [pool.submit(kill_and_resume, name, number, *run) for number in spread(run[-1], share)]
    survived, killed, unsaved = collections.Counter(), collections.Counter(), collections.Counter()
    for trial in trials:
        name, point, good, nothing_saved = trial.result()
        killed[name, point] += 1
        survived[name, point] += good
        unsaved[name, point] += nothing_saved
    rows = [(*key, count, survived[key], unsaved[key]) for key, count in killed.items()]
    rows.append(("all", "", killed.total(), survived.total(), unsaved.total()))
    columns = ("script", "killed", "times", "resumed to the same run", "of these before anything was saved")
    return table(columns, rows), survived == killed


# Signals --------------------------------------------------------------------------------------------------------------


def signal_and_resume(name, number, sent, whole, flags, points):
    """A row of the table: what came of the signals `sent` from point `number` on, one at each point."""
    script, stem = SCRIPTS[name][0], "-".join(map(str, (name, number, *sent)))
    run, errors, names = (whole.with_name(f"{stem}-{kind}") for kind in ("run", "errors", "names"))
    at = {number + i: signal_number for i, signal_number in enumerate(sent)}
    status = fork(train(script, [*flags, "--output-dir", str(run)], at, names), errors)
    steps = names.read_text().splitlines()[number + 1 :].count("in a step, after the update")
    started = "in a step, before the update" in points[:number]
    line = errors.read_text()
    good = status == 128 + sent[0] and line.count("\n") == 1
    if len(sent) == 1 and started:
        good &= f"--resume {run}" in line
    if list(run.glob("*.pt")):
        good &= fork(train(script, ["--resume", str(run)])) == 0 and same_run(whole, run)
    else:
        good &= len(sent) > 1 or not started
    shutil.rmtree(run, ignore_errors=True)
    named = " ".join(signal.Signals(number).name for number in sent)
    return name, points[number], named, status, steps, "yes" if good else "no"


def signals(args, folder, pool):
    """A table of signals at every kind of point, and whether each run saved, said so, and resumed to the same end."""
    kinds = [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]]
    trials = []
    for name, run in undisturbed_runs(folder, pool).items():
        for numbers in places_of(run[-1]).values():
            number = numbers[len(numbers) // 3]
            trials += [(signal_and_resume, name, number, sent, *run) for sent in kinds]
    every = -(-len(trials) // args.count)
    every += every % len(kinds) == 0 and every > 0  # not always the first kind
    rows = [trial.result() for trial in [pool.submit(*trial) for trial in trials[::every]]]
    columns = ("script", "signal", "sent", "exit status", "steps after it", "resumed to the same run")
    return table(columns, rows), all(row[-1] == "yes" and row[-2] <= 1 for row in rows)


# Dropped parts --------------------------------------------------------------------------------------------------------


def parts(checkpoint):
    """Where each part of a checkpoint stands, as the keys that lead to it."""
    yield from (("state", name) for name in checkpoint["state"])
    for number, rank in enumerate(checkpoint["ranks"]):
        for key in ("random", "meter"):
            yield from (("ranks", number, key, name) for name in rank[key])
    yield from ((name,) for name in POSITION)


def drop(checkpoint, fresh, part):
    """Set this part of the checkpoint back to what it was before the first step."""
    for key in part[:-1]:
        checkpoint, fresh = checkpoint[key], fresh[key]
    checkpoint[part[-1]] = fresh[part[-1]]


def stop_in_second_epoch(name, whole, flags, points):
    """The folders of a run that was killed after seven of eight steps, and of one that was killed in the first."""
    places = places_of(points)
    folders = whole.with_name(f"{name}-killed"), whole.with_name(f"{name}-fresh")
    numbers = places["in a step, after the update"][7], places["in a step, before the update"][0]
    for run, number in zip(folders, numbers):
        status = fork(train(SCRIPTS[name][0], [*flags, "--output-dir", str(run)], {number: signal.SIGKILL}))
        assert status == -signal.SIGKILL
    return folders


def resumes_without(part, name, whole, killed, fresh):
    """Whether the run `killed` without this part of its checkpoint (None: with all) resumes to the undisturbed run."""
    run = killed.with_name("-".join(map(str, (name, "without", *(part or ())))))
    shutil.copytree(killed, run)
    if part:
        checkpoint = load(killed / "checkpoint.pt")
        drop(checkpoint, load(fresh / "checkpoint.pt"), part)
        save_sealed(checkpoint, run / "checkpoint.pt")
    good = fork(train(SCRIPTS[name][0], ["--resume", str(run)])) == 0 and same_run(whole, run)
    shutil.rmtree(run)
    return good


def dropped(args, folder, pool):
    """A table of all parts of all scripts' checkpoints, and whether the loss of each one was noticed."""
    trials = []
    for name, (whole, flags, points) in undisturbed_runs(folder, pool).items():
        killed, fresh = stop_in_second_epoch(name, whole, flags, points)
        checkpoint = load(killed / "checkpoint.pt")
        assert [(c["epoch"], c["batch"]) for c in (checkpoint, load(fresh / "checkpoint.pt"))] == [(1, 3), (0, 0)]
        for part in (None, *parts(checkpoint)):
            trials.append((name, part, pool.submit(resumes_without, part, name, whole, killed, fresh)))
    told = {True: "no", False: "yes"}
    rows = [(name, " ".join(map(str, part or ["nothing"])), told[trial.result()]) for name, part, trial in trials]
    good = all(row[-1] == ("no" if row[1] == "nothing" else "yes") for row in rows)
    return table(("script", "part left out", "noticed"), rows), good


# Changed files --------------------------------------------------------------------------------------------------------


def edges(path):
    """Where a file's parts begin and end: those of a zip archive or an IDX file, and some within each."""
    size = path.stat().st_size
    places = {*range(min(40, size)), *range(max(0, size - 40), size), *range(0, size, size // 100 + 1)}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                places |= {item.header_offset, item.header_offset + 30, item.header_offset + 30 + len(item.filename)}
            places.add(archive.start_dir)
    return sorted(places)


def spoil(path, count):
    """Cut the file short at up to `count` edges, change one byte at `count` places, and yield the kind each time."""
    content = path.read_bytes()
    places = edges(path)
    for place in places[:: -(-len(places) // count)]:
        os.truncate(path, place)
        yield "cut short"
        path.write_bytes(content)
    draw = random.Random(0)
    for _ in range(count):
        place, new = draw.randrange(len(content)), draw.randrange(1, 256)
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ new]))
            file.flush()
            yield "one byte changed"
            file.seek(place)
            file.write(content[place : place + 1])


def changed_data(args, folder):
    """Yield (file, kind of change, what came of it) for MNIST's files, raw and gzipped."""
    for part in ("train", "t10k"):
        for stem in mnist.part_stems("MNIST", part):
            source = mnist.find_idx(Path(args.data_dir), stem)
            raw = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
            for suffix, content in (("", raw), (".gz", gzip.compress(raw, mtime=0))):
                path = folder / (stem + suffix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                read = partial(mnist.read_idx, folder, stem)
                whole = read()
                for kind in spoil(path, args.count):
                    yield path.name, kind, outcome(path, whole, read)
                path.unlink()


def outcome(path, whole, read):
    """What came of reading a spoilt file: noticed with a line that names it, without effect, or wrong."""
    try:
        return "without effect" if same(read(), whole) else "wrong"
    except (DataError, UserError) as error:
        line = str(error)
        return "noticed" if str(path) in line and len(line.splitlines()) == 1 else "wrong"


def changed_checkpoints(args, folder):
    """Yield (file, kind of change, what came of it): previous.pt must be used instead of checkpoint.pt."""
    run, _, _ = undisturbed("train_classifier.py", folder)
    previous = load(run / "previous.pt")
    for name in ("checkpoint.pt", "best.pt"):
        path = run / name
        for kind in spoil(path, args.count):
            result = outcome(path, None, partial(read_checkpoint, path))
            if name == "checkpoint.pt":
                said = io.StringIO()
                with contextlib.redirect_stderr(said):
                    used = load_checkpoint(run)
                if not same(used, previous) or str(run / "previous.pt") not in said.getvalue():
                    result = "wrong"
            yield name, kind, result


def changes(args, folder, pool):
    """A table of all changes, and whether none led to a wrong result."""
    results = collections.defaultdict(collections.Counter)
    for name, kind, result in itertools.chain(changed_checkpoints(args, folder), changed_data(args, folder)):
        results[name, kind][result] += 1
    rows = [(*key, n.total(), n["noticed"], n["without effect"], n["wrong"]) for key, n in results.items()]
    columns = ("file", "change", "times", "noticed", "read as if unchanged, rightly", "wrong")
    return table(columns, rows), not any(count["wrong"] for count in results.values())


# Reports --------------------------------------------------------------------------------------------------------------


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def record(command, text):
    """Put the table and the command that made it into its section of docs/reliability.md."""
    path, name = ROOT / "docs" / "reliability.md", command.split()[0]
    machine = "{processor}, Python {python}, torch {torch}".format(**environment())
    section = f"<!-- {name} -->\n`python tests/reliability.py {command}`; {machine}\n\n{text}\n<!-- /{name} -->"
    pattern = rf"<!-- {name} -->.*<!-- /{name} -->"
    path.write_text(re.sub(pattern, lambda _: section, path.read_text(), flags=re.DOTALL))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kills", "signals", "dropped", "changes"], help="what to do to the runs")
    parser.add_argument("--count", type=int, default=200, help="kills or signals; changes of each file (default: 200)")
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--record", action="store_true", help="put the table into docs/reliability.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "data")
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
            text, good = globals()[args.what](args, Path(folder), pool)
    print(text)
    if args.record:
        record(args.what if args.what == "dropped" else f"{args.what} --count {args.count}", text)
    return good


if __name__ == "__main__":
    sys.exit(not main())
