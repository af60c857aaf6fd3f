"""All tests and measurements that need a GPU, in one command, the most important first.

python benchmarks/gpu.py --data-dir data

Each step takes at most 8 minutes. Its result goes into benchmarks/results/gpu.json as soon as it ends. Run again, the
command skips what has succeeded at this commit and resumes interrupted trainings. Then run
`python benchmarks/tables.py`: docs/gpus.md shows what was measured.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from engine import flags
from engine.errors import UserError, run_script
from engine.provenance import environment

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
LIMIT = 480  # seconds a step may take; a longer training is resumed by the next call
STEPS = {  # a training is also evaluated
    "tests": "-m pytest -q -n auto tests/test_cuda.py",
    "gan-lecture": "train_gan.py",
    "race": "benchmarks/speed.py race --seeds 5 --baseline-seeds 1",
    "speed": "benchmarks/speed.py steps --steps 100 --turns 2",
    "cnn-fast": "train_classifier.py --recipe fast --amp",
    "cgan-lecture": "train_cgan.py",
    "gan-paper": "train_gan.py --recipe paper --amp --compile",
    "resnet-best": "train_classifier.py --model resnet --recipe best --val-size 0 --epochs 60 --amp --compile",
    "profile": "benchmarks/speed.py profile --steps 50",
}


def run_step(name: str, commit: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the step's commands and return its row: the commands, seconds, whether it succeeded, and its metrics."""
    folder = Path(args.output_dir) / f"{name}-{commit[:8]}"  # from ROOT, where the commands run
    commands = [STEPS[name].split()]
    if commands[0][0].startswith("train_"):
        commands = [[*commands[0], "--output-dir", str(folder), "--auto-resume"], ["evaluate.py", str(folder)]]
    if name != "tests":
        commands = [[*words, "--data-dir", args.data_dir, "--device", args.device] for words in commands]
    started, output, status = time.monotonic(), "", 0
    for words in commands:
        if status == 0:
            left = max(1, LIMIT - int(time.monotonic() - started))
            limited = ["timeout", "--signal=INT", str(left), sys.executable, *words]  # a training saves first
            done = subprocess.run(limited, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            status, output = done.returncode, output + done.stdout
    row = {
        "commands": [" ".join(["python", *words]).replace(args.data_dir, "data") for words in commands],
        "seconds": round(time.monotonic() - started, 1),
        "succeeded": status == 0,
        "commit": commit,
        "output": output.splitlines()[-40 if status else -1 :],
    }
    metrics = ROOT / folder / "evaluation" / "metrics.json"
    if status == 0 and metrics.is_file():
        row["metrics"] = json.loads(metrics.read_text())
        row["epochs_trained"] = len((ROOT / folder / "metrics.csv").read_text().splitlines()) - 1
    print(f"{name}: {'FAILED' if status else 'done'} in {row['seconds']} s", *output.splitlines()[-5:], sep="\n")
    return row


def run_steps(path: Path, args: argparse.Namespace) -> None:
    """Run the steps that have not succeeded at this commit, and keep their rows in `path`. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
    commit, steps = str(environment()["commit"]), results["steps"]
    for name in args.names:
        if steps.get(name, {}).get("succeeded") and steps[name]["commit"] == commit:
            print(f"{name}: already done")
            continue
        steps[name] = run_step(name, commit, args)
        path.write_text(json.dumps({**results, **environment()}, indent=2) + "\n")
    if failed := [name for name, row in steps.items() if not row["succeeded"]]:
        raise UserError(f"failed: {', '.join(failed)}; their output is in {path}; fix it and run this again")


def main() -> None:
    parser = flags.ArgumentParser("gpu.py", __doc__)
    parser.add_argument("names", metavar="STEP", nargs="*", default=list(STEPS), help="steps to run")
    parser.add_argument("--data-dir", default="data", help="folder of the datasets")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only try the command")
    parser.add_argument("--output-dir", default="runs/gpu", help="folder of the runs")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in STEPS]:
        parser.error(f"no step {', '.join(unknown)}; choose from {', '.join(STEPS)}")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("this machine or this build of torch has no CUDA device; for a trial, add --device cpu")
        torch.cuda.init()  # so that environment() names the GPU
    run_steps(RESULTS if args.device == "cuda" else ROOT / args.output_dir / "trial.json", args)


if __name__ == "__main__":
    run_script(main)
