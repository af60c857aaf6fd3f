"""Train and evaluate what the README's table states, seed by seed, and write benchmarks/results/results.json.

python benchmarks/reproduce.py --list
python benchmarks/reproduce.py mlp-lecture --seeds 5 --data-dir data
python benchmarks/reproduce.py --quick --data-dir data    # minutes: do short forms fall where they fell before?

If it was interrupted, the same command resumes it. With --jobs 2, two seeds train side by side.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.checkpoint import has_checkpoint
from engine.errors import UserError, run_script

RESULTS = ROOT / "benchmarks" / "results" / "results.json"
BANDS = ROOT / "benchmarks" / "results" / "quick.json"

# name -> command, in which a row's name stands for the same seed's run of that row; what has been published for it.
ROWS = {
    "mlp-lecture": ("train_classifier.py --model mlp --recipe lecture", "92.46 % (the lecture's code, one seed)"),
    "cnn-lecture": ("train_classifier.py --model cnn --recipe lecture", "97.76 % (the lecture's code, one seed)"),
    "mlp-leaky-relu": ("train_classifier.py --model mlp --activation leaky-relu", ""),
    "mlp-tanh": ("train_classifier.py --model mlp --activation tanh", ""),
    "mlp-sigmoid": ("train_classifier.py --model mlp --activation sigmoid", ""),
    "mlp-bce": ("train_classifier.py --model mlp --loss bce", ""),
    "mlp-mse": ("train_classifier.py --model mlp --loss mse", ""),
    "mlp-mae": ("train_classifier.py --model mlp --loss mae", ""),
    "cnn-batch-norm": ("train_classifier.py --model cnn --batch-norm", ""),
    "mlp-best": ("train_classifier.py --model mlp --recipe best", ""),
    "cnn-best": ("train_classifier.py --model cnn --recipe best --amp", ""),
    "cnn-best-all-images": ("train_classifier.py --model cnn --recipe best --val-size 0 --amp", ""),
    "cnn-best-60-epochs": ("train_classifier.py --model cnn --recipe best --val-size 0 --epochs 60 --amp", ""),
    "maxout-first-stage": ("train_classifier.py --recipe paper", ""),
    "maxout-paper": (
        "train_classifier.py --recipe paper --second-stage maxout-first-stage",
        "99.06 % (Goodfellow et al. 2013)",
    ),
    "digits-best": ("train_classifier.py --dataset digits --recipe best", ""),
    "gan-lecture": ("train_gan.py --recipe lecture", ""),
    "gan-best": ("train_gan.py --recipe best --amp", ""),
    "gan-best-no-r1": ("train_gan.py --recipe best --amp --r1 0", ""),
    "gan-best-large": ("train_gan.py --recipe best --networks large --amp", "Parzen 225 ± 2 (Goodfellow et al. 2014)"),
    "gan-paper": ("train_gan.py --recipe paper --epochs 124 --amp", "Parzen 225 ± 2 (Goodfellow et al. 2014)"),
    "cgan-lecture": ("train_cgan.py --recipe lecture", ""),
    "cgan-best": ("train_cgan.py --recipe best --amp", ""),
    "cgan-best-no-mismatched": ("train_cgan.py --recipe best --amp --mismatched 0", ""),
    "cgan-paper": ("train_cgan.py --recipe paper --epochs 45 --amp", "Parzen 132 ± 1.8 (Mirza & Osindero 2014)"),
    "vae-lecture": ("train_likelihood.py --model vae", ""),
    "rbm-lecture": ("train_likelihood.py --model rbm", ""),
    "rnn-lecture": ("train_likelihood.py --model rnn", ""),
    "hmm-lecture": ("train_likelihood.py --model hmm", ""),
    "hmm-64": ("train_likelihood.py --model hmm --states 64", ""),
    "hmm-128": ("train_likelihood.py --model hmm --states 128", ""),
    "hmm-512": ("train_likelihood.py --model hmm --states 512", ""),
    "vae-best": ("train_likelihood.py --model vae --recipe best", "86.76 nats (Burda et al. 2015)"),
    "vae-best-k5": (
        "train_likelihood.py --model vae --recipe best --importance-samples 5 --epochs 150 --amp",
        "85.54 nats (Burda et al. 2015)",
    ),
    "vae-best-k50": (
        "train_likelihood.py --model vae --recipe best --importance-samples 50 --epochs 40 --amp",
        "84.78 nats (Burda et al. 2015)",
    ),
    "rbm-best": ("train_likelihood.py --model rbm --recipe best", "86.34 nats (Salakhutdinov & Murray 2008)"),
    "rnn-best": ("train_likelihood.py --model rnn --recipe best --amp", "79.20 nats (PixelRNN, 2016)"),
}

# name -> flags that shorten the row for --quick, and what is compared.
QUICK = {
    "mlp-lecture": ("", "test_accuracy"),
    "digits-best": ("--epochs 10", "test_accuracy"),
    "gan-best": ("--dataset digits --epochs 40", "fid"),
    "cgan-best": ("--dataset digits --epochs 40", "conditional_accuracy"),
}

PATHS = ("data_dir", "second_stage")  # options that say where on the machine something lay

# What the README shows of the first seed's run.
KEPT = {
    "cnn-best": {
        "evaluation/mistakes.png": "assets/mistakes.png",
        "evaluation/confusion_matrix.png": "assets/confusion.png",
    },
    "vae-lecture": {
        "evaluation/samples.png": "assets/vae-lecture.png",
        "evaluation/latent_walk.png": "assets/vae-latent-walk.png",
    },
    "rbm-lecture": {
        "evaluation/samples.png": "assets/rbm-lecture.png",
        "evaluation/gibbs_chains.png": "assets/rbm-gibbs-chains.png",
    },
    "rnn-lecture": {"evaluation/samples.png": "assets/rnn-lecture.png"},
    "hmm-lecture": {
        "evaluation/samples.png": "assets/hmm-lecture.png",
        "evaluation/states.png": "assets/hmm-states.png",
    },
    "gan-lecture": {"samples/epoch-0025.png": "assets/gan-lecture.png"},
    "cgan-lecture": {"samples/epoch-0025.png": "assets/cgan-lecture.png"},
    "gan-paper": {"curves.png": "assets/gan-paper-curves.png"},
    "gan-best-large": {"curves.png": "assets/gan-best-large-curves.png"},
    "gan-best": {
        "samples.gif": "assets/gan-best.gif",
        "evaluation/nearest_training_images.png": "assets/gan-best-neighbours.png",
    },
    "cgan-best": {
        "samples.gif": "assets/cgan-best.gif",
        "evaluation/same_noise-seed0.png": "assets/cgan-best-same-noise.png",
    },
}


def run_seed(command, seed, folder, data_dir, threads):
    """Train and evaluate one seed in `folder`, resuming what is there; returns its metrics.json."""

    def call(script, *flags):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], env=environment).returncode:
            raise UserError(f"{script} stopped; fix what it says, then the same command resumes {folder}")

    metrics = folder / "evaluation" / "metrics.json"
    script, *flags = [folder.with_name(f"{word}-{seed}") if word in ROWS else word for word in command.split()]
    if not metrics.is_file():
        if has_checkpoint(folder):
            call(script, "--resume", folder, "--data-dir", data_dir)
        else:
            for path in (folder / "config.json", folder / "best.pt", *folder.glob("*.tmp")):  # of a run without one
                path.unlink(missing_ok=True)
            call(script, *flags, "--seed", seed, "--data-dir", data_dir, "--output-dir", folder)
        call("evaluate.py", folder, "--data-dir", data_dir)
    return json.loads(metrics.read_text())


def run_row(name, args):
    """Train and evaluate every seed of a row, after those of a row that it continues; put it into results.json."""
    for word in ROWS[name][0].split():
        if word in ROWS:
            run_row(word, args)
    folders = [Path(args.output_dir) / f"{name}-{seed}" for seed in range(args.seeds)]
    threads = max(1, os.cpu_count() // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(run_seed, ROWS[name][0], seed, folder, args.data_dir, threads)
            for seed, folder in enumerate(folders)
        ]
        try:
            metrics = [job.result() for job in jobs]
        finally:  # if one has failed, no more are begun
            pool.shutdown(cancel_futures=True)
    seconds = [[float(row["seconds"]) for row in csv.DictReader(open(folder / "seconds.csv"))] for folder in folders]
    record(name, metrics, seconds, json.loads((folders[0] / "config.json").read_text()))
    for source, target in KEPT.get(name, {}).items():
        shutil.copy(folders[0] / source, ROOT / target)


def record(name, metrics, seconds, config):
    """Put the row into results.json. metrics: the metrics.json of each seed, from 0; seconds: that each epoch took."""
    command, published = ROWS[name]
    row = {
        "command": f"python {command}",
        "published": published,
        "options": {key: value for key, value in config["options"].items() if key not in PATHS},
        "epochs_trained": [len(epochs) for epochs in seconds],
        "training_seconds": [round(sum(epochs)) for epochs in seconds],
        "epochs_evaluated": [seed["epochs"] for seed in metrics],  # best.pt's, if images are held out
    }
    if "test_accuracy" in metrics[0]:
        accuracies = [seed["test_accuracy"] for seed in metrics]
        row["test_accuracy_mean"] = statistics.mean(accuracies)
        row["test_accuracy_sd"] = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        row["test_errors"] = [seed["test_errors"] for seed in metrics]
        print(f"{name}: test accuracy {row['test_accuracy_mean']:.2%} ± {row['test_accuracy_sd']:.2%}")
    else:
        row["seeds"] = metrics
    row.update({key: config[key] for key in ("torch", "python", "processor", "cores", "threads", "gpu", "commit")})
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows[name] = row
    RESULTS.parent.mkdir(exist_ok=True)
    rows = {name: rows[name] for name in ROWS if name in rows}  # in the order above
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


def quick(args):
    """Train the short forms; whether each falls in its band. With --record: make the bands, from three seeds each."""
    bands, good = {} if args.record else json.loads(BANDS.read_text()), True
    for name, (flags, metric) in QUICK.items():
        if "digits" not in f"{name} {flags}" and not (Path(args.data_dir) / "MNIST").is_dir():
            print(f"{name}: skipped, there is no MNIST in {args.data_dir}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            command, threads = f"{ROWS[name][0]} {flags}", os.cpu_count()
            values = [
                run_seed(command, seed, Path(folder) / str(seed), args.data_dir, threads)[metric]
                for seed in range(3 if args.record else 1)
            ]
        if args.record:  # three values say little about the spread: twice their range on either side
            spread = 2 * (max(values) - min(values))
            bands[name] = {"flags": flags, "metric": metric, "low": min(values) - spread, "high": max(values) + spread}
        low, high = bands[name]["low"], bands[name]["high"]
        good &= low <= values[0] <= high
        print(f"{name} {flags}: {metric} {values[0]:.4f}, band {low:.4f} to {high:.4f}", flush=True)
    if args.record:
        BANDS.write_text(json.dumps(bands, indent=2) + "\n")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[[], *ROWS], help="rows to run")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    parser.add_argument("--quick", action="store_true", help="train short forms and compare with their bands")
    parser.add_argument("--record", action="store_true", help="with --quick: make new bands")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: 5)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side (default: 1)")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--output-dir", default="runs/reproduce", help="folder of the runs (default: runs/reproduce)")
    args = parser.parse_args()
    if args.quick:
        sys.exit(0 if quick(args) else "a short form falls outside its band in benchmarks/results/quick.json")
    if args.list or not args.names:
        width = max(map(len, ROWS))
        print("\n".join(f"{name:{width}}  python {command}" for name, (command, _) in ROWS.items()))
    for name in args.names:
        run_row(name, args)


if __name__ == "__main__":
    run_script(main)
