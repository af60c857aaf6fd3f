"""Train the lecture's MLP or CNN, or the Maxout network, to read digits.

python train_classifier.py --dataset digits --recipe best      # a minute, no download
python train_classifier.py --model mlp                         # the lecture's recipe on MNIST
python train_classifier.py --recipe paper                      # Maxout, Goodfellow et al. 2013: first stage
python train_classifier.py --recipe paper --second-stage runs/maxout-mnist
python train_classifier.py --resume runs/mlp-mnist             # continue where it stopped
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from datasets import DATASETS, Batches, class_names, distort, hold_out, load, short_name
from engine import distributed, flags, optim
from engine.checkpoint import load_checkpoint
from engine.device import pick_device
from engine.errors import UserError, run_script
from models import ACTIVATIONS, CLASSIFIERS, build_classifier
from models.maxout import limit_column_norms

RECIPES = {
    # One epoch on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=1, batch_size=32, optimizer="adam", lr=2e-4, betas=[0.5, 0.99], val_size=0),
    # What scored best on the validation split, the last 5,000 images.
    "best": dict(
        epochs=30, batch_size=128, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine",
        label_smoothing=0.1, augment=True, ema=0.999, batch_norm=True,
    ),
    # 99.0 % in the shortest time.
    "fast": dict(
        model="cnn", epochs=1, batch_size=128, optimizer="adamw", lr=1e-2, weight_decay=0.05, schedule="cosine",
        label_smoothing=0.1, ema=0.99, batch_norm=True, val_size=0,
    ),
    # Goodfellow et al. 2013, section 5.1; --second-stage is the second of its two stages.
    "paper": dict(
        model="maxout", epochs=500, patience=100, batch_size=100, optimizer="sgd", lr=0.1, momentum=0.5,
        schedule="maxout", max_norm=1.9365, black=0.0, val_size=10_000,
    ),
}  # fmt: skip
VARIANTS = {
    ("lecture", "digits"): dict(epochs=42),  # as many steps as one epoch of MNIST
    ("best", "digits"): dict(epochs=60, batch_size=64, val_size=0),
    ("best", "folder"): dict(batch_size=64, val_size=0),
    ("best", "mlp"): dict(epochs=60),
    ("best", "resnet"): dict(batch_norm=False, elastic=1.5),  # its batch norm is not optional
    ("best", "maxout"): dict(batch_norm=False, black=0.0),
    ("paper", "digits"): dict(val_size=137),
}

# What the loss compares: logits [N, classes] and target probabilities [N, classes] (one-hot labels, perhaps smoothed).
LOSSES = {
    "cross-entropy": F.cross_entropy,  # L = -sum_k t_k log Z_k, with Z = softmax(logits)
    # L = -sum_k t_k log p_k + (1 - t_k) log(1 - p_k), with p = sigmoid(logits)
    "bce": lambda logits, t: F.binary_cross_entropy_with_logits(logits, t, reduction="sum") / len(t),
    "mse": lambda logits, t: F.mse_loss(logits.softmax(1), t),  # 1/(MN) sum (t - Z)^2
    "mae": lambda logits, t: F.l1_loss(logits.softmax(1), t),  # 1/(MN) sum |t - Z|
}


def get_args_parser():
    parser = flags.shared_args_parser("train_classifier.py", __doc__.splitlines()[0], RECIPES, DATASETS)
    add, number, on_off = parser.add_argument, flags.number, argparse.BooleanOptionalAction
    add("--model", choices=list(CLASSIFIERS), default="cnn", help="network")
    add("--activation", choices=list(ACTIVATIONS), help="of the hidden layers (None: the network's own, ReLU)")
    add("--batch-norm", action=on_off, default=False, help="CONV-BN-ReLU")
    add("--black", type=number(float, -1, 0), default=-1.0, help="value of a black pixel; a white one is 1")
    add("--loss", choices=list(LOSSES), default="cross-entropy", help="what to minimise")
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="share of the target spread over all classes")
    add("--max-norm", type=number(float, 0), help="largest norm of a linear unit's incoming weights (None: no limit)")
    add("--schedule", choices=["constant", "cosine", "maxout"], default="constant", help="learning rate over time")
    add("--augment", action=on_off, default=False, help="distort each training image differently in every epoch")
    add("--elastic", type=number(float, 0), default=0.0, help="with --augment, also bend the image by so many pixels")
    add("--second-stage", metavar="RUN", help="train on from RUN's best epoch, with its validation split too")
    add("--patience", type=number(int, 1), help="stop after this many epochs without a better validation accuracy")
    return parser


def build(args, device, batches):
    """The objects to train, by name, the step that trains them, and the network that is the result."""
    try:
        model = build_classifier(args.model, args.activation, args.batch_norm, len(args.classes))
    except ValueError as error:
        raise UserError(error) from error
    model = model.to(device)
    if args.amp:
        model = model.to(memory_format=torch.channels_last)  # in which bfloat16 convolutions are faster
    optimizer = optim.build_optimizer(args, model.parameters())
    state = optim.training_state(args, model, optimizer, len(batches))
    loss_of = LOSSES[args.loss]
    targets = target_probabilities(args, device)

    def train_step(images, labels):
        if args.augment:
            images = distort(images, elastic=args.elastic)
        logits = model(images)  # forward path
        loss = loss_of(logits, targets[labels])
        optimizer.zero_grad()
        loss.backward()  # backward path: dL/dW
        optimizer.step()  # W = W - lr * dL/dW
        if args.max_norm is not None:
            limit_column_norms(model, args.max_norm)
        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}

    return state, train_step, state["ema"].model if "ema" in state else model


def target_probabilities(args, device):
    """Row t is what the network should say of an image labelled t: one-hot, perhaps smoothed; [classes, classes]."""
    classes = len(args.classes)
    return torch.eye(classes, device=device) * (1 - args.label_smoothing) + args.label_smoothing / classes


def check_network(args, model, batches):
    """Raise UserError unless the network takes these images and gives one logit per class."""
    images, _ = batches.take(torch.arange(2).clamp(max=len(batches.images) - 1))
    try:
        with utils.evaluating(model):
            shape = list(model(images).shape)
    except RuntimeError as error:
        reason = f"cannot read images {list(images.shape)} ({str(error).splitlines()[0]})"
        raise UserError(f"--model {args.model} {reason}; change its layers in models/ or the data set") from error
    classes = len(args.classes)
    if shape != [2, classes]:
        remedy = f"give its last layer {classes} outputs"
        raise UserError(f"--model {args.model} gives {shape} for 2 images, not [2, {classes}] logits; {remedy}")


def loss_with_dropout(args, model, batches):
    """The mean loss over all images of `batches`, with dropout as in training. A copy of `model` computes it."""
    model, targets = copy.deepcopy(model).train(), target_probabilities(args, batches.labels.device)
    with torch.no_grad():
        losses = [
            len(labels) * LOSSES[args.loss](model(images), targets[labels])
            for images, labels in map(batches.take, batches.rows(0))
        ]
    return sum(losses).item() / len(batches.images)


def begin_second_stage(args, state, batches, first_batches):
    """Load RUN's best epoch, and return its loss, with dropout, on the images that it was trained on.

    Goodfellow et al. 2013, section 5.1: the second stage trains on all images, and ends when the loss on the former
    validation split is as low. As in the configuration they released (pylearn2's mnist_pi_continued.yaml), both losses
    have dropout, and the schedule starts from the learning rate that RUN had reached, but keeps the momentum.
    """
    if args.start_from:
        raise UserError("--second-stage starts from the weights of its RUN; omit --start-from")
    first = load_checkpoint(Path(args.second_stage) / "best.pt")
    if args.schedule == "cosine":
        raise UserError("--second-stage: a cosine ends with a learning rate of 0; use --schedule constant in both")
    free = flags.FREE_ON_RESUME | {"second_stage", "recipe", "seed", "patience", "dry_run", "start_from"}
    for name, value in first["options"].items():
        if name not in free and value != getattr(args, name, None):
            reason = f"{args.second_stage} was trained with another --{name.replace('_', '-')}"
            raise UserError(f"--second-stage: {reason}; use the same options for both")
    for name in state.keys() - {"schedule"}:
        state[name].load_state_dict(first["state"][name])
    if "schedule" in state:
        for group in state["optimizer"].param_groups:
            del group["initial_lr"]
        reached = state["optimizer"].param_groups[0].get("momentum")
        state["schedule"] = optim.build_schedule(args, state["optimizer"], len(batches), final_momentum=reached)
    return distributed.broadcast(lambda: loss_with_dropout(args, state["model"], first_batches))


def main(argv=None):
    args = flags.parse_args(get_args_parser(), RECIPES, VARIANTS, argv)
    device = pick_device(args.device, args.amp)
    torch.manual_seed(args.seed)

    args.classes = distributed.broadcast(lambda: class_names(args.dataset, args.data_dir, args.resume and args.classes))
    everything = distributed.rank_0_first(lambda: load(args.dataset, args.data_dir))
    train_set, val_set = hold_out(*everything, args.val_size)
    batches = Batches(
        *(everything if args.second_stage else train_set), args.batch_size, device, black=args.black, seed=args.seed
    )
    val_batches = Batches(*val_set, 1000, device, black=args.black, shuffle=False)
    if args.patience and not args.val_size:
        raise UserError("--patience needs a validation split to watch; add --val-size N")
    state, train_step, network = build(args, device, batches)
    check_network(args, network, batches)
    refuse_lone_images(args, network, len(batches.images))

    def validate():
        if not args.val_size:
            return {}
        logits, labels = utils.predict(network, val_batches)
        loss = LOSSES[args.loss](logits, target_probabilities(args, device)[labels])
        row = {"val_loss": loss.item(), "val_accuracy": (logits.argmax(1) == labels).float().mean().item()}
        if args.second_stage:
            row["val_loss_with_dropout"] = loss_with_dropout(args, state["model"], val_batches)
        return row

    score, should_stop = "val_accuracy", None
    if args.second_stage:
        if not args.resume:
            first_batches = Batches(*train_set, 1000, device, black=args.black, shuffle=False)
            args.goal = begin_second_stage(args, state, batches, first_batches)
        print(f"second stage: until val_loss_with_dropout is at most {args.goal:.4g}, the first stage's on its images")
        score, should_stop = None, lambda row: row["val_loss_with_dropout"] <= args.goal  # the last epoch is the result
    elif args.patience:
        should_stop = lambda row: row["epoch"] - run.best_epoch(score) >= args.patience  # noqa: E731
    run = utils.Run(args, state, name=f"{args.model}-{short_name(args.dataset)}")
    return utils.train(run, train_step, batches, validate, score, should_stop=should_stop)


def refuse_lone_images(args, network, count):
    """Batch norm of a linear layer cannot train on one image. Raises UserError if a rank would get a batch of one."""
    sizes = {min(args.batch_size, count), count % args.batch_size}
    needs_several = any(isinstance(layer, torch.nn.BatchNorm1d) for layer in network.modules())
    if needs_several and any(size // distributed.world_size() == 1 for size in sizes):
        raise UserError(f"batch norm: one of {count} images would form a batch by itself; change --batch-size")


if __name__ == "__main__":
    run_script(main)
