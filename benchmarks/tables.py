"""The tables of README.md and docs/, made from the measured results and the code: no figure in them is typed by hand.

python benchmarks/tables.py
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "results"
CHOICES = ROOT / "assets" / "choices.png"

# Slide -> where it is in the code: file, and the beginning of a line.
SLIDES = [
    ("How does it work? Forward path, loss, backward path", "train_classifier.py", "def train_step("),
    ("How does it work? Iteration", "utils.py", "def train_epoch("),
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
    ("Activation functions", "models/__init__.py", "ACTIVATIONS = {"),
    ("Loss functions", "train_classifier.py", "LOSSES = {"),
    ("Convolution arithmetic (o = i - k + 2p + 1, stride)", "models/cnn.py", "def conv_output_size("),
]

# The slide "Various generative models": each family, its row of results.json and its samples.
FAMILIES = {
    "HMM": ("hmm-lecture", "assets/hmm-lecture.png"),
    "RBM": ("rbm-lecture", "assets/rbm-lecture.png"),
    "VAE": ("vae-lecture", "assets/vae-lecture.png"),
    "RNN": ("rnn-lecture", "assets/rnn-lecture.png"),
    "GAN": ("gan-best", "assets/gan-best.png"),
}
# What each family can do, in that order, and then what real images say of it.
ABILITIES = {
    "maximises": ["log p(x)", "log p(x), by contrastive divergence", "a lower bound on log p(x)", "log p(x)",
                  "D's error", ""],
    "scores an image": ["exactly", "by an estimate", "by a lower bound", "exactly", "no", ""],
    "completes a half": ["no", "by Gibbs sampling", "no", "row by row", "no", ""],
    "takes a label": ["no", "no", "no", "no", "as a conditional GAN", ""],
}  # fmt: skip

# The rows of results.json that the README shows, and what each one is.
BEST = {
    "mlp-lecture": "the lecture's MLP, one epoch",
    "cnn-lecture": "the lecture's CNN, one epoch",
    "mlp-best": "the same MLP, recipe `best`",
    "cnn-best-60-epochs": "the same CNN, recipe `best`, 60 epochs",
    "resnet-best": "the CNN with residual blocks, images also bent",
    "maxout-paper": "Maxout network, recipe `paper`",
    "gan-paper": "GAN, recipe `paper`",
    "gan-best-large": "GAN, recipe `best`, large networks",
    "cgan-best": "conditional GAN, recipe `best`",
}


def read(name: str) -> dict[str, Any]:
    """What a file of benchmarks/results/ holds; {} if it does not exist."""
    path = MEASURED / name
    return json.loads(path.read_text()) if path.is_file() else {}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


# Results --------------------------------------------------------------------------------------------------------------


def results_table() -> str:
    lines = []
    for name, row in read("results.json").items():
        if "test_errors" in row:
            errors = ", ".join(map(str, row["test_errors"]))
            cells = [name, f"`{row['command']}`", extremes(row["epochs_trained"]), accuracy(row), errors]
            lines.append([*cells, minutes(row), row["published"]])
    return table(["name", "command", "epochs", "test accuracy", "test errors", "minutes", "published"], lines)


def accuracy(row: dict[str, Any]) -> str:
    spread = f" ± {100 * row['test_accuracy_sd']:.2f}" if len(row["test_errors"]) > 1 else ""
    return f"{100 * row['test_accuracy_mean']:.2f}{spread} %"


def generators_table() -> str:
    """Each generator trained against a discriminator: mean and standard deviation over its seeds of every measure."""
    rows = {name: row for name, row in read("results.json").items() if "seeds" in row and "kind" not in row["seeds"][0]}
    real = real_images(rows)
    header = ["name", "command", "epochs", "seeds", "Parzen", "FID", "KID"]
    header += ["precision", "recall", "density", "coverage", "rarest to most frequent digit", "KL"]
    header += ["conditional accuracy", "class coverage, share of real", "minutes", "published"]
    lines = []
    for name, row in rows.items():
        cells = [name, f"`{row['command']}`", extremes(row["epochs_evaluated"]), str(len(row["seeds"]))]
        lines.append([*cells, *generator_cells(row["seeds"], real), minutes(row), row["published"]])
    return table(header, [*lines, ["real training images", "", "", "", *generator_cells([real], real), "", ""]])


def generator_cells(seeds: list[dict[str, Any]], real: dict[str, Any]) -> list[str]:
    cells = [mean_sd(seeds, key, digits) for key, digits in (("parzen_log_likelihood", 1), ("fid", 4), ("kid", 5))]
    cells += [mean_sd(seeds, key, 3) for key in ("precision", "recall", "density", "coverage")]
    cells.append(extremes([100 * share for seed in seeds for share in seed["class_histogram"]], ".1f") + " %")
    cells.append(mean_sd(seeds, "class_kl", 4))
    if "conditional_accuracy" not in seeds[0]:
        return [*cells, "", ""]
    best = real["class_coverage"]
    of_real = [100 * ours / theirs for seed in seeds for ours, theirs in zip(seed["class_coverage"], best)]
    return [*cells, mean_sd(seeds, "conditional_accuracy", 2, scale=100) + " %", extremes(of_real, ".0f") + " %"]


def likelihood_table() -> str:
    """Each model with a likelihood: mean and standard deviation over its seeds of every measure."""
    rows = {name: row for name, row in read("results.json").items() if "kind" in row.get("seeds", [{}])[0]}
    header = ["name", "command", "epochs", "seeds", "likelihood", "nats per image", "Parzen", "FID"]
    header += ["precision", "recall", "density", "coverage", "minutes", "published"]
    lines = []
    for name, row in rows.items():
        seeds = row["seeds"]
        cells = [name, f"`{row['command']}`", str(row["epochs_trained"][0]), str(len(seeds)), seeds[0]["kind"]]
        cells += [nats(seeds), mean_sd(seeds, "parzen_log_likelihood", 1), mean_sd(seeds, "fid", 4)]
        cells += [mean_sd(seeds, key, 3) for key in ("precision", "recall", "density", "coverage")]
        lines.append([*cells, minutes(row), row["published"]])
    return table(header, lines)


def nats(seeds: list[dict[str, Any]]) -> str:
    """Minus the log-likelihood; that of an RBM also by the reverse estimate of log Z. Empty for a GAN."""
    if "kind" not in seeds[0]:
        return ""
    negative = [{key: -value for key, value in seed.items() if key.startswith("log_likelihood")} for seed in seeds]
    text = mean_sd(negative, "log_likelihood", 2)
    if "log_likelihood_reverse" in negative[0]:
        text += f" (reverse {mean_sd(negative, 'log_likelihood_reverse', 2)})"
    return text


def families_table() -> str:
    """The slide's five families side by side, a column each below its samples; then real images."""
    rows = {family: read("results.json")[name] for family, (name, _) in FAMILIES.items()}
    seeds = [row["seeds"] for row in rows.values()]
    real = [real_images(rows)]
    samples = [f"![Samples of the {name}]({picture})" for name, (_, picture) in FAMILIES.items()]
    lines = [["samples", *samples, "![Real test images](assets/real.png)"]]
    lines += [[what, *cells] for what, cells in ABILITIES.items()]
    lines.append(["nats per image", *map(nats, seeds), ""])
    for what, key, digits in (
        ("Parzen", "parzen_log_likelihood", 1),
        ("FID", "fid", 4),
        ("coverage", "coverage", 3),
    ):
        lines.append([what, *(mean_sd(row, key, digits) for row in [*seeds, real])])
    lines.append(["parameters", *(f"{row[0]['parameters']:,}" for row in seeds), ""])
    lines.append(["training, minutes", *map(minutes, rows.values()), ""])
    seconds = [statistics.mean(seed["sampling_seconds"] for seed in row) for row in seeds]
    lines.append(["10,000 samples, seconds", *(f"{value:.1f}" for value in seconds), ""])
    return table(["", *FAMILIES, "real images"], lines)


def maxout_table() -> str:
    """benchmarks/maxout_ablation.py: test accuracy with one detail of the released configuration changed at a time."""
    lines = []
    for case, row in read("maxout-ablation.json").items():
        seeds = [{"accuracy": 1 - errors / 10_000} for errors in row["test_errors"]]
        errors = ", ".join(map(str, row["test_errors"]))
        flags = f"`{' '.join(row['flags'])}`" if row["flags"] else ""
        lines.append([case, flags, f"{mean_sd(seeds, 'accuracy', 2, scale=100)} %", errors, minutes(row)])
    return table(["changed", "flags", "test accuracy", "test errors", "minutes"], lines)


def stacked_table() -> str:
    """benchmarks/stacked_mnist.py: how many of 1,000 modes each way of training reaches."""
    lines = []
    for way, row in read("stacked-mnist.json").items():
        seeds, flags = row["seeds"], f"`{row['options']}`" if "options" in row else ""
        lines.append([way, flags, str(len(seeds)), mean_sd(seeds, "modes", 0), mean_sd(seeds, "kl", 3), minutes(row)])
    return table(["", "flags of train_gan.py", "seeds", "modes of 1,000", "KL", "minutes"], lines)


def photo_table() -> str:
    """benchmarks/photo.py: how many of the digits are read right in each condition."""
    measured = read("photo.json")
    lines = [["MNIST itself", f"{100 * measured['mnist_itself']:.1f} %", "", ""]]
    for name, row in measured["rows"].items():
        cells = [f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f} %", row["wrong"], row["refused"]]
        lines.append([name, *map(str, cells)])
    return table(["condition", "read right", "read wrong", "refused"], lines)


def minutes(row: dict[str, Any]) -> str:
    """Of training, per seed; empty for a row that was measured before runs kept them."""
    if not row.get("training_seconds"):
        return ""
    return f"{statistics.mean(row['training_seconds']) / 60:.1f}{' on a GPU' if row.get('gpu') else ''}"


def extremes(values: list[float], form: str = "") -> str:
    """'3 to 5', or '3' if all values are 3."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))))


def mean_sd(seeds: list[dict[str, Any]], key: str, digits: int, scale: float = 1) -> str:
    values = [scale * seed[key] for seed in seeds]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def real_images(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The measures of real images, which each row's seeds hold; those per class come from the conditional ones."""
    return {key: value for row in rows.values() for key, value in row["seeds"][0]["real"].items()}


def best_table() -> str:
    rows = read("results.json")
    lines = []
    for name, what in BEST.items():
        row = rows[name]
        lines.append([name, what, accuracy(row) if "test_errors" in row else quality(row["seeds"]), row["published"]])
    real = real_images({name: row for name, row in rows.items() if "seeds" in row})
    header = ["name", "what", "measured", "published"]
    return table(header, [*lines, ["", "real training images", quality([real]), ""]])


def quality(seeds: list[dict[str, Any]]) -> str:
    parzen, fid = mean_sd(seeds, "parzen_log_likelihood", 1), mean_sd(seeds, "fid", 4)
    return f"Parzen {parzen}, FID {fid}, coverage {mean_sd(seeds, 'coverage', 3)}"


def draw_choices(path: Path) -> None:
    """The lecturer's comparison: the MLP's test accuracy with each activation and each loss, mean and deviation."""
    from matplotlib.figure import Figure

    rows = read("results.json")
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = {
        "activation": {"relu": "mlp-lecture", **{name: f"mlp-{name}" for name in ("leaky-relu", "tanh", "sigmoid")}},
        "loss": {"cross-entropy": "mlp-lecture", **{name: f"mlp-{name}" for name in ("bce", "mse", "mae")}},
    }
    for i, (title, names) in enumerate(panels.items()):
        axis = figure.add_subplot(1, 2, i + 1)
        means = [100 * rows[name]["test_accuracy_mean"] for name in names.values()]
        deviations = [100 * rows[name]["test_accuracy_sd"] for name in names.values()]
        axis.errorbar(list(names), means, yerr=deviations, fmt="o", capsize=4, color="#4a7fb5")
        for place, mean in enumerate(means):
            axis.annotate(f"{mean:.1f}", (place, mean), xytext=(8, 0), textcoords="offset points", va="center")
        axis.set(title=title, ylabel="test accuracy, %", xlim=(-0.5, len(names) - 0.3))
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


# Speed ----------------------------------------------------------------------------------------------------------------

LOOPS = {  # the loops that benchmarks/speed.py may have timed, and their headers
    "ordinary": "ordinary loop",
    "ordinary, 4 workers": "ordinary loop, 4 workers",
    "ours, eager": "with `--no-cuda-graph`",
    "ours": "this loop",
    "ours, compiled": "with `--compile`",
    "JAX": "JAX",
}


def speed_table(device: str) -> str:
    """Milliseconds a step of each loop, how often it fits into the ordinary loop's, and the losses of these steps."""
    speed = read(f"speed-{device}.json")
    first = next(iter(speed["rows"].values()))["loops"]
    names = [name for name in LOOPS if name in first]
    header = ["", *(LOOPS[name] for name in names), "share of the limit"]
    header += ["`--compile` over JAX"] * ("JAX" in first)
    lines = []
    for case, row in speed["rows"].items():
        loops = row["loops"]
        cells = [
            f"{loops[name]['ms']:.2f} ms" + (f", {spread(loops[name], 'ordinary')}" if name != "ordinary" else "")
            for name in names
        ]
        cells.append(f"{100 * row['limit_ms'] / min(loops[name]['ms'] for name in names):.0f} %")
        if "JAX" in loops:
            cells.append(spread(loops["ours, compiled"], "JAX"))
        lines.append([case, *cells])
    losses = [
        [case, *(", ".join(f"{value:.3f}" for value in row["loops"][name]["metrics"].values()) for name in names)]
        for case, row in speed["rows"].items()
    ]
    conditions = f"{machine(speed)}; {speed['turns']} turns with {speed['steps']} steps of each loop."
    return (
        f"{table(header, lines)}\n\nLoss and accuracy, or the losses of D and G, in the last of these turns:\n\n"
        f"{table(['', *(LOOPS[name] for name in names)], losses)}\n\n{conditions}"
    )


def spread(loop: dict[str, Any], other: str) -> str:
    """How many times as fast as the other loop, median and range of the turns."""
    median, low, high = loop["times_as_fast_as"][other]
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def race_table(device: str) -> str:
    race = read(f"race-{device}.json")
    names = {"ours": "`train_classifier.py --recipe fast --amp`", "ordinary": "pytorch/examples' recipe, ordinary loop"}
    lines = [
        [names[name], f"{mean['seconds']:.1f} s", f"{100 * mean['test_accuracy']:.2f} %", str(len(race["rows"][name]))]
        for name, mean in race["means"].items()
    ]
    header = ["", "from the start of the process", "test accuracy", "seeds"]
    return f"{table(header, lines)}\n\n{machine(race)}; means over the seeds."


def scaling_table(device: str) -> str:
    """What it costs to hold images in memory, and to read them from a file."""
    scaling = read(f"scaling-{device}.json")
    lines = [
        [f"{row['images']:,}", row["source"], f"{row['memory'] / 1e6:,.0f} MB", f"{row['first_batch']:.2f} s",
         f"{row['image']:.1f} µs"]
        for row in scaling["images"]
    ]  # fmt: skip
    header = ["images", "held in", "memory", "first batch", "each image, batch 256"]
    return f"{table(header, lines)}\n\n{machine(scaling)}."


def agreement_table() -> str:
    """Test figures of eager and of compiled training, and the difference of their means in its standard errors."""
    agreement, lines = read("agreement.json"), []
    for row in agreement["rows"]:
        measure = row["measure"]
        ways = [mean_sd([{measure: value} for value in row[way]], measure, 4) for way in ("eager", "compiled")]
        lines.append([f"`{row['command']}`", measure, *ways, f"{row['standard_errors']:.1f}", short(row["commit"])])
    header = ["command, with `--dataset digits`", "measure", "eager", "compiled", "difference, in standard errors"]
    conditions = "{processor}, {cores} cores, torch {torch}".format(**agreement)
    return f"{table([*header, 'commit'], lines)}\n\n{conditions}."


def machine(results: dict[str, Any]) -> str:
    name = results.get("gpu") or f"{results['processor']}, {results['cores']} cores"
    return f"{name}, torch {results['torch']}, commit {short(results['commit'])}"


def short(commit: str | None) -> str:
    return "unknown" if not commit else commit[:7] + "-dirty" * commit.endswith("-dirty")


# GPUs -----------------------------------------------------------------------------------------------------------------


def gpu_section() -> str:
    """What benchmarks/gpu.py has measured."""
    measured = read("gpu.json")
    if not measured:
        return "Nothing on this page has run on a GPU yet. The figures of all pages were measured on a CPU."
    lines = []
    for name, row in measured["steps"].items():
        result = figures(row.get("metrics", {})) if row["succeeded"] else "**failed**"
        lines.append([name, f"{row['seconds']:.0f} s", result, short(row["commit"])])
    parts = [table(["step", "time", "result", "commit"], lines), f"{machine(measured)}."]
    parts += [
        make("cuda") for name, make in (("race", race_table), ("speed", speed_table)) if read(f"{name}-cuda.json")
    ]
    return "\n\n".join(parts)


def figures(metrics: dict[str, Any]) -> str:
    if "test_accuracy" in metrics:
        return f"test accuracy {100 * metrics['test_accuracy']:.2f} %"
    return quality([metrics]) if metrics else "passed"


# Pages ----------------------------------------------------------------------------------------------------------------


def slides_table() -> str:
    """Each slide with a link to its line. Raises StopIteration if the code no longer has such a line."""
    lines = []
    for slide, file, start in SLIDES:
        code = (ROOT / file).read_text("utf-8").splitlines()
        number, line = next((i, line.strip()) for i, line in enumerate(code, 1) if line.strip().startswith(start))
        lines.append([slide, f"[{file}:{number}]({file}#L{number})", f"`{line.split('  #')[0]}`"])
    return table(["slide", "code", ""], lines)


# page -> section, between `<!-- NAME -->` and `<!-- /NAME -->` -> what makes it
PAGES = {
    ROOT / "README.md": {"slides": slides_table, "best": best_table, "families": families_table},
    ROOT / "docs" / "results.md": {
        "results": results_table,
        "maxout": maxout_table,
        "generators": generators_table,
        "stacked": stacked_table,
        "likelihood": likelihood_table,
        "photo": photo_table,
    },
    ROOT / "docs" / "speed.md": {
        "race": lambda: race_table("cpu"),
        "speed": lambda: speed_table("cpu"),
        "scaling": lambda: scaling_table("cpu"),
        "agreement": agreement_table,
    },
    ROOT / "docs" / "gpus.md": {"gpu": gpu_section},
}


def fill(page: Path) -> str:
    """The text of a page with each of its sections up to date."""
    text = page.read_text("utf-8")
    for name, make in PAGES[page].items():
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        section = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, count = re.subn(pattern, lambda _, section=section: section, text, flags=re.DOTALL)
        assert count == 1, f"{page} has {count} sections {name}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    for page in PAGES:
        page.write_text(fill(page), "utf-8", newline="\n")
    draw_choices(CHOICES)


if __name__ == "__main__":
    main()
