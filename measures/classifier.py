"""What a classifier gets right and wrong: values, and plots."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIGITS = "0123456789"  # the names of the classes, unless told


def classification_measures(logits: Tensor, labels: Tensor, names: Sequence[str] = DIGITS) -> dict[str, Any]:
    """Accuracy, errors, cross-entropy, and values per class, of logits [N, classes] and labels [N] on the CPU."""
    from sklearn.metrics import classification_report, confusion_matrix

    predictions, numbers = logits.argmax(1), range(len(names))
    report = classification_report(labels, predictions, labels=numbers, output_dict=True, zero_division=0)
    return {
        "test_images": len(labels),
        "test_accuracy": (predictions == labels).double().mean().item(),
        "test_errors": (predictions != labels).sum().item(),
        "test_loss": F.cross_entropy(logits.double(), labels).item(),
        "per_class": {name: report[str(number)] for number, name in enumerate(names)},
        "confusion_matrix": confusion_matrix(labels, predictions, labels=numbers).tolist(),  # rows: true classes
    }


def print_report(logits: Tensor, labels: Tensor, measures: dict[str, Any], names: Sequence[str] = DIGITS) -> None:
    """scikit-learn's table of the classes, and one line for all. measures: those of the same logits [N, classes]."""
    from sklearn.metrics import classification_report

    predictions = logits.argmax(1)
    shown = torch.cat([labels, predictions]).unique().tolist()  # the averages are of these: another class counts as 0
    given: dict[str, Any] = {"target_names": [names[number] for number in shown], "digits": 4, "zero_division": 0}
    print(classification_report(labels, predictions, labels=shown, **given))
    if numbered := [f"{label} is {name}" for label, name in zip(labels_of(names), names) if label[0] == "#" != name[0]]:
        print(f"in the plots: {', '.join(numbered)}")
    print(
        f"test accuracy {measures['test_accuracy']:.2%}: {measures['test_errors']} errors in {measures['test_images']} "
        f"images, cross-entropy {measures['test_loss']:.4f}"
    )


def predictions_table(logits: Tensor, labels: Tensor, names: Sequence[str], files: Sequence) -> str:
    """A row of CSV for each of `files` [N]: the mistakes first, ordered as in `plot_mistakes`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "predicted", "probability"])
    probabilities, predictions = logits.double().softmax(1).max(1)
    for i in (probabilities + (predictions != labels)).argsort(descending=True).tolist():
        writer.writerow([files[i], names[int(labels[i])], names[int(predictions[i])], f"{probabilities[i]:.4f}"])
    return text.getvalue()


def labels_of(names: Sequence[str], most: int = 20) -> list[str]:
    """The classes' names as plots show them: at most `most` characters; #number if the font lacks one of them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    short = [name if len(name) <= most else name[: most - 1] + "…" for name in names]
    shown = [name if {*map(ord, name)} <= glyphs.keys() else f"#{number}" for number, name in enumerate(short)]
    return [name.replace("$", r"\$") for name in shown]  # a plain $ would start a formula


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # takes a while to import

    return Figure(figsize=(width, height), layout="constrained")


def plot_confusion(matrix: list[list[int]], names: Sequence[str] = DIGITS) -> Any:
    """The colours saturate at twice the most frequent mistake: otherwise the diagonal would hide the mistakes."""
    from sklearn.metrics import ConfusionMatrixDisplay

    counts, side = torch.tensor(matrix), min(30, max(6, 0.45 * len(names)))
    worst = max(1, (counts - torch.diag(counts.diag())).max().item())
    display = ConfusionMatrixDisplay(counts.numpy(), display_labels=labels_of(names))
    figure, rotation = new_figure(side, side), 90 if max(map(len, names)) > 3 else 0
    look: dict[str, Any] = {"cmap": "Blues", "colorbar": False, "im_kw": {"vmin": 0, "vmax": 2 * worst}}
    display.plot(ax=figure.add_subplot(), xticks_rotation=rotation, include_values=len(names) <= 50, **look)
    for text in figure.axes[0].texts:  # scikit-learn chooses their colour for another scale
        text.set_color("white" if float(text.get_text()) > worst else "black")
    return figure


def plot_mistakes(images: Tensor, logits: Tensor, labels: Tensor, names: Sequence[str] = DIGITS) -> Any:
    """The 30 most confident mistakes. images: uint8 [N, C, H, W]; logits: [N, classes]; labels: [N]; on the CPU."""
    names = labels_of(names, 11)
    probabilities, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True)][:30].tolist()
    rows = max(1, -(-len(worst) // 10))
    figure = new_figure(10, 0.3 + 1.5 * rows)
    figure.suptitle(f"the {len(worst)} most confident of {len(wrong)} mistakes: predicted (probability), true")
    for place, index in enumerate(worst):
        axis = figure.add_subplot(rows, 10, place + 1)
        axis.imshow(images[index].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        title = f"{names[predictions[index]]} ({probabilities[index]:.0%})\ntrue {names[labels[index]]}"
        axis.set_title(title, fontsize=9 if max(map(len, names)) <= 3 else 7)
        axis.axis("off")
    return figure


def plot_filters(model: nn.Module) -> Any:
    """Weights into the first layer's first 64 units: a CNN's kernels, or an MLP's as images; None if neither."""
    weight = next(p for p in model.parameters() if p.dim() > 1).detach().cpu()[:64]
    if weight.dim() != 4 and weight.shape[1:] != (28 * 28,):
        return None
    figure = new_figure(8, 8.4)
    figure.suptitle(f"first layer: weights of {len(weight)} units, blue negative, red positive")
    for place, kernel in enumerate(weight.mean(1) if weight.dim() == 4 else weight.view(-1, 28, 28), 1):
        axis, limit = figure.add_subplot(8, 8, place), kernel.abs().max().item()
        axis.imshow(kernel.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
        axis.axis("off")
    return figure
