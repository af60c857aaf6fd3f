"""Plot several runs in one figure, over epochs and over seconds, and print what they reached.

python benchmarks/compare.py runs/mlp-mnist runs/cnn-mnist
python benchmarks/compare.py "runs/tanh-*" "runs/relu-*" --output activations.png

Runs that differ only in their seed are one setting: a line for the mean, a band from the lowest to the highest seed,
and mean ± standard deviation.
"""

import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: F401, I001 (before NumPy, so that Ctrl-C during its import prints one line)
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import tables
from engine import flags, plots
from engine.checkpoint import has_checkpoint, load_checkpoint, load_result
from engine.errors import UserError, command, run_script
from engine.folder import make_folder, read_config
from engine.table import Table

# Options that make no other setting.
SAME = ("seed", "classes", "data_dir", "log_interval", "save_interval", "first_stage", "goal", "threads", "products")
LOSS_OPTIONS = ("loss", "label_smoothing", "importance_samples")  # which say what the loss is
MEASURES = ("test_accuracy", "log_likelihood", "parzen_log_likelihood", "fid", "coverage", "conditional_accuracy")
Setting = list[SimpleNamespace]  # runs that differ only in their seed


def read_run(folder: Path) -> SimpleNamespace:
    """A run: its options, tables, seconds at the end of each epoch, and `values`, the last of each metric and measure.

    Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    checkpoint = load_checkpoint(folder)
    history, curve = (Table(checkpoint[name]) for name in ("history", "curve"))
    if not history:
        raise UserError(f"{folder} has no finished epoch yet; leave it out, or wait for the first one")
    options = {name: value for name, value in checkpoint["options"].items() if name not in SAME}
    options["device"] = read_config(folder).get("device", "").split(":")[0]  # instead of auto
    setting = json.dumps([options, checkpoint["types"], checkpoint["code"]], sort_keys=True)
    seconds = np.cumsum([0, *map(float, checkpoint["seconds"])])[: len(history) + 1].tolist()
    last = {name: value for row in history for name, value in row.items() if name != "epoch"}
    values = {"epochs": len(history), **last, "seconds": seconds[-1], **read_measures(folder)}
    about = dict(folder=folder, options=options, setting=setting, values=values, seed=checkpoint["options"].get("seed"))
    return SimpleNamespace(**about, history=history, curve=curve, seconds=seconds)


def read_measures(folder: Path) -> dict[str, float]:
    """What evaluate.py measured of the run's present result, with --seed 0; {} if it has not. Raises UserError."""
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text("utf-8"))
        position = read["epochs"], read.get("batch", 0), read.get("noise_seed", 0)
        measures = {name: float(read[name]) for name in MEASURES if name in read}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        remedy = f"write it again: {command('evaluate.py', folder)}"
        raise UserError(f"{path} is not as evaluate.py wrote it; {remedy}") from error
    result = load_result(folder)
    return measures if position == (result["epoch"], result["batch"], 0) else {}


def read_settings(patterns: list[str]) -> list[Setting]:
    """The runs of each setting, one of each seed. Raises UserError."""
    folders = {os.path.realpath(path): Path(path) for each in patterns for path in sorted(glob(each)) or [each]}
    # A folder such as runs/cnn-weights holds only what evaluate.py measured of a file.
    runs = [path for path in folders.values() if has_checkpoint(path) or not (path / "evaluation").is_dir()]
    settings: dict[str, Setting] = {}
    for run in map(read_run, runs or folders.values()):
        seeds = settings.setdefault(run.setting, [])
        if twin := next((other for other in seeds if other.seed == run.seed), None):
            print(f"{run.folder}: left out; it is the same seed of the same setting as {twin.folder}")
        else:
            seeds.append(run)
    return list(settings.values())


def label(runs: Setting) -> str:
    return f"{runs[0].folder}{f' and {len(runs) - 1} more' if len(runs) > 1 else ''}"


def differences(settings: list[Setting]) -> Iterable[str]:
    """For each setting, a line with the options that not all settings share."""
    everything = [runs[0].options for runs in settings]
    for runs, own in zip(settings, everything):
        names = [name for name in own if any(str(other.get(name)) != str(own[name]) for other in everything)]
        if names:
            yield f"{label(runs)}: {' '.join(f'{name}={own[name]}' for name in names)}\n"


def points(run: SimpleNamespace, name: str, last: float) -> tuple[list[float], list[float]]:
    """Epochs up to `last`, and a metric's values there, from the reports within epochs if they have it."""
    table = run.curve if any(name in row for row in run.curve) else run.history
    rows = [row for row in table if name in row and row["epoch"] <= last]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def curves(runs: Setting, name: str) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Epochs, mean seconds and values [runs, points] of a metric, up to the last epoch that all these runs have."""
    last = min(run.history[-1]["epoch"] for run in runs)
    each = [points(run, name, last) for run in runs]
    epochs = min((x for x, _ in each), key=len)
    seconds = [np.interp(epochs, range(len(run.seconds)), run.seconds) for run in runs]
    return epochs, np.mean(seconds, axis=0), np.array([np.interp(epochs, *own) for own in each])


def plot(settings: list[Setting], names: list[str]) -> Figure:
    """A column per metric, over epochs and over seconds."""
    figure = Figure(figsize=(max(8, 5 * len(names)), 8), layout="constrained")
    for axes, name in zip(figure.subplots(2, len(names), squeeze=False).T, names):
        ends = []
        for i, runs in enumerate(settings):
            epochs, seconds, values = curves(runs, name)
            for axis, x in zip(axes, (epochs, seconds)):
                axis.plot(x, values.mean(0), ".-", color=f"C{i % 10}", lw=1, label=title(runs), ms=4)
                axis.fill_between(x, values.min(0), values.max(0), color=f"C{i % 10}", alpha=0.2, lw=0)
            ends += values[:, min(len(epochs) // 4, len(epochs) - 2) :].flatten().tolist()
        margin = 0.05 * (max(ends) - min(ends))
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis, x in zip(axes, ("epoch", "seconds of training")):
            axis.set(xlabel=x, ylabel=name)
            axis.set_xlim(left=0)
            if margin:  # not the first quarter of the training, beside which 92 % and 93 % look alike
                low, high = axis.set_ylim(min(ends) - margin, max(ends) + margin)
                if low > 0 or high < 0:
                    axis.text(0, 0.03, "//", transform=axis.transAxes, ha="center", va="center", rotation=-60)
    key = "line: mean; band: lowest to highest seed; //: the axis does not start at 0"
    figure.legend(*axes[0].get_legend_handles_labels(), title=key, loc="outside upper left")
    return figure


def cell(runs: Setting, name: str) -> str:
    """A metric's or measure's mean, with ± standard deviation of several runs; empty unless all runs have it."""
    values = [run.values[name] for run in runs if name in run.values]
    if len(values) < len(runs):
        return ""
    scale, unit = (100, " %") if name.endswith("accuracy") else (1, " nats" * name.endswith("log_likelihood"))
    digits = 1 if name in ("epochs", "seconds") else 2 if unit or abs(statistics.mean(values)) >= 10 else 4
    return tables.mean_sd([scale * value for value in values], digits) + unit


def title(runs: Setting) -> str:
    """The label of a setting, and what evaluate.py measured, if it has for each run."""
    measured = [f"{name.replace('_', ' ')} {text}" for name in MEASURES if (text := cell(runs, name))]
    return f"{label(runs)}{': ' * bool(measured)}{', '.join(measured)}".replace("$", r"\$")  # else a formula


def print_table(settings: list[Setting]) -> None:
    """A row per setting."""
    names = dict.fromkeys(name for runs in settings for run in runs for name in run.values)
    table = [["", *names], *([label(runs), *(cell(runs, name) for name in names)] for runs in settings)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def get_args_parser() -> flags.ArgumentParser:
    parser = flags.ArgumentParser("compare.py", __doc__)
    what = 'run folders, or patterns such as "runs/mlp-*"'
    parser.add_argument("runs", metavar="RUN", type=flags.run_folder, nargs="+", help=what)
    parser.add_argument("--output", metavar="FILE", type=flags.path, default="compare.png", help="the plot, a PNG")
    return parser


def shared_metrics(runs: list[SimpleNamespace]) -> list[str]:
    """The metrics that all these runs have, and that mean the same in all of them."""
    shared = set.intersection(*({name for row in run.history for name in row} for run in runs))
    if len({run.options.get("kind") == "likelihood" for run in runs}) > 1:
        shared.discard("val_log_likelihood")  # a GAN's is Parzen's
    # Neither an RBM's loss nor that of grey pixels is a likelihood.
    unlike = [(run.options.get("model") == "rbm", run.options.get("binarise") == "none") for run in runs]
    differ = len({str([*own, *map(run.options.get, LOSS_OPTIONS)]) for own, run in zip(unlike, runs)}) > 1
    return [name for name in runs[0].values if name in shared and not (differ and "loss" in name)]


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if Path(args.output).suffix.lower() not in (".png", ""):
        parser.error(f"--output {args.output}: the plot is a PNG; let the name end in .png")
    settings = read_settings(args.runs)
    names = shared_metrics(list(itertools.chain(*settings)))
    if not names:
        raise UserError("these runs have no metric in common; compare runs of one script")
    print_table(settings)
    print(*differences(settings), sep="", end="")
    make_folder(Path(args.output).parent)
    plots.save_figure(plot(settings, names), Path(args.output))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
