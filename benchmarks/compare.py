"""Plot several runs in one figure, over epochs and over seconds, and print what they reached.

python benchmarks/compare.py runs/mlp-mnist runs/cnn-mnist
python benchmarks/compare.py "runs/tanh-*" "runs/relu-*" --output activations.png

Runs that differ only in their seed are one setting: a line for the mean, a band from the lowest to the highest seed,
and mean ± standard deviation.
"""

import collections
import csv
import itertools
import json
import statistics
import sys
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine import flags, plots
from engine.checkpoint import has_checkpoint, load_checkpoint
from engine.errors import UserError, command, run_script, shell
from engine.folder import read_config

# Options that make no other setting.
SAME = ("seed", "classes", "data_dir", "log_interval", "save_interval", "first_stage", "goal")
LOSS_OPTIONS = ("loss", "label_smoothing")  # which say what the loss is
MEASURES = ("test_accuracy", "log_likelihood", "parzen_log_likelihood", "fid", "coverage", "conditional_accuracy")


def get_args_parser() -> flags.ArgumentParser:
    parser = flags.ArgumentParser("compare.py", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help='run folders, or patterns such as "runs/mlp-*"')
    parser.add_argument("--output", metavar="FILE", type=flags.path, default="compare.png", help="the plot")
    return parser


def read_run(folder: Path) -> SimpleNamespace:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    config = read_config(folder)
    if "options" not in config:
        raise UserError(f"{folder} is not a run folder: it has no config.json that can be read")
    history, curve = (read_csv(folder / name, "epoch") for name in ("metrics.csv", "curve.csv"))
    seconds = read_csv(folder / "seconds.csv", "seconds")
    if not history or not seconds:
        raise UserError(f"{folder} has no finished epoch yet; leave it out, or wait for the first one")
    run = SimpleNamespace(folder=folder, seed=config["options"].get("seed"), history=history, curve=curve)
    run.options = {name: value for name, value in config["options"].items() if name not in SAME}
    run.options["device"] = config["device"].split(":")[0]  # instead of auto
    code = load_checkpoint(folder, warn=False)["code"] if has_checkpoint(folder) else {}
    run.setting = json.dumps([run.options, config.get("types"), code], sort_keys=True)
    run.seconds = np.cumsum([0, *(row["seconds"] for row in seconds)]).tolist()  # at the end of each epoch
    run.values = dict(collections.ChainMap(*reversed(history)), seconds=run.seconds[-1])
    run.values.update(read_measures(folder, run.values.pop("epoch")))
    return run


def read_csv(path: Path, *columns: str) -> list[dict[str, float]]:
    """A dict of numbers per row, without the empty cells; [] if there is no such file.

    Raises UserError unless each row has these columns.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            whole = (line for line in file if line.endswith("\n"))  # a run may be writing the last one
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(whole)]
        return [{**{name: row[name] for name in columns}, **row} for row in rows]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        remedy = f"resume the run, which writes it again: {shell('--resume', path.parent)}"
        raise UserError(f"{path} is not as the run wrote it, perhaps saved by a spreadsheet; {remedy}") from error


def read_measures(folder: Path, epoch: float) -> dict[str, float]:
    """What evaluate.py measured; {} if it has not, or if the run's result has changed since. Raises UserError."""
    path, best = folder / "evaluation" / "metrics.json", folder / "best.pt"
    measures = read_metrics(path) if path.is_file() else {"epochs": None}
    result = load_checkpoint(best)["epoch"] if path.is_file() and best.is_file() else epoch
    return {name: measures[name] for name in MEASURES if name in measures and measures["epochs"] == result}


def read_metrics(path: Path) -> dict[str, Any]:
    """What evaluate.py wrote to `path`. Raises UserError."""
    try:
        metrics = json.loads(path.read_text("utf-8"))
        [float(metrics[name]) for name in ("epochs", *(set(MEASURES) & set(metrics)))]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        remedy = command("evaluate.py", path.parent.parent)
        raise UserError(f"{path} is not as evaluate.py wrote it; write it again: {remedy}") from error
    return metrics


def label(runs: list[SimpleNamespace]) -> str:
    """The folder of a setting's runs, without the seed if there are several."""
    if len(runs) == 1:
        return str(runs[0].folder)
    several = "seeds" if len({run.seed for run in runs}) == len(runs) else "runs"
    return f"{str(runs[0].folder).removesuffix(f'-{runs[0].seed}')} ({len(runs)} {several})"


def name_settings(settings: list[list[SimpleNamespace]]) -> tuple[list[str], list[str]]:
    """The label of each setting, and a line with the options that not all settings share."""
    labels, differences, everything = list(map(label, settings)), [], [runs[0].options for runs in settings]
    for text, own in zip(labels, everything):
        names = [name for name in own if any(str(other.get(name)) != str(own[name]) for other in everything)]
        differences.append(f"{text}: {' '.join(f'{name}={own[name]}' for name in names)}\n" if names else "")
    return labels, differences


def points(run: SimpleNamespace, name: str, last: float, fine: bool) -> tuple[list[float], list[float]]:
    """Epochs up to `last`, and a metric's values there; fine: from curve.csv, which has more points than epochs."""
    rows = run.curve if fine and any(name in row for row in run.curve) else run.history
    rows = [row for row in rows if name in row and row["epoch"] <= last]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def curves(runs: list[SimpleNamespace], name: str, fine: bool) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Epochs, mean seconds and values [runs, points] of a metric, up to the last epoch that all these runs have."""
    last = min(run.history[-1]["epoch"] for run in runs)
    each = [points(run, name, last, fine) for run in runs]
    epochs = min((x for x, _ in each), key=len)
    seconds = [np.interp(epochs, range(len(run.seconds)), run.seconds) for run in runs]
    return epochs, np.mean(seconds, axis=0), np.array([np.interp(epochs, *own) for own in each])


def plot(settings: list[list[SimpleNamespace]], labels: list[str], names: list[str], fine: bool) -> Figure:
    """A column per metric, over epochs and over seconds."""
    figure = Figure(figsize=(max(8, 5 * len(names)), 8), layout="constrained")
    for axes, name in zip(figure.subplots(2, len(names), squeeze=False).T, names):
        ends = []
        for i, (runs, label) in enumerate(zip(settings, labels)):
            epochs, seconds, values = curves(runs, name, fine)
            for axis, x in zip(axes, (epochs, seconds)):
                axis.plot(x, values.mean(0), ".-", color=f"C{i % 10}", lw=1, label=label, ms=4)
                axis.fill_between(x, values.min(0), values.max(0), color=f"C{i % 10}", alpha=0.2, lw=0)
            ends += values[:, min(len(epochs) // 4, len(epochs) - 2) :].flatten().tolist()
        margin = 0.05 * (max(ends) - min(ends))
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis, x in zip(axes, ("epoch", "seconds of training")):
            axis.set(xlabel=x, ylabel=name)
            axis.set_xlim(left=0)
            if margin:  # not the first quarter of the training, beside which 92 % and 93 % look alike
                axis.set_ylim(min(ends) - margin, max(ends) + margin)
                axis.text(0, 0.03, "//", transform=axis.transAxes, ha="center", va="center", rotation=-60)
    key = "line: mean; band: lowest to highest seed; //: the axis does not start at 0"
    figure.legend(*axes[0].get_legend_handles_labels(), title=key, loc="outside upper left")
    return figure


def mean_sd(name: str, values: list[float]) -> str:
    """The mean of a metric's values as text, with ± standard deviation if there are several."""
    scale, unit = (100, " %") if name.endswith("accuracy") else (1, " nats" * name.endswith("log_likelihood"))
    mean = scale * statistics.mean(values)
    digits = 1 if name == "seconds" else 2 if unit or abs(mean) >= 10 else 4
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}{unit}"


def cells(runs: list[SimpleNamespace], names: Iterable[str]) -> list[str]:
    """The range of the epochs, and each metric's mean_sd; empty unless every seed has it."""
    epochs = sorted({len(run.history) for run in runs})
    own = [" to ".join(map(str, epochs[:1] + epochs[1:][-1:]))]
    for name in names:
        values = [run.values[name] for run in runs if name in run.values]
        own.append(mean_sd(name, values) if len(values) == len(runs) else "")
    return own


def title(runs: list[SimpleNamespace], label: str) -> str:
    """The label of a setting, and what evaluate.py measured, if it has for each seed."""
    measured = [f"{name.replace('_', ' ')} {cell}" for name, cell in zip(MEASURES, cells(runs, MEASURES)[1:]) if cell]
    return f"{label}: {', '.join(measured)}" if measured else label


def print_table(settings: list[list[SimpleNamespace]], labels: list[str]) -> None:
    """A row per setting: seconds of training, last metrics, measures."""
    names = dict.fromkeys(name for runs in settings for run in runs for name in run.values)
    table = [["", "epochs", *names], *([label, *cells(runs, names)] for runs, label in zip(settings, labels))]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def read_settings(patterns: list[str]) -> list[list[SimpleNamespace]]:
    """The runs of each setting. Raises UserError."""
    paths = [path for each in patterns for path in ([each] if Path(each).exists() else sorted(glob(each)) or [each])]
    settings: dict[str, list[SimpleNamespace]] = {}
    for folder in {Path(path).resolve(): Path(path) for path in paths}.values():
        run = read_run(folder)
        settings.setdefault(run.setting, []).append(run)
    return list(settings.values())


def shared_metrics(runs: list[SimpleNamespace], epoch: int) -> list[str]:
    """The metrics that all these runs have after `epoch`; no loss, if they minimise different ones."""
    shared = set.intersection(*(set(run.history[epoch - 1]) for run in runs))
    differ = len({str([run.options.get(name) for name in LOSS_OPTIONS]) for run in runs}) > 1
    return [name for name in runs[0].values if name in shared and not (differ and "loss" in name)]


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    settings = read_settings(args.runs)
    runs = list(itertools.chain(*settings))
    shortest = min(len(run.history) for run in runs)
    names = shared_metrics(runs, shortest)
    if not names:
        raise UserError("these runs have no metric in common; compare runs of one script")
    labels, differences = name_settings(settings)
    titles = list(map(title, settings, labels))
    print_table(settings, labels)
    print(*differences, sep="", end="")
    if missing := [str(run.folder) for run in runs if not run.values.keys() & MEASURES]:
        print(f"without a test result, which evaluate.py adds: {' '.join(missing)}")
    plots.save_figure(plot(settings, titles, names, fine=shortest < 5), Path(args.output))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
