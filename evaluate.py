"""Measure a finished or half-finished run on the test set, and draw what a teacher would show.

python evaluate.py runs/cnn-mnist                              # numbers and pictures in runs/cnn-mnist/evaluation
python evaluate.py runs/cnn-mnist --image mine.jpg other.png   # read digits of your own
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from datasets import Batches, load, read_photo
from models import build_classifier


def get_args_parser():
    parser = utils.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder, or one checkpoint file")
    parser.add_argument("--data-dir", help="folder of the data sets (None: the one the run was trained from)")
    parser.add_argument("--batch-size", type=utils.number(int, 1), default=1000, help="images at a time")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    parser.add_argument("--image", metavar="FILE", nargs="+", help="classify these pictures instead of the test set")
    return parser


def load_classifier(run, device):
    """The network that the run stands for (best.pt, averaged weights, where there are such) and its checkpoint."""
    path = Path(run)
    best = path / "best.pt"
    checkpoint = utils.load_checkpoint(best if best.is_file() else path)
    options, state = checkpoint["options"], checkpoint["state"]
    weights = state["average"]["model"] if "average" in state else state["model"]
    try:
        model = build_classifier(options["model"], options["activation"], options["batch_norm"])
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise utils.UserError(
            f"{run} does not fit models/, which has changed since: {' '.join(str(error).split())}"
        ) from error
    return model.eval().to(device), checkpoint


def measure(logits, labels):
    """What metrics.json holds of logits [N, 10] and labels [N], both on the CPU."""
    from sklearn.metrics import classification_report, confusion_matrix

    guesses = logits.argmax(1)
    digits = list(range(10))
    report = classification_report(labels, guesses, labels=digits, output_dict=True, zero_division=0)
    return {
        "test_images": len(labels),
        "test_accuracy": (guesses == labels).double().mean().item(),
        "test_errors": (guesses != labels).sum().item(),
        "test_loss": F.cross_entropy(logits.double(), labels).item(),
        "per_class": {str(digit): report[str(digit)] for digit in digits},
        "confusion_matrix": confusion_matrix(labels, guesses, labels=digits).tolist(),  # rows: true, columns: predicted
    }


def print_report(metrics):
    print("digit  precision  recall      f1  images")
    for digit, row in metrics["per_class"].items():
        print(
            f"{digit:>5}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1-score']:6.4f}  {row['support']:6.0f}"
        )
    print(
        f"test accuracy {metrics['test_accuracy']:.2%}: {metrics['test_errors']} errors in {metrics['test_images']} "
        f"images, cross-entropy {metrics['test_loss']:.4f}"
    )


def save_figure(figure, path):
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def draw_confusion(matrix, folder):
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(6, 6), layout="constrained")
    counts = torch.tensor(matrix).float()
    axis = figure.add_subplot()
    # The colours saturate at the most frequent mistake: the diagonal would drown all others.
    worst = max(1.0, (counts - torch.diag(counts.diag())).max().item())
    display = ConfusionMatrixDisplay(torch.tensor(matrix).numpy())
    display.plot(ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 2 * worst})
    axis.set(xlabel="predicted digit", ylabel="true digit")
    save_figure(figure, folder / "confusion_matrix.png")


def draw_mistakes(images, logits, labels, folder, most=30):
    """The wrongly read images that the network was surest of, the surest first."""
    from matplotlib.figure import Figure

    probabilities, guesses = logits.softmax(1).max(1)
    wrong = (guesses != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True)][:most].tolist()
    rows = max(1, -(-len(worst) // 10))
    figure = Figure(figsize=(10, 0.3 + 1.5 * rows), layout="constrained")
    figure.suptitle(f"the {len(worst)} surest of {len(wrong)} mistakes: predicted (probability), true")
    for place, index in enumerate(worst):
        axis = figure.add_subplot(rows, 10, place + 1)
        axis.imshow(images[index, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{guesses[index]} ({probabilities[index]:.0%})\ntrue {labels[index]}", fontsize=9)
        axis.axis("off")
    save_figure(figure, folder / "mistakes.png")


def draw_filters(model, folder, most=64):
    """Weights into the first layer's units: 3x3 kernels of a CNN, 28x28 images of what an MLP looks for.

    Draws nothing for a network whose first layer has no such picture.
    """
    from matplotlib.figure import Figure

    weight = next(p for p in model.parameters() if p.dim() > 1).detach().cpu()[:most]
    if weight.dim() == 4:
        filters = weight[:, 0]
    elif weight.shape[1:] == (28 * 28,):
        filters = weight.view(-1, 28, 28)
    else:
        return
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    figure.suptitle(f"first layer: weights of {len(filters)} linear units, blue negative, red positive")
    for place, kernel in enumerate(filters):
        axis = figure.add_subplot(8, 8, place + 1)
        limit = kernel.abs().max().item()
        axis.imshow(kernel.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
        axis.axis("off")
    save_figure(figure, folder / "filters.png")


def classify_photos(model, paths, device, black):
    """Print the probability of each digit for pictures of the user's own; returns how many could not be read."""
    unread = 0
    for path in paths:
        try:
            image = read_photo(path)
        except OSError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            unread += 1
            continue
        images, _ = next(Batches(image, torch.zeros(1), 1, device, low=black, shuffle=False).epoch(0))
        with torch.no_grad():
            probabilities = model(images).softmax(1)[0]
        print(f"{path}: {probabilities.argmax()}")
        print("  " + "  ".join(f"{digit}: {value:.1%}" for digit, value in enumerate(probabilities.tolist())))
    return unread


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    model, checkpoint = load_classifier(args.run, device)
    options = checkpoint["options"]
    if args.image:
        sys.exit(1 if classify_photos(model, args.image, device, options["black"]) else 0)

    images, labels = load(options["dataset"], args.data_dir or options["data_dir"], train=False)
    batches = Batches(images, labels, args.batch_size, device, low=options["black"], shuffle=False)
    logits, _ = utils.predict(model, batches)
    logits = logits.cpu()
    metrics = {
        "dataset": options["dataset"],
        "model": options["model"],
        "epochs": checkpoint["epoch"],
        **measure(logits, labels),
    }
    print_report(metrics)
    run = Path(args.run)
    folder = (run if run.is_dir() else run.parent) / "evaluation"
    folder.mkdir(exist_ok=True)
    utils.write_whole(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(f"wrote {folder / 'metrics.json'}")
    draw_confusion(metrics["confusion_matrix"], folder)
    draw_mistakes(images, logits, labels, folder)
    draw_filters(model, folder)


if __name__ == "__main__":
    utils.run_script(main)
