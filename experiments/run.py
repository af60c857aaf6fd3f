"""Apply an experiment, a diff in this folder, to a copy of the repository, and train and evaluate there.

python experiments/run.py                        # list the experiments
python experiments/run.py mixup                  # runs/mixup/code is the edited copy, runs/mixup/seed-0 the run
python experiments/run.py mixup --epochs 5       # with flags of the training script
python experiments/run.py mixup sam --measure    # three seeds with and without the edit, into results.json

A diff begins with a line that says what it is, and lines `Name: value`. Command: the script and its flags. Measure: of
evaluation/metrics.json or, as val_..., of metrics.csv. Baseline: what it is compared with, by default Command; it runs
on the unedited code. Control: the same on the edited code. Step: whether it can be captured.
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
# Several scripts in one process, which imports torch once. Arguments: the code's folder, and scripts with their flags.
PROGRAM = """import json, runpy, sys
sys.path[0], *commands = sys.argv[1:]
for command in commands:
    sys.argv = json.loads(command)
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.diff"))


def read(name: str) -> dict[str, str]:
    """The header of an experiment; `what` is its first line, `lines` how many lines the diff adds and removes."""
    if name not in names():
        raise UserError(f"there is no experiment {name}; choose from {', '.join(names())}")
    head, *files = re.split(r"^(?=--- )", (HERE / f"{name}.diff").read_text("utf-8"), flags=re.MULTILINE)
    changed = re.findall(r"^[+-](?!-- |\+\+ )", "".join(files), flags=re.MULTILINE)
    fields = {key.lower(): value for key, value in re.findall(r"^(\w+): (.*)", head, flags=re.MULTILINE)}
    return {"what": head.splitlines()[0], "lines": str(len(changed)), **fields}


def apply(name: str, code: Path) -> None:
    """Copy the repository's code to `code`, a new folder, and apply the experiment there. Raises UserError."""
    for folder in CODE:
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, code)
    # Without the ceiling, git would find the repository above, and skip files that it ignores.
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(code.resolve().parent)}
    git = ["git", "apply", str(HERE / f"{name}.diff")]
    done = subprocess.run(git, cwd=code, env=alone, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}.diff does not fit your code ({' '.join(done.stderr.split())}); undo your edits")


def train(code: Path, command: str, folders: Sequence[Path], seeds: Sequence[int], evaluate: bool = True) -> None:
    """Run `command` of the scripts in `code` with each seed, and evaluate each run. Exits if a script fails."""
    (script, *flags), calls = shlex.split(command), []
    for seed, folder in zip(seeds, folders):
        calls.append([str(code / script), *flags, "--seed", str(seed), "--output-dir", str(folder)])
        calls += [[str(code / "evaluate.py"), str(folder)]] if evaluate else []
    if status := subprocess.run([sys.executable, "-c", PROGRAM, str(code), *map(json.dumps, calls)]).returncode:
        sys.exit(status)


def values(code: Path, command: str, measure: str, folder: Path, seeds: Sequence[int]) -> list[float]:
    """The measure after training with each seed."""
    folders = [folder.with_name(f"{folder.name}-{seed}") for seed in seeds]
    of_training = measure.startswith("val_")
    train(code, command, folders, seeds, evaluate=not of_training)
    if of_training:
        rows = [list(csv.DictReader((each / "metrics.csv").open()))[-1] for each in folders]
    else:
        rows = [json.loads((each / "evaluation" / "metrics.json").read_text()) for each in folders]
    return [round(float(row[measure]), 6) for row in rows]


def measure(name: str, folder: Path, seeds: Sequence[int]) -> None:
    """Put an experiment's row into results.json. Rows with the same baseline share its values."""
    about, rows = read(name), json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    code, command, key = folder / "code", about["command"], about["measure"]
    baseline, tree = about.get("baseline", command), ROOT
    if "control" in about:
        baseline, tree = about["control"], code
    shared = {"measure": key, "seeds": seeds, "baseline": f"{name}: {baseline}" if tree == code else baseline}
    same = [row["without"] for row in rows.values() if all(row[field] == shared[field] for field in shared)]
    without = same[0] if same else values(tree, baseline, key, folder / "baseline", seeds)
    edited = values(code, command, key, folder / "seed", seeds)
    machine = {field: environment()[field] for field in ("processor", "threads", "torch", "python")}
    rows[name] = {"command": command, **shared, "without": without, "edited": edited, **machine}
    lines = [f"{json.dumps(each)}: {json.dumps(rows[each])}" for each in sorted(rows)]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"{name}: {key} {without} without the edit, {edited} with it")


def main() -> None:
    parser = argparse.ArgumentParser("run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="experiments; without one, list them")
    parser.add_argument("--seeds", type=int, nargs="+", help="random seeds (default: 0, with --measure 0 1 2)")
    parser.add_argument("--measure", action="store_true", help="compare with the baseline, and write results.json")
    args, flags = parser.parse_known_args()
    for name in [] if args.names else names():
        print(f"{name:24}{read(name)['what']}")
    for name in args.names:
        command, folder = read(name)["command"], new_folder(None, name)
        apply(name, folder / "code")
        seeds = args.seeds or ([0, 1, 2] if args.measure else [0])
        if args.measure:
            measure(name, folder, seeds)
        else:
            runs = [folder / f"seed-{seed}" for seed in seeds]
            train(folder / "code", shlex.join([*shlex.split(command), *flags]), runs, seeds)


if __name__ == "__main__":
    run_script(main)
