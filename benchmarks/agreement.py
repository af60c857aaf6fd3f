"""Does --compile change what is learned? The recipes, in short, on digits, over five seeds, both ways.

python benchmarks/agreement.py --jobs 2
python benchmarks/agreement.py --only train_gan.py    # these rows alone; the others stay

The figures are those of 300 held-out images: accuracy of a classifier, Parzen log-likelihood of a GAN, log-likelihood
otherwise, in nats. Both ways have the same first weights, batches and random numbers. Writes
benchmarks/results/agreement.json.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare import mean_sd
from engine.flags import number
from engine.provenance import environment

CASES = [
    "train_classifier.py --model mlp --recipe lecture --epochs 10",
    "train_classifier.py --model mlp --recipe best --epochs 10",
    "train_classifier.py --model cnn --recipe lecture --epochs 5",
    "train_classifier.py --model cnn --recipe best --epochs 5",
    "train_classifier.py --recipe fast --epochs 10",
    "train_classifier.py --recipe paper --epochs 100",
    "train_gan.py --recipe lecture --epochs 5",
    "train_gan.py --recipe best --epochs 10",
    "train_gan.py --recipe best --networks large --epochs 4",
    "train_gan.py --recipe best --adversarial-loss relativistic --epochs 4",
    "train_gan.py --recipe paper --epochs 4",
    "train_cgan.py --recipe lecture --epochs 4",
    "train_cgan.py --recipe best --epochs 4",
    "train_cgan.py --recipe paper --epochs 4",
    "train_likelihood.py --model vae --recipe lecture --epochs 10",
    "train_likelihood.py --model vae --recipe best --epochs 10",
    "train_likelihood.py --model vae --recipe paper --epochs 10",
    "train_likelihood.py --model rbm --recipe lecture --epochs 5",
    "train_likelihood.py --model rbm --recipe best --epochs 5",
    "train_likelihood.py --model rbm --recipe paper --epochs 2",
    "train_likelihood.py --model rnn --recipe lecture --epochs 5",
    "train_likelihood.py --model rnn --recipe best --epochs 2",
    "train_likelihood.py --model hmm --recipe lecture --epochs 5",
    "train_likelihood.py --model hmm --recipe best --epochs 2",
]


def figure(command, seed, compiled, folder):
    """Train one seed on digits; the name of its figure for the held-out images, and the figure."""
    script, *options = command.split()
    run = Path(folder) / f"{seed}{'-compiled' * compiled}"
    options += ["--dataset", "digits", "--val-size", "300", "--seed", str(seed), "--output-dir", str(run)]
    call(script, *options, *["--compile"] * compiled)
    with open(run / "metrics.csv") as file:
        *_, last = csv.DictReader(file)
    name = "val_accuracy" if "val_accuracy" in last else "val_log_likelihood"
    return name, float(last[name])


def call(script, *options):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *options], env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True
    )
    if done.returncode:
        sys.exit(done.stderr.decode())
    if b"not compiled" in done.stdout or b"runs eagerly" in done.stdout:
        sys.exit(f"{script} {' '.join(options)} was not compiled")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=number(int, 2), default=5, help="number of seeds (default: 5)")
    parser.add_argument("--only", default="", help="text of the commands to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side, on one core each (default: 1)")
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "agreement.json"
    rows = json.loads(path.read_text())["rows"] if args.only and path.is_file() else []
    for command in [command for command in CASES if args.only in command]:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
            jobs = {
                way: [pool.submit(figure, command, seed, way == "compiled", folder) for seed in range(args.seeds)]
                for way in ("eager", "compiled")
            }
            ((measure, _), *_) = [job.result() for job in jobs["eager"]]
            seeds = {way: [job.result()[1] for job in own] for way, own in jobs.items()}
        distance = abs(statistics.mean(seeds["compiled"]) - statistics.mean(seeds["eager"]))
        noise = statistics.stdev(seeds["eager"]) * (2 / args.seeds) ** 0.5  # of the difference of two means
        rows = [row for row in rows if row["command"] != command]
        machine = environment()
        row = {"command": command, "measure": measure, "standard_errors": distance / max(noise, 1e-12), **seeds}
        rows.append({**row, "commit": machine.pop("commit")})  # --only keeps rows of other commits
        figures = {way: mean_sd(measure, values) for way, values in seeds.items()}
        print(f"{command}: {measure} {figures['eager']}, compiled {figures['compiled']}", flush=True)
        rows.sort(key=lambda row: CASES.index(row["command"]))
        path.write_text(json.dumps({"rows": rows, **machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
