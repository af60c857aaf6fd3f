"""What a classifier gets right and wrong: figures, and pictures of its mistakes and filters."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:  # matplotlib takes a while to import
    from matplotlib.figure import Figure


def classification_measures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracy, errors, cross-entropy, and figures per class, of logits [N, 10] and labels [N] on the CPU."""
    from sklearn.metrics import classification_report, confusion_matrix

    predictions = logits.argmax(1)
    digits = list(range(10))
    report = classification_report(labels, predictions, labels=digits, output_dict=True, zero_division=0)
    return {
        "test_images": len(labels),
        "test_accuracy": (predictions == labels).double().mean().item(),
        "test_errors": (predictions != labels).sum().item(),
        "test_loss": F.cross_entropy(logits.double(), labels).item(),
        "per_class": {str(digit): report[str(digit)] for digit in digits},
        "confusion_matrix": confusion_matrix(labels, predictions, labels=digits).tolist(),  # rows: true digits
    }


def print_report(measures: dict[str, Any]) -> None:
    print("digit  precision  recall      f1  images")
    for digit, row in measures["per_class"].items():
        figures = f"{row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1-score']:6.4f}  {row['support']:6.0f}"
        print(f"{digit:>5}  {figures}")
    print(
        f"test accuracy {measures['test_accuracy']:.2%}: {measures['test_errors']} errors in {measures['test_images']} "
        f"images, cross-entropy {measures['test_loss']:.4f}"
    )


def draw_confusion(matrix: list[list[int]]) -> "Figure":
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(6, 6), layout="constrained")
    counts = torch.tensor(matrix)
    axis = figure.add_subplot()
    # The colours saturate at twice the most frequent mistake: the diagonal would hide all others.
    worst = max(1, (counts - torch.diag(counts.diag())).max().item())
    display = ConfusionMatrixDisplay(counts.numpy())
    display.plot(ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 2 * worst})
    axis.set(xlabel="predicted digit", ylabel="true digit")
    return figure


def draw_mistakes(images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> "Figure":
    """The 30 most confident mistakes. images: uint8 [N, 1, 28, 28]; logits: [N, 10]; labels: [N]; all on the CPU."""
    from matplotlib.figure import Figure

    probabilities, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True)][:30].tolist()
    rows = max(1, -(-len(worst) // 10))
    figure = Figure(figsize=(10, 0.3 + 1.5 * rows), layout="constrained")
    figure.suptitle(f"the {len(worst)} most confident of {len(wrong)} mistakes: predicted (probability), true")
    for place, index in enumerate(worst):
        axis = figure.add_subplot(rows, 10, place + 1)
        axis.imshow(images[index, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{predictions[index]} ({probabilities[index]:.0%})\ntrue {labels[index]}", fontsize=9)
        axis.axis("off")
    return figure


def draw_filters(model: nn.Module) -> "Figure | None":
    """Weights into the first layer's first 64 units: a CNN's kernels, or an MLP's weights as 28x28 images.

    None if the first layer has no such picture.
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
