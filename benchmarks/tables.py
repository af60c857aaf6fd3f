"""The tables and the speed charts of README.md and docs/, made from the measured results and the code.

python benchmarks/tables.py
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

# Slide -> where it is in the code: file, and the beginning of a line.
SLIDES = [
    ("How does it work? Forward pass, loss, backward pass", "train_classifier.py", "def train_step("),
    ("How does it work? Iteration", "utils.py", "def train("),
    ("Forward pass", "models/mlp.py", "x = self.activation(self.bn1(self.linear1(x)))"),
    ("Backward pass (∂L/∂W)", "train_classifier.py", "loss.backward()"),
    ("Update (W = W - rate · ∂L/∂W)", "train_classifier.py", "optimizer.step()"),
    ("Cross-entropy loss", "train_classifier.py", '"cross-entropy":'),
    ("Convolution", "models/cnn.py", "self.conv1 = nn.Conv2d("),
    ("Convolutional neural network (CONV, BN, ReLU)", "models/cnn.py", "x = self.activation(self.bn1(self.conv1(x)))"),
    ("MNIST database", "datasets/mnist.py", "def load_mnist("),
    ("Code snippet: MLP", "models/mlp.py", "class MLP("),
    ("Code snippet: CNN", "models/cnn.py", "class CNN("),
    ("How does GAN work? Generator", "train_gan.py", "fakes = generator("),
    ("How does GAN work? Update D", "train_gan.py", "# (1) update D"),
    ("How does GAN work? Update G", "train_gan.py", "# (2) update G"),
    ("Code snippet: Generator", "models/gan.py", "class Generator("),
    ("Code snippet: Discriminator", "models/gan.py", "class Discriminator("),
    ("Code snippet: Maxout", "models/maxout.py", "class Maxout("),
    ("What is cGAN?", "train_cgan.py", "fakes = generator("),
    ("Various generative models: HMM, RBM, VAE, RNN", "train_likelihood.py", "loss = model.loss(images)"),
    ("CPU vs. GPU", "engine/device.py", "def pick_device("),
    ("Activation functions", "models/__init__.py", "ACTIVATIONS"),
    ("Loss functions", "train_classifier.py", "LOSSES = {"),
    ("Convolution arithmetic (o = i - k + 2p + 1, stride)", "models/cnn.py", "def conv_output_size("),
]

# The slide "Various generative models": each family's row of results.json; they train for ten minutes of one core.
FAMILIES = ["hmm-ten-minutes", "rbm-lecture", "vae-lecture", "rnn-ten-minutes", "gan-ten-minutes"]
BEST_FAMILIES = ["hmm-best", "rbm-best", "vae-best", "rnn-best", "gan-best-large"]  # without a limit of time

# The rows of results.json that the README shows, and what each one is.
BEST = {
    "cnn-lecture": "test accuracy of the lecture's CNN after one epoch",
    "resnet-best": "test accuracy of a small residual network",
    "gan-best-large": "Parzen log-likelihood of a GAN of the original paper's size, with a newer recipe",
}

MEASURES = {"Parzen": ("parzen_log_likelihood", 1), "FID": ("fid", 4), "coverage": ("coverage", 3)}  # name, digits
LOOPS = {  # of benchmarks/speed.py, and what the chart calls them
    "baseline, 4 workers": "baseline with 4 workers",
    "ours, eager": "this loop, without a CUDA graph",
    "ours": "this loop",
    "ours, compiled": "this loop with --compile",
    "JAX": "JAX",
}
WHITE = dict(fc="white", ec="none", pad=0.5)  # behind a number, which a mark may cross
Row = dict[str, Any]


def read(name: str) -> Row:
    """What a file of benchmarks/results/ holds."""
    return json.loads((MEASURED / name).read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, with spaces that do not break within a value."""
    rows = [[cell.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%") for cell in row] for row in rows]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def mean_sd(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def mean_or_range(values: list[float], digits: int) -> str:
    """Mean ± standard deviation or, if that is more than half of the mean, the lowest and the highest value."""
    if len(values) > 1 and statistics.stdev(values) > abs(statistics.mean(values)) / 2:
        return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))
    return mean_sd(values, digits)


def measures(seeds: list[Row]) -> list[str]:
    return [mean_or_range([seed[key] for seed in seeds], digits) for key, digits in MEASURES.values()]


def accuracy(row: Row) -> str:
    spread = f" ± {100 * row['test_accuracy_sd']:.2f}" if len(row["test_errors"]) > 1 else ""
    return f"{100 * row['test_accuracy_mean']:.2f}{spread} %"


def conditional_accuracy(seeds: list[Row]) -> str:
    """How often the reference classifier reads the digit that was asked for; empty without labels."""
    if "conditional_accuracy" not in seeds[0]:
        return ""
    return f"{mean_or_range([100 * seed['conditional_accuracy'] for seed in seeds], 2)} %"


def minutes(name: str, row: Row) -> str:
    """Of training, by the seconds of three epochs; empty for a row that continues another."""
    epochs, seconds = statistics.mean(row["epochs_trained"]), read("minutes.json")["seconds"].get(name)
    return mean_sd([epochs * each / 60 for each in seconds], 1 if epochs > 1 else 3) if seconds else ""


def nats(seeds: list[Row]) -> str:
    """Minus the log-likelihood; that of an RBM also by the reverse estimate of log Z. Empty for a GAN."""
    if "kind" not in seeds[0]:
        return ""
    text = mean_sd([-seed["log_likelihood"] for seed in seeds], 2)
    if "log_likelihood_reverse" in seeds[0]:
        text += f" (reverse {mean_sd([-seed['log_likelihood_reverse'] for seed in seeds], 2)})"
    return text


def real_images(rows: Iterable[Row]) -> Row:
    """The measures of real images, which each row's seeds hold; those per class come from the conditional ones."""
    return {key: value for row in rows if "seeds" in row for key, value in row["seeds"][0]["real"].items()}


# Results --------------------------------------------------------------------------------------------------------------


def results_table() -> str:
    lines = []
    for name, row in read("results.json").items():
        if "test_errors" in row:
            epochs = " to ".join(map(str, sorted({min(row["epochs_trained"]), max(row["epochs_trained"])})))
            lines.append([name, epochs, accuracy(row), minutes(name, row), row["published"]])
    return table(["name", "epochs", "test accuracy", "minutes", "reference"], lines)


def generators_table() -> str:
    """Each generator trained against a discriminator, and real images."""
    rows = {name: row for name, row in read("results.json").items() if "seeds" in row and "kind" not in row["seeds"][0]}
    lines = []
    for name, row in rows.items():
        cells = [*measures(row["seeds"]), conditional_accuracy(row["seeds"]), minutes(name, row)]
        lines.append([name, *cells, row["published"].removeprefix("Parzen ")])
    real = [real_images(rows.values())]
    lines.append(["real training images", *measures(real), conditional_accuracy(real), "", ""])
    return table(["name", *MEASURES, "conditional accuracy", "minutes", "reference (Parzen)"], lines)


def likelihood_table(names: Sequence[str] = ()) -> str:
    """The rows of these names; without names, of all models with a likelihood."""
    rows, lines = read("results.json"), []
    for name in names or [name for name, row in rows.items() if nats(row.get("seeds", [{}]))]:
        seeds, row = rows[name]["seeds"], rows[name]
        lines.append([name, nats(seeds), *measures(seeds), minutes(name, row), row["published"]])
    return table(["name", "nats per image", *MEASURES, "minutes", "reference"], lines)


def families_table() -> str:
    """The slide's five families with their samples, and real images."""
    results, lines = read("results.json"), []
    for name in FAMILIES:
        seeds, samples = results[name]["seeds"], f"![Samples of {name}](../assets/{name}.png)"
        seconds = statistics.median(seed["sampling_seconds"] for seed in seeds)
        cells = [nats(seeds), *measures(seeds)[1:], f"{seconds:.1f}"]
        lines.append([name[:3].upper(), samples, seeds[0].get("kind", "none"), *cells])
    real = measures([real_images(results.values())])[1:]
    name, samples = "real images (shown: test, measured: training)", "![Test images](../assets/real.png)"
    lines.append([name, samples, "", "", *real, ""])
    return table(["", "samples", "likelihood", "nats per image", "FID", "coverage", "seconds for 10,000"], lines)


def best_list() -> str:
    """Three results, as a list."""
    rows, lines = read("results.json"), []
    for name, what in BEST.items():
        row = rows[name]
        measured = accuracy(row) if "test_errors" in row else f"{measures(row['seeds'])[0]} nats"
        lines.append(f"- **{measured}** {what}. Reference: {row['published'].removeprefix('Parzen ')}.")
    return "\n".join(lines)


# Speed ----------------------------------------------------------------------------------------------------------------


def speed_chart(device: str) -> str:
    """The chart of speed-DEVICE.json, where it was measured, and the compiled step beside JAX's."""
    speed, beside_jax = read(f"speed-{device}.json"), []
    for name, row in speed["rows"].items():
        compiled = row["loops"]["ours, compiled"]
        if "JAX" in row["loops"]:
            ratio = "{0:.2f} ({2:.2f} to {1:.2f})".format(*[1 / times for times in compiled["times_as_fast_as"]["JAX"]])
            beside_jax.append([name, f"{compiled['ms']:.2f} ms", ratio])
    header = ["", "a compiled step", "its time / JAX's: median (range)"]
    return (
        f"![Times as fast as the baseline: each loop for each network, median and range](../benchmarks/results/speed-"
        f"{device}.png)\n\n{speed['gpu'] or speed['processor']}, {speed['cores']} cores, torch {speed['torch']}, "
        f"commit {speed['commit'][:7]}; {speed['turns']} turns with {speed['steps']} steps of each loop."
        + (f"\n\n{table(header, beside_jax)}" if beside_jax else "")
    )


def plot_speed(device: str) -> None:
    """How many times as fast as the baseline each loop is, and the machine's limit."""
    from matplotlib.figure import Figure

    rows = read(f"speed-{device}.json")["rows"]
    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.5), layout="constrained")
    axis = figure.add_subplot()
    names = [name for name in LOOPS if name in next(iter(rows.values()))["loops"]]
    for i, name in enumerate(names):
        speedups = [row["loops"][name]["times_as_fast_as"]["baseline"] for row in rows.values()]
        plot_loop(axis, LOOPS[name], speedups, 0.7 * ((i + 0.5) / len(names) - 0.5))
    baseline = [row["loops"]["baseline"]["ms"] for row in rows.values()]
    limits = [ms / row["limit_ms"] for ms, row in zip(baseline, rows.values())]
    axis.plot(limits, range(len(rows)), "k|", ms=18, label="the machine's limit")
    axis.axvline(1, color="grey", lw=1, label="the baseline, with its milliseconds a step on the left")
    axis.set(xscale="log", xlabel="times as fast as the baseline: median and range of the turns")
    axis.set(yticks=range(len(rows)), yticklabels=[f"{case}\n{ms:.1f} ms" for case, ms in zip(rows, baseline)])
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, markerscale=0.6)
    figure.savefig(MEASURED / f"speed-{device}.png", dpi=120)


def plot_loop(axis: Any, label: str, speedups: list[list[float]], offset: float) -> None:
    """A point and a range for each row. speedups: median, lowest and highest."""
    medians, lows, highs = (list(column) for column in zip(*speedups))
    places = [place + offset for place in range(len(medians))]
    reach = [[a - b for a, b in zip(*pair)] for pair in ((medians, lows), (highs, medians))]
    axis.errorbar(medians, places, xerr=reach, fmt="o", ms=5, label=label)
    for median, high, place in zip(medians, highs, places):
        number = f"{float(f'{median:.2g}'):g}"  # two digits
        axis.annotate(number, (high, place), (4, 0), textcoords="offset points", va="center", size=7, bbox=WHITE)


# Experiments ----------------------------------------------------------------------------------------------------------

FORMS = {  # measure -> its name, factor and digits
    "test_accuracy": ("accuracy, %", 100, 1),
    "val_attacked": ("accuracy under attack, %", 100, 1),
    "fid": ("FID", 1, 3),
    "val_log_likelihood": ("log-likelihood, nats", 1, 1),
}


def experiments_table() -> str:
    """Each diff of experiments/, by script, with its measure without and with the edit."""
    from experiments import run as experiments  # imports torch

    measured, lines = json.loads(experiments.RESULTS.read_text()), []
    abouts = {name: experiments.read(name) for name in experiments.names()}
    for name, about in sorted(abouts.items(), key=lambda item: (item[1]["command"].split()[0], item[0])):
        (measure, scale, digits), row = FORMS[about["measure"]], measured.get(name, {})
        seeds = [[scale * value for value in row.get(key, [])] for key in ("without", "edited")]
        values = [mean_sd(own, digits) if own else "" for own in seeds]
        link = f"[{name}](../experiments/{name}.diff)"
        lines.append([link, about["what"].rstrip("."), about["lines"], measure, *values, about["step"].split()[0]])
    row = next(iter(measured.values()))
    text = table(["experiment", "what", "lines", "measure", "without", "with", "step"], lines)
    return f"{text}\n\n{row['processor']}, {row['threads']} thread, torch {row['torch']}, Python {row['python']}."


# Photos ---------------------------------------------------------------------------------------------------------

FEW = 10  # kinds of fewer real pictures share a row


def photo_table(part: str) -> str:
    """benchmarks/photo.py: of each condition or kind of picture, how many were read right, and by Otsu."""
    rows: dict[str, Row] = {}
    for name, row in read("photo.json")[part]["rows"].items():
        name = name if sum(row.values()) - row["otsu"] >= FEW else f"kinds of fewer than {FEW}"
        rows[name] = {key: count + rows.get(name, {}).get(key, 0) for key, count in row.items()}
    lines = []
    for name, row in rows.items():
        total = sum(row.values()) - row["otsu"]
        shown = [interval(row["right"], total), *(str(row[key]) for key in ("wrong", "refused", "unsure"))]
        lines.append([name, str(total), *shown, f"{100 * row['otsu'] / total:.1f} %"])
    return table(["", "pictures", "correct", "wrong", "rejected", "unsure", "Otsu correct"], lines)


def interval(successes: int, trials: int) -> str:
    """A percentage with its Wilson interval at 95 %."""
    from scipy.stats import binomtest

    low, high = binomtest(successes, trials).proportion_ci(method="wilson")
    return f"{100 * successes / trials:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


# Pages ----------------------------------------------------------------------------------------------------------------


def slides_table() -> str:
    """Each slide with a link to its line. Raises StopIteration if the code no longer has such a line."""
    lines = []
    for slide, file, start in SLIDES:
        text = (ROOT / file).read_text("utf-8").splitlines()
        number, line = next((i, line.strip()) for i, line in enumerate(text, 1) if line.strip().startswith(start))
        code = line.split("  #")[0].replace("|", r"\|")
        lines.append([slide, f"[{file}:{number}](../{file}#L{number})", f"`{code}`"])
    return table(["slide", "code", ""], lines)


# page -> section, between `<!-- NAME -->` and `<!-- /NAME -->` -> what makes it
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"best": best_list},
    ROOT / "docs" / "how.md": {"slides": slides_table},
    ROOT / "docs" / "results.md": {
        "results": results_table,
        "generators": generators_table,
        "likelihood": likelihood_table,
        "families": families_table,
        "best families": partial(likelihood_table, BEST_FAMILIES),
        "rendered": partial(photo_table, "rendered"),
        "real": partial(photo_table, "real"),
    },
    ROOT / "docs" / "speed.md": {"speed": partial(speed_chart, "cpu")},
    ROOT / "docs" / "gpus.md": {"speed": partial(speed_chart, "cuda")},
    ROOT / "docs" / "extending.md": {"experiments": experiments_table},
}


def fill(page: Path) -> str:
    """The text of a page with each of its sections up to date."""
    text = page.read_text("utf-8")
    for name, make in PAGES[page].items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        assert found, f"{page} has no section {name}"
        text = f"{before}{start}{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page), "utf-8", newline="\n")
    for device in ("cpu", "cuda"):
        plot_speed(device)
