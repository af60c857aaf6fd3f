"""Apply an experiment, a diff in this folder, to a copy of the repository, and train and evaluate there.

python experiments/run.py                            # list them
python experiments/run.py mixup                      # runs/mixup/code is the edited copy, runs/mixup/seed-0 the run
python experiments/run.py mixup --epochs 5           # with flags of the training script
python experiments/run.py mixup sam --measure        # three seeds with and without the edit, into results.json

A diff begins with a header: a line that says what it is, then `Name: value` lines. Command: the script and its flags.
Measure: of evaluation/metrics.json or, as val_..., of metrics.csv. Baseline: the command that it is compared with, by
default Command; it runs on the unedited code. Control: the same on the edited code.
"""

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results.json"
sys.path.insert(0, str(ROOT))

from engine.errors import UserError, run_script
from engine.folder import new_folder
from engine.provenance import environment

CODE = ("datasets", "engine", "measures", "models", "photos", "weights")
# In one process, which saves the imports: each argument after the code's folder is a script and its flags.
PROGRAM = """import json, runpy, sys
sys.path[0], *commands = sys.argv[1:]
for command in commands:
    sys.argv = json.loads(command)
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.diff"))


def read(name: str) -> dict[str, str]:
    """What the header of an experiment says, by name; `what` is its first line, `lines` how many lines change."""
    if name not in names():
        raise UserError(f"there is no experiment {name}; choose from {', '.join(names())}")
    head, *hunks = re.split(r"^(?=--- )", (HERE / f"{name}.diff").read_text("utf-8"), flags=re.MULTILINE)
    changed = re.findall(r"^(?!--- |\+\+\+ )[+-]", "".join(hunks), flags=re.MULTILINE)
    fields = {key.lower(): value.replace("\n ", "") for key, value in re.findall(r"^(\w+): (.*(?:\n .*)*)", head, re.M)}
    return {"what": head.splitlines()[0], "lines": str(len(changed)), **fields}


def apply(name: str, code: Path) -> None:
    """Copy the repository's code to `code`, a new folder, and apply the experiment there. Raises UserError."""
    for folder in CODE:
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, code)
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(code.resolve().parent)}  # git skips what a repository ignores
    git = ["git", "apply", str(HERE / f"{name}.diff")]
    done = subprocess.run(git, cwd=code, env=alone, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise UserError(f"{name}.diff does not fit the code, which has changed since: {reason}; undo your edits")


def train(code: Path, command: str, folders: Sequence[Path], seeds: Sequence[int], evaluate: bool = True) -> None:
    """Run the command with each seed, into its folder, and evaluate it, by the code in `code`. Raises UserError."""
    script, *flags = shlex.split(command)
    calls = []
    for seed, folder in zip(seeds, folders):
        calls.append([str(code / script), *flags, "--seed", str(seed), "--output-dir", str(folder)])
        calls += [[str(code / "evaluate.py"), str(folder)]] if evaluate else []
    if status := subprocess.run([sys.executable, "-c", PROGRAM, str(code), *map(json.dumps, calls)]).returncode:
        sys.exit(status)


def values(code: Path, command: str, measure: str, folder: Path, seeds: Sequence[int]) -> list[float]:
    """The measure of a run with each seed: of evaluate.py or, if it is a metric of the training, of the last epoch."""
    folders = [folder.with_name(f"{folder.name}-{seed}") for seed in seeds]
    train(code, command, folders, seeds, evaluate=not measure.startswith("val_"))
    if measure.startswith("val_"):
        rows = [list(csv.DictReader((each / "metrics.csv").open()))[-1] for each in folders]
    else:
        rows = [json.loads((each / "evaluation" / "metrics.json").read_text()) for each in folders]
    return [float(row[measure]) for row in rows]


def measure(name: str, folder: Path, seeds: Sequence[int]) -> None:
    """Put an experiment's row into results.json. Rows with the same baseline share its values."""
    about, rows = read(name), json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    key = about["measure"]
    baseline = about.get("baseline", about["command"])
    code, baseline = (folder / "code", about["control"]) if "control" in about else (ROOT, baseline)
    asked = {"baseline": f"{name}: {baseline}" if code != ROOT else baseline, "measure": key, "seeds": list(seeds)}
    known = [row["without"] for row in rows.values() if all(row[field] == asked[field] for field in asked)]
    without = known[0] if known else values(code, baseline, key, folder / "baseline", seeds)
    edited = values(folder / "code", about["command"], key, folder / "seed", seeds)
    kept = {field: environment()[field] for field in ("torch", "python", "processor", "cores", "threads")}
    rows[name] = {**asked, "without": without, "with": edited, **kept}
    RESULTS.write_text(json.dumps({each: rows[each] for each in sorted(rows)}, indent=2) + "\n", "utf-8")
    print(f"{name}: {key} {without} without, {edited} with the edit")


def main() -> None:
    parser = argparse.ArgumentParser("run.py", description=str(__doc__), formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="experiments, by default list them")
    parser.add_argument("--seeds", type=int, nargs="+", help="random seeds (default: 0, with --measure 0 1 2)")
    parser.add_argument("--measure", action="store_true", help="compare with the baseline, and write results.json")
    args, flags = parser.parse_known_args()
    for name in names() if not args.names else []:
        print(f"{name:24}{read(name)['what']}")
    for name in args.names:
        about, folder = read(name), new_folder(None, name)
        apply(name, folder / "code")
        if args.measure:
            measure(name, folder, args.seeds or (0, 1, 2))
        else:
            seeds = args.seeds or [0]
            command = shlex.join([*shlex.split(about["command"]), *flags])
            train(folder / "code", command, [folder / f"seed-{seed}" for seed in seeds], seeds)


if __name__ == "__main__":
    run_script(main)
