"""Everything that waits for a GPU, in order of worth: one command for the first GPU that comes.

python benchmarks/gpu.py --data-dir data

Each step takes at most 8 minutes. Its figures go into benchmarks/results/gpu.json as soon as it ends. Run again, the
command skips what has succeeded at this commit and resumes the trainings it interrupted. Then run
`python benchmarks/tables.py`: docs/gpus.md shows what was measured.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from engine.errors import UserError, run_script
from engine.provenance import environment

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
LIMIT = 480  # seconds a step may take


def training(script: str, *flags: str) -> Callable[[Path, str, str], list[list[str]]]:
    """The commands that train and evaluate a run in `folder`, or resume it there."""

    def commands(folder, data_dir, device):
        where = ["--data-dir", data_dir, "--device", device]
        train = [script, *flags, *where, "--output-dir", str(folder), "--auto-resume"]
        return [train, ["evaluate.py", str(folder), *where]]

    return commands


def benchmark(script: str, *flags: str) -> Callable[[Path, str, str], list[list[str]]]:
    return lambda folder, data_dir, device: [[script, *flags, "--data-dir", data_dir, "--device", device]]


# name -> its commands, from a run folder, --data-dir and --device.
STEPS = {
    "tests": lambda folder, data_dir, device: [["-m", "pytest", "-q", "-n", "auto", "tests/test_cuda.py"]],
    "speed": benchmark("benchmarks/speed.py", "--steps", "100", "--turns", "3"),
    "cnn-fast": training("train_classifier.py", "--recipe", "fast", "--amp"),
    "gan-lecture": training("train_gan.py"),
    "race": benchmark("benchmarks/race.py", "--seeds", "5", "--ordinary-seeds", "2"),
    "mlp-lecture": training("train_classifier.py", "--model", "mlp"),
    "cnn-lecture": training("train_classifier.py", "--model", "cnn"),
    "cgan-lecture": training("train_cgan.py"),
    "gan-best": training("train_gan.py", "--recipe", "best", "--amp"),
    "cgan-best": training("train_cgan.py", "--recipe", "best", "--amp"),
    "maxout-first-stage": training("train_classifier.py", "--recipe", "paper"),
    "profile": benchmark("benchmarks/speed.py", "--profile", "--steps", "50"),
}


def run_step(name: str, args: argparse.Namespace) -> dict:
    """Run the step's commands and return its row: the commands, seconds, whether it succeeded, and its figures."""
    commit = environment()["commit"]
    folder = Path(args.output_dir) / f"{name}-{str(commit)[:8]}"
    commands = STEPS[name](folder, args.data_dir, args.device)
    started = time.monotonic()
    output, succeeded = "", True
    for command in commands:
        left = max(1, LIMIT - (time.monotonic() - started))
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, timeout=left, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            output, succeeded = output + done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            output += printed.decode(errors="replace") if isinstance(printed, bytes) else printed
            succeeded = False
        if not succeeded:
            break
    row = {
        "commands": [" ".join(["python", *command]).replace(args.data_dir, "data") for command in commands],
        "seconds": round(time.monotonic() - started, 1),
        "succeeded": succeeded,
        "commit": commit,
        "output": [] if succeeded and name != "tests" else output.splitlines()[-40:],
    }
    metrics = folder / "evaluation" / "metrics.json"
    if succeeded and metrics.is_file():
        row["metrics"] = {key: value for key, value in json.loads(metrics.read_text()).items() if key != "per_class"}
        row["epochs_trained"] = len(list(csv.reader((folder / "metrics.csv").open()))) - 1
    print(f"{name}: {'done' if succeeded else 'FAILED'} in {row['seconds']} s", flush=True)
    print("\n".join(output.splitlines()[-5:] if succeeded else row["output"]), flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="STEP", nargs="*", help=f"steps to run (default: {' '.join(STEPS)})")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets (default: data)")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the command (default: cuda)"
    )
    parser.add_argument("--output-dir", default="runs/gpu", help="folder of the runs (default: runs/gpu)")
    parser.add_argument("--again", action="store_true", help="run the steps again that have already succeeded")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in STEPS]:
        parser.error(f"no step {', '.join(unknown)}; choose from {', '.join(STEPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine or this build of torch has no CUDA device; --device cpu tries the command")
    if args.device == "cuda":
        torch.cuda.init()  # so that environment() names the GPU
    path = RESULTS if args.device == "cuda" else Path(args.output_dir) / "trial.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
    for name in args.names or STEPS:
        before = results["steps"].get(name, {})
        if before.get("succeeded") and before.get("commit") == environment()["commit"] and not args.again:
            print(f"{name}: already done")
            continue
        results["steps"][name] = run_step(name, args)
        results.update(environment())
        path.write_text(json.dumps(results, indent=2) + "\n")
    if failed := [name for name, row in results["steps"].items() if not row["succeeded"]]:
        raise UserError(f"failed: {', '.join(failed)}; their output is in {path}; fix it and run this again")


if __name__ == "__main__":
    run_script(main)
