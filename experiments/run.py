"""Apply an experiment, a diff in this folder, to a copy of the repository, and train and evaluate there.

python experiments/run.py                        # list the experiments
python experiments/run.py mixup                  # runs/mixup/code is the edited copy, runs/mixup/seed-0 the run
python experiments/run.py mixup --epochs 5       # with flags of the training script
python experiments/run.py mixup sam --measure    # three seeds with and without the edit, into results.json

A diff begins with a line that says what it is, and lines `Name: value`. Command: the script and its flags. Measure: of
evaluation/metrics.json or, as val_..., of metrics.csv. Baseline: what it is compared with, by default Command; it runs
on the unedited code. Control: the same on the edited code. Step: whether it can be captured.
"""

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
from signal import SIGINT
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results.json"
sys.path.insert(0, str(ROOT))

from engine.errors import UserError, run_script
from engine.flags import ArgumentParser
from engine.folder import new_folder
from engine.provenance import environment

CODE = ("datasets", "engine", "measures", "models", "photos", "weights")
PROGRAM = """import json, runpy, sys
sys.path[0], *commands = sys.argv[1:]
for command in commands:
    sys.argv = json.loads(command)
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def start(code: Path, *commands: Sequence[object], **how: Any) -> subprocess.Popen:
    """Run scripts of the folder `code`, each given with its flags, in one process. how: for Popen."""
    words = [json.dumps([str(code / script), *map(str, flags)]) for script, *flags in commands]
    # Without the ceiling, git would find the repository above, and a run of an edited copy would claim its commit.
    how["env"] = {**how.get("env", os.environ), "GIT_CEILING_DIRECTORIES": str(code.resolve().parent)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(code), *words], **how)


def wait(processes: list[subprocess.Popen]) -> None:
    """Wait until all processes end. Raises UserError if one fails."""
    try:
        if any([process.wait() for process in processes]):
            raise UserError("a script stopped; fix the error that it printed, then run the same command again")
    except KeyboardInterrupt as stopped:
        for process in processes:
            if stopped.args != (SIGINT,):  # which a terminal sends to all; a training saves first
                process.terminate()
            process.wait()
        raise


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.diff"))


def read(name: str) -> dict[str, str]:
    """The header of an experiment; `what` is its first line, `lines` how many lines the diff adds and removes."""
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
        raise UserError(f"{name}.diff does not apply to your code ({' '.join(done.stderr.split())}); undo your edits")


def train(code: Path, command: str, folder: Path, seeds: Sequence[int], flags: Sequence[str] = ()) -> list[Path]:
    """Train `command` of the scripts in `code` with each seed, and evaluate it; returns the runs, FOLDER-SEED."""
    script, *own = [*shlex.split(command), *flags]
    runs, calls = [folder.with_name(f"{folder.name}-{seed}") for seed in seeds], []
    for seed, run in zip(seeds, runs):
        calls += [[script, *own, "--seed", seed, "--output-dir", run], ["evaluate.py", run]]
    wait([start(code, *calls)])
    return runs


def values(code: Path, command: str, measure: str, folder: Path, seeds: Sequence[int]) -> list[float]:
    """The measure after training with each seed."""
    found = []
    for run in train(code, command, folder, seeds):
        last = list(csv.DictReader((run / "metrics.csv").open()))[-1]
        metrics = {**last, **json.loads((run / "evaluation" / "metrics.json").read_text())}
        found.append(round(float(metrics[measure]), 6))
    return found


def measure(name: str, folder: Path, seeds: Sequence[int], baselines: dict[str, list[float]]) -> None:
    """Put an experiment's row into results.json. baselines: the values of those that this call has trained."""
    about, rows = read(name), json.loads(RESULTS.read_text())
    code, command, key = folder / "code", about["command"], about["measure"]
    baseline, tree = about.get("baseline", command), ROOT
    if "control" in about:
        baseline, tree = about["control"], code
    shared = {"measure": key, "seeds": seeds, "baseline": f"{name}: {baseline}" if tree == code else baseline}
    if (trained := json.dumps(shared)) not in baselines:
        baselines[trained] = values(tree, baseline, key, folder / "baseline", seeds)
    without = baselines[trained]
    edited = values(code, command, key, folder / "seed", seeds)
    machine = {field: environment()[field] for field in ("processor", "threads", "torch", "python")}
    rows[name] = {"command": command, **shared, "without": without, "edited": edited, **machine}
    lines = [f"{json.dumps(each)}: {json.dumps(rows[each])}" for each in sorted(rows)]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"{name}: {key} {without} without the edit, {edited} with it")


def main() -> None:
    parser = ArgumentParser("run.py", __doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="experiments; without one, list them")
    parser.add_argument("--measure", action="store_true", help="compare with the baseline, and write results.json")
    args, flags = parser.parse_known_args()
    if flags and args.measure:
        parser.error("--measure takes no flags of the training script")
    if own := {"--seed", "--output-dir"} & {flag.partition("=")[0] for flag in flags}:
        parser.error(f"an experiment has its own {own.pop()}; omit it")
    if unknown := [name for name in args.names if name not in names()]:
        parser.error(f"there is no experiment {unknown[0]}; choose from {', '.join(names())}")
    for name in [] if args.names else names():
        print(f"{name:24}{read(name)['what']}")
    baselines: dict[str, list[float]] = {}
    for name in args.names:
        command, folder = read(name)["command"], new_folder(None, name)
        apply(name, folder / "code")
        if args.measure:
            measure(name, folder, [0, 1, 2], baselines)
        else:
            train(folder / "code", command, folder / "seed", [0], flags)


if __name__ == "__main__":
    run_script(main)
