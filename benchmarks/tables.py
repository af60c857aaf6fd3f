"""The README's tables and one chart, made from the measured results and the code: no figure in them is typed by hand.

python benchmarks/tables.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "results.json"
SPEED = ROOT / "results" / "speed-cpu.json"
RACE = ROOT / "results" / "race-cpu.json"
CHOICES = ROOT / "assets" / "choices.png"

# Slide -> where it stands in the code: file, and the beginning of a line.
SLIDES = [
    ("How does it work? Forward path, loss, backward path, iteration", "train_classifier.py", "def train_step("),
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
    ("CPU vs. GPU", "utils.py", "def pick_device("),
    ("Activation functions", "models/__init__.py", "ACTIVATIONS = {"),
    ("Loss functions", "train_classifier.py", "LOSSES = {"),
    ("Convolution arithmetic (o = i - k + 2p + 1, stride)", "models/cnn.py", "def conv_output_size("),
]


def results_table(rows):
    rows = {name: row for name, row in rows.items() if "test_errors" in row}
    lines = ["| name | command | epochs | test accuracy | test errors | published |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        accuracy = f"{100 * row['test_accuracy_mean']:.2f} ± {100 * row['test_accuracy_sd']:.2f} %"
        errors = ", ".join(map(str, row["test_errors"]))
        epochs = " to ".join(map(str, sorted({min(row["epochs_trained"]), max(row["epochs_trained"])})))
        cells = [name, f"`{row['command']}`", epochs, accuracy, errors, row["published"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def generators_table(rows):
    rows = {name: row["seeds"][0] for name, row in rows.items() if "seeds" in row}
    lines = [
        "| name | epochs | Parzen (sigma) | FID | KID | precision | recall | density | coverage | rarest to most "
        "frequent digit | KL | conditional accuracy | class coverage, share of real |",
        "|" + "---|" * 13,
    ]
    for name, row in rows.items():
        lines.append(generator_line(name, str(row["epochs"]), row, row["real"]))
    real = {key: value for row in rows.values() for key, value in row["real"].items()}
    lines.append(generator_line("real training images", "", real, real))
    return "\n".join(lines)


def generator_line(name, epochs, row, real):
    parzen = f"{row['parzen_log_likelihood']:.1f} ± {row['parzen_standard_error']:.1f} ({row['parzen_sigma']:.3f})"
    shares = f"{100 * min(row['class_histogram']):.1f} to {100 * max(row['class_histogram']):.1f} %"
    cells = [name, epochs, parzen, f"{row['fid']:.4f}", f"{row['kid']:.5f}"]
    cells += [f"{row[key]:.3f}" for key in ("precision", "recall", "density", "coverage")]
    cells += [shares, f"{row['class_kl']:.4f}"]
    if "conditional_accuracy" in row:
        shares = [ours / theirs for ours, theirs in zip(row["class_coverage"], real["class_coverage"])]
        cells += [f"{100 * row['conditional_accuracy']:.2f} %", f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def speed_table(speed):
    lines = [
        "| | ordinary loop | this loop | ratio (lowest to highest) | with `--compile` | share of the machine's limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in speed["rows"].items():
        theirs, ours = row["loops"]["ordinary"], row["loops"]["ours"]
        compiled = row["loops"].get("ours, compiled")
        cells = [name, f"{theirs['ms']:.2f} ms a step", f"{ours['ms']:.2f} ms a step", spread(ours)]
        cells += [spread(compiled) if compiled else "", f"{100 * row['limit_ms'] / ours['ms']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"{machine(speed)}; {speed['turns']} turns with {speed['steps']} steps of each loop."]
    )


def spread(loop):
    return f"{loop['ratio_median']:.2f} ({loop['ratio_min']:.2f} to {loop['ratio_max']:.2f})"


def race_table(race):
    lines = ["| | from the start of the process | test accuracy | seeds |", "|---|---|---|---|"]
    names = {"ours": "`train_classifier.py --recipe fast --amp`", "ordinary": "pytorch/examples' recipe, ordinary loop"}
    for name, mean in race["means"].items():
        seeds = len(race["rows"][name])
        lines.append(f"| {names[name]} | {mean['seconds']:.1f} s | {100 * mean['test_accuracy']:.2f} % | {seeds} |")
    return "\n".join([*lines, "", f"{machine(race)}; means."])


def slides_table():
    """Each slide with a link to its line. Raises StopIteration where the code has no such line any more."""
    lines = ["| slide | code | |", "|---|---|---|"]
    for slide, file, start in SLIDES:
        code = (ROOT / file).read_text().splitlines()
        number, line = next((i, line.strip()) for i, line in enumerate(code, 1) if line.strip().startswith(start))
        lines.append(f"| {slide} | [{file}:{number}]({file}#L{number}) | `{line.split('  #')[0]}` |")
    return "\n".join(lines)


def draw_choices(rows, path):
    """The lecturer's comparison: the MLP's test accuracy with each activation and each loss, mean and deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = {
        "activation": {"relu": "mlp-lecture", **{name: f"mlp-{name}" for name in ("leaky-relu", "tanh", "sigmoid")}},
        "loss": {"cross-entropy": "mlp-lecture", **{name: f"mlp-{name}" for name in ("bce", "mse", "mae")}},
    }
    for i, (title, names) in enumerate(panels.items()):
        axis = figure.add_subplot(1, 2, i + 1)
        means = [100 * rows[name]["test_accuracy_mean"] for name in names.values()]
        deviations = [100 * rows[name]["test_accuracy_sd"] for name in names.values()]
        bars = axis.bar(list(names), means, yerr=deviations, capsize=4, color="#4a7fb5")
        axis.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        axis.set(title=title, ylabel="test accuracy, %", ylim=(0, 105))
    figure.savefig(path, dpi=120)


def machine(results):
    return f"{results['processor']}, {results['cores']} cores, torch {results['torch']}"


def fill(text):
    """The README's text with each section between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    sections = {
        "results": results_table(json.loads(RESULTS.read_text())),
        "generators": generators_table(json.loads(RESULTS.read_text())),
        "speed": speed_table(json.loads(SPEED.read_text())),
        "race": race_table(json.loads(RACE.read_text())),
        "slides": slides_table(),
    }
    for name, table in sections.items():
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        section = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text, count = re.subn(pattern, lambda _, section=section: section, text, flags=re.DOTALL)
        assert count == 1, f"{README} has {count} sections {name}"
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
    draw_choices(json.loads(RESULTS.read_text()), CHOICES)
