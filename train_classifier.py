"""Train a classifier: the lecture's MLP or CNN, a ResNet, or the Maxout network.

python train_classifier.py --dataset digits --recipe best      # a minute, no download
python train_classifier.py --model mlp                         # the lecture's recipe on MNIST
python train_classifier.py --recipe paper                      # Maxout, Goodfellow et al. 2013
python train_classifier.py --resume runs/mlp-mnist             # continue where it stopped
"""

import engine  # noqa: F401, I001 (before torch, so that Ctrl-C during its import prints one line)
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from datasets import DATASETS, Batches, distort, short_name, split
from engine import flags, optim
from engine.errors import UserError, run_script
from measures.trained import check_rebuilt
from models import ACTIVATIONS, CLASSIFIERS, build_network
from models.maxout import limit_column_norms

RECIPES = {
    # One epoch on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=1, batch_size=32, optimizer="adam", lr=2e-4, betas=[0.5, 0.99], val_size=0),
    # The best on the validation split, the last 5,000 images.
    "best": dict(
        epochs=30, batch_size=128, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine",
        label_smoothing=0.1, augment=True, ema=0.999, batch_norm=True,
    ),
    # The fastest to 99.0 % of the test images.
    "fast": dict(
        model="cnn", epochs=1, batch_size=128, optimizer="adamw", lr=1e-2, weight_decay=0.05, schedule="cosine",
        label_smoothing=0.1, ema=0.99, batch_norm=True, val_size=0,
    ),
    # Goodfellow et al. 2013, section 5.1: the first of its two stages; benchmarks/maxout_paper.py has both.
    "paper": dict(
        model="maxout", epochs=500, patience=100, batch_size=100, optimizer="sgd", lr=0.1, momentum=0.5,
        schedule="maxout", max_norm=1.9365, black=0.0, val_size=10_000,
    ),
}  # fmt: skip
VARIANTS: flags.Variants = {  # what a recipe changes for a dataset or a model
    ("lecture", "digits"): dict(epochs=42),  # as many steps as one epoch of MNIST
    ("best", "digits"): dict(epochs=60, batch_size=64, val_size=0),
    ("best", "folder"): dict(batch_size=64, val_size=0),
    ("best", "mlp"): dict(epochs=60),
    ("best", "resnet"): dict(batch_norm=False, elastic=1.5),  # its batch norm is not optional
    ("best", "maxout"): dict(batch_norm=False, black=0.0),
    ("paper", "digits"): dict(val_size=137),
}

# Each takes logits [N, classes] and the target probabilities t [N, classes]: one-hot labels, perhaps smoothed.
LOSSES = {
    "cross-entropy": F.cross_entropy,  # L = -sum_k t_k log Z_k, with Z = softmax(logits)
    # L = -sum_k [t_k log p_k + (1 - t_k) log(1 - p_k)], with p = sigmoid(logits)
    "bce": lambda logits, t: F.binary_cross_entropy_with_logits(logits, t, reduction="sum") / len(t),
    "mse": lambda logits, t: F.mse_loss(logits.softmax(1), t),  # 1/(MN) sum (t - Z)^2
    "mae": lambda logits, t: F.l1_loss(logits.softmax(1), t),  # 1/(MN) sum |t - Z|
}


def get_args_parser() -> flags.ArgumentParser:
    parser, number = flags.training_parser("classifier", __file__, __doc__, RECIPES, DATASETS), flags.number
    add = parser.group("what to train")
    add("--model", choices=list(CLASSIFIERS), default="cnn", help="network to train")
    add("--activation", choices=list(ACTIVATIONS), help="activation function of the hidden layers (default: ReLU)")
    add("--batch-norm", action=BooleanOptionalAction, default=False, help="batch norm before each activation")
    add("--loss", choices=list(LOSSES), default="cross-entropy", help="loss function")
    add = parser.group("on what")
    add("--black", type=number(float, -1, 0), default=-1.0, help="value of a black pixel; a white one is 1")
    add("--augment", action=BooleanOptionalAction, default=False, help="distort each training image anew every epoch")
    add("--elastic", type=number(float, 0), default=0.0, help="with --augment: largest elastic displacement, in pixels")
    add = parser.group("how to train")
    add("--schedule", choices=["constant", "cosine", "maxout"], default="constant", help="learning rate over time")
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="fraction of the target shared by all classes")
    add("--max-norm", type=number(float, 0), help="largest norm of a linear unit's incoming weights")
    add("--patience", type=number(int, 1), help="stop after this many epochs without a better validation accuracy")
    return parser


def build(args: Namespace, device: torch.device, batches: Any) -> tuple[dict[str, Any], utils.TrainStep, nn.Module]:
    """Return `state` (what to train and to save, by name), the training step, and the network to evaluate."""
    try:
        model = build_network(vars(args)).to(device)
    except ValueError as error:
        raise UserError(error) from error
    if args.amp:
        model = model.to(memory_format=torch.channels_last)  # in which bfloat16 convolutions are faster
    optimizer = optim.build_optimizer(args, model.parameters())
    state = optim.training_state(args, model, optimizer, len(batches))  # with --schedule and --ema, these too
    loss_of = LOSSES[args.loss]
    targets = target_probabilities(args, device)

    def train_step(images: Tensor, labels: Tensor) -> dict[str, Tensor | float]:  # images [N, 1, 28, 28], labels [N]
        if args.augment:
            images = distort(images, elastic=args.elastic)
        logits = model(images)  # forward pass
        loss = loss_of(logits, targets[labels])
        optimizer.zero_grad()
        loss.backward()  # backward pass: dL/dW
        optimizer.step()  # W = W - lr * dL/dW
        if args.max_norm is not None:
            limit_column_norms(model, args.max_norm)
        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}

    return state, train_step, state["ema"].model if "ema" in state else model


def target_probabilities(args: Namespace, device: torch.device | str) -> Tensor:
    """Row k is the target for label k, [classes, classes]: one-hot, smoothed by --label-smoothing."""
    classes, smoothing = len(args.classes), args.label_smoothing
    return torch.eye(classes, device=device) * (1 - smoothing) + smoothing / classes


def check_network(args: Namespace, model: nn.Module, batches: Any) -> None:
    """Raise UserError unless the network takes these images and gives one logit per class."""
    classes = len(args.classes)
    images, _ = batches.take(torch.zeros(2, dtype=torch.int64))  # the first image, twice
    try:
        with utils.evaluating(model):
            outputs = model(images)
    except (RuntimeError, TypeError) as error:
        reason = f"cannot read images {list(images.shape)} ({str(error).splitlines()[0]})"
        raise UserError(f"--model {args.model} {reason}; change its layers in models/ or the dataset") from error
    if not isinstance(outputs, Tensor):
        raise UserError(f"--model {args.model} gives a {type(outputs).__name__}; return the logits alone")
    if outputs.shape != (2, classes):
        found = f"{list(outputs.shape)} for 2 images, not [2, {classes}] logits"
        raise UserError(f"--model {args.model} gives {found}; give its last layer {classes} outputs")
    if outputs.min() >= 0 and torch.allclose(outputs.sum(1), outputs.new_ones(2)):
        raise UserError(f"--model {args.model} gives probabilities, and --loss takes logits; omit its softmax")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args, device = flags.start(get_args_parser(), RECIPES, VARIANTS, argv)
    if args.patience and not args.val_size:
        raise UserError("--patience needs a validation split to watch; add --val-size N")
    train_set, val_set = split(args, at_least=2)
    batches = Batches(*train_set, args.batch_size, device, black=args.black, seed=args.seed)
    val_batches = Batches(*val_set, 1000, device, black=args.black, shuffle=False)
    state, train_step, network = build(args, device, batches)
    check_network(args, network, batches)
    run = utils.Run(args, state, name=f"{args.model}-{short_name(args.dataset)}")

    def validate() -> dict[str, float]:
        if not args.val_size:
            return {}
        logits, labels = utils.predict(network, val_batches)
        loss = LOSSES[args.loss](logits, target_probabilities(args, device)[labels])
        return {"val_loss": loss.item(), "val_accuracy": (logits.argmax(1) == labels).float().mean().item()}

    def should_stop(row: dict[str, float]) -> bool:
        return bool(args.patience) and row["epoch"] - run.best_epoch("val_accuracy") >= args.patience

    check = partial(check_rebuilt, run, network, batches)
    return utils.train(run, train_step, batches, validate, score="val_accuracy", should_stop=should_stop, check=check)


if __name__ == "__main__":
    run_script(main)
