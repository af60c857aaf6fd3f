"""Train and evaluate several seeds of a published row, or of a command of your own.

python benchmarks/reproduce.py --list
python benchmarks/reproduce.py mlp-lecture --seeds 5 --jobs 2
python benchmarks/reproduce.py --command "train_classifier.py --model mlp --lr 1e-3" --seeds 5
python benchmarks/reproduce.py --quick    # minutes: do short forms of some rows fall where they fell before?

If it was interrupted, the same command resumes it. With --jobs 2, two seeds train side by side, each on half of the
cores; OMP_NUM_THREADS sets another number of threads for each. Only --record writes to benchmarks/results/ and assets/.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare import MEASURES, mean_sd, read_csv, read_metrics
from engine import flags
from engine.checkpoint import has_checkpoint, load_checkpoint
from engine.errors import UserError, run_script
from engine.errors import command as command_line
from engine.folder import read_config
from engine.provenance import warn_if_code_changed
from tables import accuracy

RESULTS = ROOT / "benchmarks" / "results" / "results.json"
BANDS = ROOT / "benchmarks" / "results" / "quick.json"
Row = dict[str, Any]

# name -> command, in which a row's name stands for the same seed's run of that row.
ROWS = {
    "mlp-lecture": "train_classifier.py --model mlp --recipe lecture",
    "cnn-lecture": "train_classifier.py --model cnn --recipe lecture",
    "mlp-leaky-relu": "train_classifier.py --model mlp --activation leaky-relu",
    "mlp-tanh": "train_classifier.py --model mlp --activation tanh",
    "mlp-sigmoid": "train_classifier.py --model mlp --activation sigmoid",
    "mlp-bce": "train_classifier.py --model mlp --loss bce",
    "mlp-mse": "train_classifier.py --model mlp --loss mse",
    "mlp-mae": "train_classifier.py --model mlp --loss mae",
    "cnn-batch-norm": "train_classifier.py --model cnn --batch-norm",
    "mlp-best": "train_classifier.py --model mlp --recipe best",
    "cnn-best": "train_classifier.py --model cnn --recipe best --amp",
    "cnn-best-all-images": "train_classifier.py --model cnn --recipe best --val-size 0 --amp",
    "cnn-best-60-epochs": "train_classifier.py --model cnn --recipe best --val-size 0 --epochs 60 --amp",
    "resnet-best": "train_classifier.py --model resnet --recipe best --val-size 0 --amp --compile",
    "maxout-first-stage": "train_classifier.py --recipe paper --compile",
    "maxout-paper": "benchmarks/maxout_paper.py --compile --first-stage maxout-first-stage",
    "mlp-permutation-invariant": "train_classifier.py --model mlp --recipe best --no-augment",
    "digits-best": "train_classifier.py --dataset digits --recipe best",
    "gan-lecture": "train_gan.py --recipe lecture --compile",
    "gan-best": "train_gan.py --recipe best --amp --compile",
    "gan-best-no-r1": "train_gan.py --recipe best --r1 0 --amp --compile",
    "gan-best-large": "train_gan.py --recipe best --networks large --amp --compile",
    # The next is trained for as many minutes as gan-best; the one after it as gan-best-large, without bfloat16.
    "gan-relativistic": "train_gan.py --recipe best --loss relativistic --r1 0.05 --epochs 40 --amp --compile",
    "gan-relativistic-large": (
        "train_gan.py --recipe best --networks large --loss relativistic --r1 0.2 --epochs 48 --compile"
    ),
    "gan-paper": "train_gan.py --recipe paper --amp --compile",
    "cgan-lecture": "train_cgan.py --recipe lecture --compile",
    "cgan-best": "train_cgan.py --recipe best --amp --compile",
    "cgan-best-no-wrong-label": "train_cgan.py --recipe best --wrong-label 0 --amp --compile",
    "cgan-paper": "train_cgan.py --recipe paper --amp --compile",
    "cgan-paper-with-r1": (
        "train_cgan.py --recipe paper --noise centred --init he --r1 0.5 --dropout-g 0 --dropout-d 0.2 --amp --compile"
    ),
    "vae-lecture": "train_likelihood.py --model vae",
    "rbm-lecture": "train_likelihood.py --model rbm",
    "rnn-lecture": "train_likelihood.py --model rnn",
    "hmm-lecture": "train_likelihood.py --model hmm",
    "hmm-64": "train_likelihood.py --model hmm --states 64",
    "hmm-128": "train_likelihood.py --model hmm --states 128",
    "hmm-512": "train_likelihood.py --model hmm --states 512",
    "vae-best": "train_likelihood.py --model vae --recipe best --compile",
    "vae-best-k50": (
        "train_likelihood.py --model vae --recipe best --importance-samples 50 --epochs 40 --batch-size 100"
        " --lr 4e-3 --eps 1e-8 --amp"
    ),
    "rbm-best": "train_likelihood.py --model rbm --recipe best",
    "rnn-best": "train_likelihood.py --model rnn --recipe best --amp",
}

# What has been published for a row.
PUBLISHED = {
    "mlp-lecture": "92.46 % (the lecture's code, one seed)",
    "cnn-lecture": "97.76 % (the lecture's code, one seed)",
    "resnet-best": "99.74 % (mean of ten single networks, ttdoucet/mnist)",
    "maxout-paper": "99.06 % (Goodfellow et al. 2013)",
    "mlp-permutation-invariant": (
        "99.06 % (Goodfellow et al. 2013), 99.22 % (adversarial, 2014), 99.43 % (ladder network, 2015)"
    ),
    "gan-best-large": "Parzen 225 ± 2 (Goodfellow et al. 2014)",
    "gan-paper": "Parzen 225 ± 2 (Goodfellow et al. 2014)",
    "cgan-paper": "Parzen 132 ± 1.8 (Mirza & Osindero 2014)",
    "vae-best": "86.76 nats (Burda et al. 2015)",
    "vae-best-k50": "84.78 nats (Burda et al. 2015)",
    "rbm-best": "86.34 nats (Salakhutdinov & Murray 2008)",
    "rnn-best": "79.20 nats (PixelRNN, 2016)",
}

# name -> a short form of the row, in float32 and not compiled, and what is compared.
QUICK = {
    "gan-best": ("train_gan.py --recipe best --dataset digits --epochs 25", "fid"),
    "mlp-lecture": ("train_classifier.py --model mlp --recipe lecture", "test_accuracy"),
    "digits-best": ("train_classifier.py --recipe best --dataset digits --epochs 6", "test_accuracy"),
}

PROVENANCE = ("torch", "python", "processor", "cores", "threads", "gpu", "commit")
LEFT_OUT = ("data_dir", "first_stage", "classes", "goal")  # of the options: paths, and what a script adds to them
OURS = {"--seed", "--data-dir", "--output-dir", "--resume", "--auto-resume"}  # flags that --command may not hold

# What the pages show of the first seed's run: row -> file of the run -> file of assets/.
KEPT = {
    "vae-lecture": {
        "evaluation/samples.png": "vae-lecture.png",
        "evaluation/interpolation-seed0.png": "vae-latent-walk.png",
    },
    "rbm-lecture": {"evaluation/samples.png": "rbm-lecture.png", "evaluation/gibbs_chains.png": "rbm-gibbs-chains.png"},
    "rnn-lecture": {"evaluation/samples.png": "rnn-lecture.png"},
    "hmm-lecture": {"evaluation/samples.png": "hmm-lecture.png", "evaluation/real_images.png": "real.png"},
    "gan-lecture": {"samples/epoch-0025.png": "gan-lecture.png"},
    "cgan-lecture": {"samples/epoch-0025.png": "cgan-lecture.png"},
    "gan-paper": {"curves.png": "gan-paper-curves.png"},
    "gan-best": {
        "evaluation/samples.png": "gan-best.png",
        "evaluation/nearest_training_images.png": "gan-best-neighbours.png",
    },
    "cgan-best": {"samples.gif": "cgan-best.gif", "evaluation/same_noise-seed0.png": "cgan-best-same-noise.png"},
}


def run_seed(command: str, seed: int, folder: Path, args: Namespace, processes: list[subprocess.Popen]) -> Row:
    """Train and evaluate one seed in `folder`, resuming what is there; returns its metrics.json.

    processes: the processes that it starts are appended.
    """

    def call(script, *options):
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs)), **os.environ}
        words = [*options, "--data-dir", args.data_dir]
        process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, words)], env=environment)
        processes.append(process)
        if process.wait():
            raise UserError(f"{script} stopped; fix what it says, then the same command resumes {folder}")

    metrics = folder / "evaluation" / "metrics.json"
    script, *options = [folder.with_name(f"{word}-{seed}") if word in ROWS else word for word in shlex.split(command)]
    if metrics.is_file():
        print(f"{folder} is finished; delete it, or name another --output-dir, to train it again")
        if has_checkpoint(folder):
            warn_if_code_changed(load_checkpoint(folder), folder)
    else:
        call(script, *options, "--seed", seed, "--output-dir", folder, "--auto-resume")
        call("evaluate.py", folder)
    return read_metrics(metrics)


def run_all(tasks: list[tuple[str, int, Path]], args: Namespace) -> list[Row]:
    """Run (command, seed, folder) tasks, --jobs at a time; returns their metrics.json."""
    processes: list[subprocess.Popen] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_seed, *task, args, processes) for task in tasks]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)  # if one has failed, no more are begun
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # `kill` ends this process alone; a training saves first
                process.terminate()
            raise
    return [job.result() for job in jobs]


def run_seeds(name: str, command: str, args: Namespace) -> tuple[list[Path], list[Row]]:
    """Train and evaluate every seed, after those of a row that it continues; returns the folders and metrics.json."""
    for word in shlex.split(command):
        if word in ROWS:
            run_row(word, args)
    folders = [Path(args.output_dir) / f"{name}-{seed}" for seed in range(args.seeds)]
    return folders, run_all([(command, seed, folder) for seed, folder in enumerate(folders)], args)


def run_row(name: str, args: Namespace) -> None:
    """Run a row's seeds. With --record, put it into results.json and its images into assets/."""
    folders, metrics = run_seeds(name, ROWS[name], args)
    print_seeds(name, folders, metrics, read_results().get(name, {}))
    if name in PUBLISHED:
        print(f"  published: {PUBLISHED[name]}")
    if args.record:
        record(name, metrics, folders)


def run_command(command: str, args: Namespace) -> None:
    """Run the seeds of a command that is not a row."""
    try:
        words = shlex.split(command.removeprefix("python "))
    except ValueError as error:
        raise UserError(f"--command {command!r} cannot be read: {error}") from error
    if not words or not words[0].startswith("train_") or not (ROOT / words[0]).is_file():
        raise UserError(f'--command {command!r} must begin with a training script, like "train_gan.py --recipe best"')
    if ours := OURS & {word.split("=")[0] for word in words}:
        raise UserError(f"--command must not hold {min(ours)}, which reproduce.py sets; see its --help")
    name = folder_name(words)
    folders, metrics = run_seeds(name, shlex.join(words), args)
    print_seeds(name, folders, metrics, {})


def folder_name(words: list[str]) -> str:
    """'train_gan.py --lr 1e-3 --amp' -> 'gan--lr-1e-3--amp': another command has another name."""
    name = re.sub(r"[^\w.,+=-]", "%", "-".join(words)).removeprefix("train_").replace(".py", "", 1).replace("---", "--")
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def print_seeds(name: str, folders: list[Path], metrics: list[Row], row: Row) -> None:
    """Print each measure's mean ± standard deviation beside that of `row` of results.json, and how to plot the runs."""
    print(f"{name}, {len(folders)} seed{'s' * (len(folders) > 1)}")
    for measure in MEASURES:
        if measure in metrics[0]:
            values = [seed[measure] for seed in row.get("seeds", []) if measure in seed]
            before = accuracy(row) if "test_errors" in row else mean_sd(measure, values) if values else ""
            text = mean_sd(measure, [seed[measure] for seed in metrics])
            print(f"  {measure} {text}{', recorded ' * bool(before)}{before}")
    print(f"  seconds of training {mean_sd('seconds', [sum(read_seconds(folder)) for folder in folders])}")
    print(f"  plot: {command_line('benchmarks/compare.py', *folders)}")


def read_seconds(folder: Path) -> list[float]:
    """The seconds of training that each epoch took."""
    return [row["seconds"] for row in read_csv(folder / "seconds.csv", "seconds")]


def read_results() -> Row:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


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


def provenance(configs: list[Row]) -> Row:
    for key in PROVENANCE:
        if len({config[key] for config in configs}) > 1:
            print(f"  warning: the seeds differ in {key}; the row names that of seed 0")
    return {key: configs[0][key] for key in PROVENANCE}


def record(name: str, metrics: list[Row], folders: list[Path]) -> None:
    """Put the row into results.json and what KEPT says of the first seed's run into assets/."""
    seconds, configs = list(map(read_seconds, folders)), list(map(read_config, folders))
    row: Row = {
        "command": f"python {ROWS[name]}",
        "published": PUBLISHED.get(name, ""),
        "options": {key: value for key, value in configs[0]["options"].items() if key not in LEFT_OUT},
        "epochs_trained": [len(epochs) for epochs in seconds],
        "training_seconds": [round(sum(epochs)) for epochs in seconds],
        "epochs_evaluated": [seed["epochs"] for seed in metrics],  # best.pt's, if images are held out
        **measured(metrics),
        **provenance(configs),
    }
    rows = {**read_results(), name: row}
    RESULTS.write_text(json.dumps({name: rows[name] for name in ROWS if name in rows}, indent=2) + "\n")
    for source, target in KEPT.get(name, {}).items():
        shutil.copy(folders[0] / source, ROOT / "assets" / target)
    print(f"  wrote {RESULTS}")


def short_forms(args: Namespace) -> dict[str, list[float]]:
    """What is compared of each short form that can be trained here, for one seed or, with --record, three."""
    has_mnist = Path(args.data_dir, "MNIST").is_dir()
    names = [name for name, (command, _) in QUICK.items() if has_mnist or "digits" in command]
    print("".join(f"{name}: skipped, there is no MNIST in {args.data_dir}\n" for name in QUICK.keys() - names), end="")
    args.jobs = os.cpu_count()  # with one thread each
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(name, seed) for name in names for seed in range(3 if args.record else 1)]
        tasks = [(QUICK[name][0], seed, Path(folder) / f"{name}-{seed}") for name, seed in pairs]
        values: dict[str, list[float]] = {}
        for (name, _), metrics in zip(pairs, run_all(tasks, args)):
            values.setdefault(name, []).append(metrics[QUICK[name][1]])
    return values


def quick(args: Namespace) -> bool:
    """Train the short forms; whether each falls in its band. With --record: make the bands, from three seeds each."""
    bands, good = json.loads(BANDS.read_text()), True
    for name, values in short_forms(args).items():
        command, measure = QUICK[name]
        if args.record:  # three values say little about the spread: twice their range on either side
            low, high, spread = min(values), max(values), 2 * (max(values) - min(values))
            bands[name] = {"command": command, "metric": measure, "low": low - spread, "high": high + spread}
        low, high = bands[name]["low"], bands[name]["high"]
        good &= low <= values[0] <= high
        print(f"{name}: {measure} {values[0]:.4f}, band {low:.4f} to {high:.4f}", flush=True)
    if args.record:
        BANDS.write_text(json.dumps({name: bands[name] for name in QUICK if name in bands}, indent=2) + "\n")
    return good


def get_args_parser() -> flags.ArgumentParser:
    parser = flags.ArgumentParser("reproduce.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("names", metavar="NAME", nargs="*", help="rows to run")
    add("--list", action="store_true", help="print the rows and their commands")
    add("--command", metavar='"SCRIPT ..."', help="run this training command of your own")
    add("--quick", action="store_true", help="train short forms and compare with their bands")
    add("--record", action="store_true", help="write the rows, or with --quick the bands, to benchmarks/results/")
    add("--seeds", type=positive, default=5, help="number of seeds, from 0")
    add("--jobs", type=positive, default=1, help="seeds side by side")
    add("--data-dir", type=flags.path, default="data", help="folder of the datasets")
    add("--output-dir", type=flags.path, default="runs/reproduce", help="folder of the runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if unknown := set(args.names) - ROWS.keys():
        parser.error(f"there is no row {min(unknown)}; --list prints them")
    if args.quick:
        sys.exit(0 if quick(args) else "a short form falls outside its band in benchmarks/results/quick.json")
    if args.list:
        print("\n".join(f"{name:25}  python {command}" for name, command in ROWS.items()))
    for name in args.names:
        run_row(name, args)
    if args.command is not None:
        run_command(args.command, args)


if __name__ == "__main__":
    run_script(main)
