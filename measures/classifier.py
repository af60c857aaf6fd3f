"""What a classifier gets right and wrong: values, and plots of its mistakes and filters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:  # matplotlib takes a while to import
    from matplotlib.figure import Figure

DIGITS = "0123456789"  # the names of the classes, unless told


def classification_measures(
    logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str] = DIGITS
) -> dict[str, Any]:
    """Accuracy, errors, cross-entropy, and values per class, of logits [N, classes] and labels [N] on the CPU."""
    from sklearn.metrics import classification_report, confusion_matrix

    predictions = logits.argmax(1)
    numbers = range(len(names))
    report = classification_report(labels, predictions, labels=numbers, output_dict=True, zero_division=0)
    return {
        "test_images": len(labels),
        "test_accuracy": (predictions == labels).double().mean().item(),
        "test_errors": (predictions != labels).sum().item(),
        "test_loss": F.cross_entropy(logits.double(), labels).item(),
        "per_class": {name: report[str(number)] for number, name in enumerate(names)},
        "confusion_matrix": confusion_matrix(labels, predictions, labels=numbers).tolist(),  # rows: true classes
    }


def print_report(
    logits: torch.Tensor, labels: torch.Tensor, measures: dict[str, Any], names: Sequence[str] = DIGITS
) -> None:
    """scikit-learn's table of the classes, and one line for all. measures: those of the same logits [N, classes]."""
    from sklearn.metrics import classification_report

    numbers = range(len(names))
    given: dict[str, Any] = {"labels": numbers, "target_names": names, "digits": 4, "zero_division": 0}
    print(classification_report(labels, logits.argmax(1), **given))
    print(
        f"test accuracy {measures['test_accuracy']:.2%}: {measures['test_errors']} errors in {measures['test_images']} "
        f"images, cross-entropy {measures['test_loss']:.4f}"
    )


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def plot_confusion(matrix: list[list[int]], names: Sequence[str] = DIGITS) -> "Figure":
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    side = min(30, max(6, 0.45 * len(names)))
    figure = Figure(figsize=(side, side), layout="constrained")
    counts = torch.tensor(matrix)
    axis = figure.add_subplot()
    # The colours saturate at twice the most frequent mistake: the diagonal would hide all others.
    worst = max(1, (counts - torch.diag(counts.diag())).max().item())
    display = ConfusionMatrixDisplay(counts.numpy())
    legible = len(names) <= 50
    display.plot(ax=axis, cmap="Blues", colorbar=False, include_values=legible, im_kw={"vmin": 0, "vmax": 2 * worst})
    axis.set(xlabel="predicted class", ylabel="true class")
    ticks = [shorten(name, 20) for name in names]
    rotation = 90 if max(map(len, ticks)) > 3 else 0
    axis.set_xticks(range(len(ticks)), ticks, rotation=rotation, parse_math=False)  # a name may hold a $
    axis.set_yticks(range(len(ticks)), ticks, parse_math=False)
    return figure


def plot_mistakes(
    images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str] = DIGITS
) -> "Figure":
    """The 30 most confident mistakes. images: uint8 [N, 1, 28, 28]; logits: [N, classes]; labels: [N]; on the CPU."""
    from matplotlib.figure import Figure

    names = [shorten(name, 11) for name in names]
    size = 9 if max(map(len, names)) <= 3 else 7
    probabilities, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True)][:30].tolist()
    rows = max(1, -(-len(worst) // 10))
    figure = Figure(figsize=(10, 0.3 + 1.5 * rows), layout="constrained")
    figure.suptitle(f"the {len(worst)} most confident of {len(wrong)} mistakes: predicted (probability), true")
    for place, index in enumerate(worst):
        axis = figure.add_subplot(rows, 10, place + 1)
        axis.imshow(images[index, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        title = f"{names[predictions[index]]} ({probabilities[index]:.0%})\ntrue {names[labels[index]]}"
        axis.set_title(title, fontsize=size, parse_math=False)
        axis.axis("off")
    return figure


def plot_filters(model: nn.Module) -> "Figure | None":
    """Weights into the first layer's first 64 units: a CNN's kernels, or an MLP's weights as 28x28 images.

    None if the first layer has other weights.
    """
    from matplotlib.figure import Figure

    weight = next((p for p in model.parameters() if p.dim() > 1), torch.zeros(0, 0)).detach().cpu()[:64]
    if weight.dim() == 4:
        filters = weight[:, 0]
    elif weight.shape[1:] == (28 * 28,):
        filters = weight.view(-1, 28, 28)
    else:
        return None
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    figure.suptitle(f"first layer: weights of {len(filters)} units, blue negative, red positive")
    for place, kernel in enumerate(filters):
        axis = figure.add_subplot(8, 8, place + 1)
        limit = kernel.abs().max().item()
        axis.imshow(kernel.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
        axis.axis("off")
    return figure
