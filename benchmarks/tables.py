"""The tables of README.md and docs/, made from the measured results and the code: no value in them is typed by hand.

python benchmarks/tables.py
"""

import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

# Slide -> where it is in the code: file, and the beginning of a line.
SLIDES = [
    ("How does it work? Forward path, loss, backward path", "train_classifier.py", "def train_step("),
    ("How does it work? Iteration", "utils.py", "def train("),
    ("Forward path", "models/mlp.py", "x = self.activation(self.bn1(self.linear1(x)))"),
    ("Backward path (∂L/∂W)", "train_classifier.py", "loss.backward()"),
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

# The slide "Various generative models": each family's row of results.json, and what it can do.
FAMILIES = {
    "": ("name", "maximises", "likelihood", "inpaints", "takes a label"),
    "HMM": ("hmm-lecture", "log p(x)", "exact", "no", "no"),
    "RBM": ("rbm-lecture", "log p(x), by contrastive divergence", "estimate", "by Gibbs sampling", "no"),
    "VAE": ("vae-lecture", "a lower bound on log p(x)", "lower bound", "no", "no"),
    "RNN": ("rnn-lecture", "log p(x)", "exact", "row by row", "no"),
    "GAN": ("gan-best", "D's error", "no", "no", "as a conditional GAN"),
}

# The rows of results.json that the README shows, and what each one is.
BEST = {
    "mlp-lecture": "the lecture's MLP, one epoch",
    "cnn-lecture": "the lecture's CNN, one epoch",
    "mlp-best": "the same MLP, recipe `best`",
    "cnn-best-60-epochs": "the same CNN, recipe `best`, 60 epochs",
    "resnet-best": "the CNN with residual blocks, with elastic augmentation",
    "maxout-paper": "Maxout network, recipe `paper`",
    "gan-paper": "GAN, recipe `paper`",
    "gan-best-large": "GAN, recipe `best`, large networks",
    "cgan-best": "conditional GAN, recipe `best`",
}


# Measure -> its name in metrics.json, and its digits.
MEASURES = {
    "Parzen": ("parzen_log_likelihood", 1), "FID": ("fid", 4), "KID": ("kid", 5), "precision": ("precision", 3),
    "recall": ("recall", 3), "density": ("density", 3), "coverage": ("coverage", 3),
}  # fmt: skip
QUALITY = ["Parzen", "FID", "precision", "recall", "density", "coverage"]
LOOPS = {  # of benchmarks/speed.py, and their headers
    "baseline": "baseline",
    "baseline, 4 workers": "baseline, 4 workers",
    "ours, eager": "with `--no-cuda-graph`",
    "ours": "this loop",
    "ours, compiled": "with `--compile`",
    "JAX": "JAX",
}
Row = dict[str, Any]


def read(name: str) -> Row:
    """What a file of benchmarks/results/ holds; {} if it does not exist."""
    path = MEASURED / name
    return json.loads(path.read_text()) if path.is_file() else {}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def mean_sd(seeds: list[Row], key: str, digits: int, scale: float = 1) -> str:
    values = [scale * seed[key] for seed in seeds]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def measures(seeds: list[Row], names: Iterable[str]) -> list[str]:
    return [mean_sd(seeds, *MEASURES[name]) for name in names]


def quality(seeds: list[Row]) -> str:
    names = ("Parzen", "FID", "coverage")
    return ", ".join(f"{name} {value}" for name, value in zip(names, measures(seeds, names)))


def accuracy(row: Row) -> str:
    spread = f" ± {100 * row['test_accuracy_sd']:.2f}" if len(row["test_errors"]) > 1 else ""
    return f"{100 * row['test_accuracy_mean']:.2f}{spread} %"


def extremes(values: list[float], form: str = "") -> str:
    """'3 to 5', or '3' if all values are 3."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))))


def minutes(row: Row) -> str:
    """Of training, per seed; empty for a row that was measured before runs kept them."""
    if not row.get("training_seconds"):
        return ""
    return f"{statistics.mean(row['training_seconds']) / 60:.1f}{' on a GPU' if row.get('gpu') else ''}"


def nats(seeds: list[Row]) -> str:
    """Minus the log-likelihood; that of an RBM also by the reverse estimate of log Z. Empty for a GAN."""
    if "kind" not in seeds[0]:
        return ""
    text = mean_sd(seeds, "log_likelihood", 2, scale=-1)
    if "log_likelihood_reverse" in seeds[0]:
        text += f" (reverse {mean_sd(seeds, 'log_likelihood_reverse', 2, scale=-1)})"
    return text


def real_images(rows: dict[Any, Row]) -> Row:
    """The measures of real images, which each row's seeds hold; those per class come from the conditional ones."""
    return {key: value for row in rows.values() if "seeds" in row for key, value in row["seeds"][0]["real"].items()}


# Results --------------------------------------------------------------------------------------------------------------


def results_table() -> str:
    lines = []
    for name, row in read("results.json").items():
        if "test_errors" in row:
            errors = ", ".join(map(str, row["test_errors"]))
            cells = [extremes(row["epochs_trained"]), accuracy(row), errors, minutes(row)]
            lines.append([name, f"`{row['command']}`", *cells, row["published"]])
    return table(["name", "command", "epochs", "test accuracy", "test errors", "minutes", "published"], lines)


def generators_table() -> str:
    """Each generator trained against a discriminator: mean and standard deviation over its seeds of every measure."""
    rows = {name: row for name, row in read("results.json").items() if "seeds" in row and "kind" not in row["seeds"][0]}
    real = real_images(rows)
    header = ["name", "command", "epochs", "seeds", *MEASURES, "rarest to most frequent digit", "KL"]
    header += ["conditional accuracy", "class coverage, fraction of real", "minutes", "published"]
    lines = []
    for name, row in rows.items():
        cells = [extremes(row["epochs_evaluated"]), str(len(row["seeds"])), *generator_cells(row["seeds"], real)]
        lines.append([name, f"`{row['command']}`", *cells, minutes(row), row["published"]])
    return table(header, [*lines, ["real training images", "", "", "", *generator_cells([real], real), "", ""]])


def generator_cells(seeds: list[Row], real: Row) -> list[str]:
    digits = extremes([100 * fraction for seed in seeds for fraction in seed["class_histogram"]], ".1f") + " %"
    cells = [*measures(seeds, MEASURES), digits, mean_sd(seeds, "class_kl", 4)]
    if "conditional_accuracy" not in seeds[0]:
        return [*cells, "", ""]
    best = real["class_coverage"]
    of_real = [100 * ours / theirs for seed in seeds for ours, theirs in zip(seed["class_coverage"], best)]
    return [*cells, mean_sd(seeds, "conditional_accuracy", 2, scale=100) + " %", extremes(of_real, ".0f") + " %"]


def likelihood_table() -> str:
    """Each model with a likelihood: mean and standard deviation over its seeds of every measure."""
    lines = []
    for name, row in read("results.json").items():
        if seeds := [seed for seed in row.get("seeds", []) if "kind" in seed]:
            cells = [name, f"`{row['command']}`", str(row["epochs_trained"][0]), str(len(seeds)), seeds[0]["kind"]]
            lines.append([*cells, nats(seeds), *measures(seeds, QUALITY), minutes(row), row["published"]])
    header = ["name", "command", "epochs", "seeds", "likelihood", "nats per image", *QUALITY, "minutes", "published"]
    return table(header, lines)


def families_table() -> str:
    """The slide's five families side by side, a column each below its samples; then real images."""
    results, ((_, *abilities), *families) = read("results.json"), FAMILIES.values()
    rows = [results[name] for name, *_ in families]
    seeds = [row["seeds"] for row in rows]
    names = list(FAMILIES)[1:]
    samples = [f"![Samples of the {name}](assets/{row}.png)" for name, (row, *_) in zip(names, families)]
    lines = [["samples", *samples, "![Real test images](assets/real.png)"]]
    lines += [[what, *own, ""] for what, *own in zip(abilities, *(family[1:] for family in families))]
    lines.append(["nats per image", *map(nats, seeds), ""])
    of_all = [measures(own, ["Parzen", "FID", "coverage"]) for own in [*seeds, [real_images(dict(enumerate(rows)))]]]
    lines += map(list, zip(["Parzen", "FID", "coverage"], *of_all))
    lines.append(["parameters", *(f"{own[0]['parameters']:,}" for own in seeds), ""])
    lines.append(["training, minutes", *map(minutes, rows), ""])
    lines.append(["10,000 samples, seconds", *(f"{sampling_seconds(own):.1f}" for own in seeds), ""])
    return table(["", *names, "real images"], lines)


def sampling_seconds(seeds: list[Row]) -> float:
    return statistics.mean(seed["sampling_seconds"] for seed in seeds)


def best_table() -> str:
    rows, lines = read("results.json"), []
    for name, what in BEST.items():
        row = rows[name]
        lines.append([name, what, accuracy(row) if "test_errors" in row else quality(row["seeds"]), row["published"]])
    header = ["name", "what", "measured", "published"]
    return table(header, [*lines, ["", "real training images", quality([real_images(rows)]), ""]])


# Speed, reliability ---------------------------------------------------------------------------------------------


def speed_table(device: str) -> str:
    """Milliseconds a step of each loop, how often it fits into the baseline's, and the losses of these steps."""
    speed = read(f"speed-{device}.json")
    names = [name for name in LOOPS if name in next(iter(speed["rows"].values()))["loops"]]
    more = ["fraction of the limit", *["`--compile` over JAX"] * ("JAX" in names)]
    times, losses = [], []
    for case, row in speed["rows"].items():
        loops = row["loops"]
        cells = [f"{loops[name]['ms']:.2f} ms{speedup(loops[name], 'baseline', ', ')}" for name in names]
        cells.append(f"{100 * row['limit_ms'] / min(loop['ms'] for loop in loops.values()):.0f} %")
        cells += [speedup(loops["ours, compiled"], "JAX") for _ in more[1:]]
        times.append([case, *cells])
        losses.append([case, *(", ".join(f"{x:.3f}" for x in loops[name]["metrics"].values()) for name in names)])
    header = ["", *map(LOOPS.__getitem__, names)]
    return (
        f"{table([*header, *more], times)}\n\nLoss and accuracy, or the losses of D and G, in the last of these turns:"
        f"\n\n{table(header, losses)}\n\n"
        f"{speed['gpu'] or speed['processor']}, {speed['cores']} cores, torch {speed['torch']}, commit "
        f"{speed['commit'][:7]}; {speed['turns']} turns with {speed['steps']} steps of each loop."
    )


def speedup(loop: Row, other: str, before: str = "") -> str:
    """`before`, and how many times as fast as the other loop, median and range of the turns; empty for that loop."""
    median, low, high = loop["times_as_fast_as"][other]
    return f"{before}{median:.2f} ({low:.2f} to {high:.2f})" if (low, high) != (1, 1) else ""


def reliability_table() -> str:
    """benchmarks/reliability.py: of each experiment, how many trials there were, and how many passed."""
    return table(["experiment", "times", "passed"], list(csv.reader((MEASURED / "reliability.csv").open())))


# Experiments ----------------------------------------------------------------------------------------------------------

# Measure -> its name, factor and digits.
FORMS = {
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
        seeds = [[{"": value} for value in row.get(key, [])] for key in ("without", "edited")]
        values = [mean_sd(rows, "", digits, scale) if rows else "" for rows in seeds]
        link = f"[{name}](../experiments/{name}.diff)"
        lines.append([link, about["what"].rstrip("."), about["lines"], measure, *values, about["step"].split()[0]])
    row = next(iter(measured.values()))
    text = table(["experiment", "what", "lines", "measure", "without", "with", "step"], lines)
    return f"{text}\n\n{row['processor']}, {row['threads']} thread, torch {row['torch']}, Python {row['python']}."


# Photos ---------------------------------------------------------------------------------------------------------


def photo_table() -> str:
    """benchmarks/photo.py: of each condition and each kind of real picture, how many were read right, and by Otsu."""
    lines = []
    for part, measured in read("photo.json").items():
        for name, row in measured["rows"].items():
            total = sum(count for answer, count in row.items() if answer != "otsu")
            shown = [interval(row["right"], total), *(str(row[key]) for key in ("wrong", "refused", "unsure"))]
            lines.append([name, part, str(total), *shown, f"{100 * row['otsu'] / total:.1f} %"])
    return table(["condition or kind", "pictures", "", "right", "wrong", "refused", "unsure", "Otsu right"], lines)


def interval(successes: int, trials: int) -> str:
    """A percentage with its Wilson interval at 95 %: en.wikipedia.org/wiki/Binomial_proportion_confidence_interval."""
    z, p = statistics.NormalDist().inv_cdf(0.975), successes / trials
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (p * (1 - p) / trials + z**2 / (4 * trials**2)) ** 0.5
    return f"{100 * p:.1f} % ({100 * max(0, middle - half):.1f} to {100 * min(1, middle + half):.1f})"


# Pages ----------------------------------------------------------------------------------------------------------------


def slides_table() -> str:
    """Each slide with a link to its line. Raises StopIteration if the code no longer has such a line."""
    lines = []
    for slide, file, start in SLIDES:
        code = (ROOT / file).read_text("utf-8").splitlines()
        number, line = next((i, line.strip()) for i, line in enumerate(code, 1) if line.strip().startswith(start))
        lines.append([slide, f"[{file}:{number}]({file}#L{number})", f"`{line.split('  #')[0]}`".replace("|", r"\|")])
    return table(["slide", "code", ""], lines)


# page -> section, between `<!-- NAME -->` and `<!-- /NAME -->` -> what makes it
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"slides": slides_table, "best": best_table, "families": families_table},
    ROOT / "docs" / "results.md": {
        "results": results_table,
        "generators": generators_table,
        "likelihood": likelihood_table,
        "photos": photo_table,
    },
    ROOT / "docs" / "speed.md": {"speed": partial(speed_table, "cpu")},
    ROOT / "docs" / "gpus.md": {"speed": partial(speed_table, "cuda")},
    ROOT / "docs" / "extending.md": {"experiments": experiments_table},
    ROOT / "docs" / "reliability.md": {"reliability": reliability_table},
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
    for each in PAGES:
        each.write_text(fill(each), "utf-8", newline="\n")
