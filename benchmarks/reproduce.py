"""Train and evaluate several seeds of a published row, or of a command of your own.

python benchmarks/reproduce.py --list
python benchmarks/reproduce.py mlp-lecture --seeds 5 --jobs 2
python benchmarks/reproduce.py --command "train_classifier.py --model mlp --lr 1e-3" --seeds 5
python benchmarks/reproduce.py mlp-fast --command "train_classifier.py --model mlp --lr 1e-3" --record    # a new row
python benchmarks/reproduce.py --minutes  # how long the rows take: three epochs of each, an hour on an idle machine
python benchmarks/reproduce.py --quick    # a minute: do short forms of some rows fall where they fell before?

To resume, run the same command again. With --jobs 2, two seeds train side by side, each on half of the cores;
OMP_NUM_THREADS sets another number of threads for each. Only --record writes to benchmarks/results/ and assets/.
"""

import json
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare import print_table, read_measures, read_run
from engine import flags
from engine.checkpoint import load_checkpoint
from engine.errors import command, run_script
from engine.folder import read_config
from engine.provenance import warn_if_code_changed
from experiments.run import start, wait
from tables import MEASURES, accuracy, measures, nats

RESULTS = ROOT / "benchmarks" / "results" / "results.json"
BANDS = ROOT / "benchmarks" / "results" / "quick.json"  # short forms: command, what is compared, and its band
MINUTES = ROOT / "benchmarks" / "results" / "minutes.json"  # the seconds of three epochs of each row
Row = dict[str, Any]

# name -> command, in which a row's name stands for the same seed's run of that row.
ROWS = {name: row["command"].removeprefix("python ") for name, row in json.loads(RESULTS.read_text()).items()}

PROVENANCE = ("torch", "python", "processor", "cores", "threads", "gpu", "commit")
LEFT_OUT = ("data_dir", "first_stage", "classes", "goal")  # of the options: paths, and what a script adds to them

# What the pages show: file of assets/ -> row, and file of its first seed's run.
ASSETS = {
    "vae-lecture.png": ("vae-lecture", "evaluation/samples.png"),
    "vae-latent-walk.png": ("vae-lecture", "evaluation/interpolation-seed0.png"),
    "rbm-lecture.png": ("rbm-lecture", "evaluation/samples.png"),
    "rbm-gibbs-chains.png": ("rbm-lecture", "evaluation/gibbs_chains.png"),
    "rnn-ten-minutes.png": ("rnn-ten-minutes", "evaluation/samples.png"),
    "hmm-ten-minutes.png": ("hmm-ten-minutes", "evaluation/samples.png"),
    "real.png": ("hmm-lecture", "evaluation/real_images.png"),
    "gan-lecture.png": ("gan-lecture", "samples/epoch-0025.png"),
    "cgan-lecture.png": ("cgan-lecture", "samples/epoch-0025.png"),
    "gan-paper-curves.png": ("gan-paper", "curves.png"),
    "gan-ten-minutes.png": ("gan-ten-minutes", "evaluation/samples.png"),
    "gan-best-neighbours.png": ("gan-best", "evaluation/nearest_training_images.png"),
    "cgan-best.gif": ("cgan-best", "samples.gif"),
    "cgan-best-same-noise.png": ("cgan-best", "evaluation/same_noise-seed0.png"),
}


def train(tasks: list[tuple[list[str], int, Path]], args: Namespace) -> list[Row]:
    """Train and evaluate each (command, seed, folder), --jobs side by side; returns what each metrics.json holds."""
    left, files = [], [folder / "evaluation" / "metrics.json" for _, _, folder in tasks]
    for words, seed, folder in tasks:
        if read_measures(folder) and is_finished(checkpoint := load_checkpoint(folder)):
            print(f"{folder} is finished; delete it, or name another --output-dir, to train it again")
            warn_if_code_changed(checkpoint, folder)
        else:
            own = [folder.with_name(f"{word}-{seed}") if word in ROWS else word for word in words]
            where = ["--seed", seed, "--data-dir", args.data_dir, "--output-dir", folder, "--auto-resume"]
            left.append([own + where, ["evaluate.py", folder]])
    environment = {**os.environ}
    if args.jobs > 1:  # else the script chooses
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    for i in range(0, len(left), args.jobs):
        wait([start(ROOT, *each, env=environment) for each in left[i : i + args.jobs]])
    return [json.loads(file.read_text()) for file in files]


def is_finished(checkpoint: Row) -> bool:
    """Whether a run has made all its epochs. The script knows whether one that may end early has ended."""
    options = checkpoint["options"]
    return options["dry_run"] or checkpoint["epoch"] >= options["epochs"]


def run_row(name: str, args: Namespace) -> None:
    """Run a row's seeds, after those of a row that it continues. With --record, put it into results.json."""
    words = shlex.split(ROWS[name])
    for word in ROWS.keys() & words:
        run_row(word, args)
    own = args.command and name == args.names[0]  # another command has other folders
    stem = folder_name(args.command) if own else name
    folders = [Path(args.output_dir) / f"{stem}-{seed}" for seed in range(args.seeds)]
    metrics = train([(words, seed, folder) for seed, folder in enumerate(folders)], args)
    print_table([[read_run(folder) for folder in folders]])
    print(f"plot: {command('benchmarks/compare.py', *folders)}")
    if row := json.loads(RESULTS.read_text()).get(name):
        print_recorded(row)
    if args.record:
        record(name, metrics, folders)


def print_recorded(row: Row) -> None:
    """The row as the pages show it."""
    seeds = row.get("seeds")
    columns = dict(zip(("nats per image", *MEASURES), (nats(seeds), *measures(seeds)))) if seeds else {}
    print("recorded:", ", ".join(f"{key} {text}" for key, text in columns.items() if text) or accuracy(row))
    print("reference:", row["published"] or "-")


def folder_name(words: list[str]) -> str:
    """'train_gan.py --lr 1e-3' -> 'gan-lr-1e-3-' and a checksum: another command has another name."""
    name = re.sub(r"[^\w.]+", "-", " ".join(words).removeprefix("train_").replace(".py", "", 1))
    return f"{name[:100]}-{zlib.crc32(shlex.join(words).encode()):08x}"


def measured(metrics: list[Row]) -> Row:
    """What a row keeps of the seeds' metrics.json: accuracies and errors, or everything."""
    if "test_accuracy" not in metrics[0]:
        return {"seeds": metrics}
    accuracies = [seed["test_accuracy"] for seed in metrics]
    return {
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "test_errors": [seed["test_errors"] for seed in metrics],
    }


def record(name: str, metrics: list[Row], folders: list[Path]) -> None:
    """Put the row into results.json, and what ASSETS says of the first seed's run into assets/."""
    rows, runs, config = json.loads(RESULTS.read_text()), list(map(read_run, folders)), read_config(folders[0])
    row: Row = {
        "command": f"python {ROWS[name]}",
        "published": rows.get(name, {}).get("published", ""),  # a new row's is written there by hand
        "options": {key: value for key, value in config["options"].items() if key not in LEFT_OUT},
        "epochs_trained": [len(run.history) for run in runs],
        "epochs_evaluated": [seed["epochs"] for seed in metrics],  # best.pt's, if images are held out
        **measured(metrics),
        **{key: config[key] for key in PROVENANCE},
    }
    RESULTS.write_text(json.dumps({**rows, name: row}, indent=2) + "\n")
    for asset, (shown, file) in ASSETS.items():
        if shown == name:
            shutil.copy(folders[0] / file, ROOT / "assets" / asset)
    print(f"wrote {RESULTS}")


def time_epochs(names: list[str], args: Namespace) -> None:
    """Time three epochs of each row in float32, eagerly, with one thread. With --record: write minutes.json anew."""
    seconds: dict[str, list[float]] = {}
    for name in names:
        words = [word for word in shlex.split(ROWS[name]) if word not in ("--amp", "--compile")]
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, name)
            own = ["--epochs", 3, "--device", "cpu", "--threads", 1, "--data-dir", args.data_dir, "--output-dir", run]
            wait([start(ROOT, [*words, *own])])
            seconds[name] = [round(each, 2) for each in load_checkpoint(run)["seconds"].tolist()[:3]]
            config = read_config(run)
        print(f"{name}: {seconds[name]} seconds an epoch")
        if args.record:
            machine = {key: config[key] for key in PROVENANCE}
            MINUTES.write_text(json.dumps({"seconds": seconds, **machine}, indent=2) + "\n")


def quick(args: Namespace) -> bool:
    """Train the short forms of quick.json; whether each falls in its band. With --record: set the bands by three seeds.

    Three values say little about the spread: a band is as wide as twice their range, on either side of them.
    """
    bands, good = json.loads(BANDS.read_text()), True
    args.jobs = os.cpu_count()  # with one thread each
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(name, seed) for name in bands for seed in range(3 if args.record else 1)]
        tasks = [(bands[name]["command"].split(), seed, Path(folder, f"{name}-{seed}")) for name, seed in pairs]
        metrics = dict(zip(pairs, train(tasks, args)))
    for name, band in bands.items():
        values = [own[band["metric"]] for (row, _), own in metrics.items() if row == name]
        if args.record:
            spread = 2 * (max(values) - min(values))
            band.update(low=min(values) - spread, high=max(values) + spread)
        good &= band["low"] <= values[0] <= band["high"]
        print(f"{name}: {band['metric']} {values[0]:.4f}, band {band['low']:.4f} to {band['high']:.4f}")
    if args.record:
        BANDS.write_text(json.dumps(bands, indent=2) + "\n")
    return good


def get_args_parser() -> flags.ArgumentParser:
    parser = flags.ArgumentParser("reproduce.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("names", metavar="NAME", nargs="*", help="rows to run, or the name of --command")
    add("--list", action="store_true", help="print the rows and their commands")
    add("--command", type=shlex.split, metavar='"SCRIPT ..."', help="run this training command of your own")
    add("--quick", action="store_true", help="train short forms and compare with their bands")
    add("--minutes", action="store_true", help="time three epochs of each row that continues no other")
    add("--record", action="store_true", help="write the results to benchmarks/results/ and assets/")
    add("--seeds", type=positive, default=5, help="number of seeds, from 0")
    add("--jobs", type=positive, default=1, help="seeds side by side")
    add("--data-dir", type=flags.path, default="data", help="folder of the datasets")
    add("--output-dir", type=flags.path, default="runs/reproduce", help="folder of the runs")
    return parser


def add_row(parser: flags.ArgumentParser, args: Namespace) -> None:
    """Add --command to ROWS. A usage error if it is no training command."""
    if not args.command or not (ROOT / args.command[0]).is_file():
        parser.error('--command must begin with a training script, like "train_gan.py --recipe best"')
    args.names = args.names or [folder_name(args.command)]
    if own := {"--seed", "--data-dir", "--output-dir"} & {word.partition("=")[0] for word in args.command}:
        parser.error(f"omit {min(own)} from --command; reproduce.py has --seeds, --data-dir and --output-dir")
    words = {word for text in ROWS.values() for word in text.split()} - ROWS.keys()
    if args.names[0] in {*args.command, *words}:  # where a row's name stands for its run
        parser.error(f"{args.names[0]} is a word of a command; use another name for the row")
    ROWS[args.names[0]] = shlex.join(args.command)


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.command is not None:
        add_row(parser, args)
    if unknown := set(args.names) - ROWS.keys():
        parser.error(f"there is no row {min(unknown)}; --list prints them")
    if args.quick:
        sys.exit(0 if quick(args) else "a short form falls outside its band in benchmarks/results/quick.json")
    if args.minutes:
        return time_epochs(args.names or [name for name, text in ROWS.items() if not ROWS.keys() & text.split()], args)
    if args.list:
        print("\n".join(f"{name:25}  python {text}" for name, text in ROWS.items()))
    if not args.names and not args.list:
        parser.error("name a row; --list prints them")
    for name in args.names:
        run_row(name, args)


if __name__ == "__main__":
    run_script(main)
