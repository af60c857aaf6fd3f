"""Train the lecture's MLP or CNN, or the Maxout network, to read digits.

python train_classifier.py --dataset digits --recipe best      # a minute, no network
python train_classifier.py --model mlp                         # the lecture's recipe on MNIST
python train_classifier.py --recipe paper                      # Maxout, Goodfellow et al. 2013: first stage
python train_classifier.py --recipe paper --second-stage runs/maxout-mnist
python train_classifier.py --resume runs/mlp-mnist             # go on where it stopped
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from datasets import DATASETS, Batches, distort, hold_out, load
from models import ACTIVATIONS, CLASSIFIERS, build_classifier
from models.average import Average
from models.maxout import MaxoutSchedule, limit_column_norms

RECIPES = {
    # One epoch on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=1, batch_size=32, optimizer="adam", lr=2e-4, betas=[0.5, 0.99], val_size=0),
    # What scored best on the held-out 5,000 images.
    "best": dict(
        epochs=30, batch_size=128, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine",
        label_smoothing=0.1, augment=True, average=0.999, batch_norm=True,
    ),
    # 99.0 % in the shortest time.
    "fast": dict(
        model="cnn", epochs=1, batch_size=128, optimizer="adamw", lr=1e-2, weight_decay=0.05, schedule="cosine",
        label_smoothing=0.1, average=0.99, batch_norm=True, val_size=0,
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
    ("best", "mlp"): dict(epochs=60),
    ("best", "maxout"): dict(batch_norm=False, black=0.0),
    ("paper", "digits"): dict(val_size=137),
}

# What the loss compares: logits [N, 10] and target probabilities [N, 10] (one-hot labels, perhaps smoothed).
LOSSES = {
    "cross-entropy": F.cross_entropy,  # L = -sum_k t_k log Z_k, with Z = softmax(logits)
    # L = -sum_k t_k log p_k + (1 - t_k) log(1 - p_k), with p = sigmoid(logits)
    "bce": lambda logits, t: F.binary_cross_entropy_with_logits(logits, t, reduction="sum") / len(t),
    "mse": lambda logits, t: F.mse_loss(logits.softmax(1), t),  # 1/(MN) sum (t - Z)^2
    "mae": lambda logits, t: F.l1_loss(logits.softmax(1), t),  # 1/(MN) sum |t - Z|
}


def get_args_parser():
    number = utils.number
    parser = utils.shared_args_parser("train_classifier.py", __doc__.splitlines()[0], RECIPES, DATASETS)
    add = parser.add_argument
    add("--model", choices=list(CLASSIFIERS), default="cnn", help="network")
    add("--activation", choices=list(ACTIVATIONS), help="of the hidden layers (None: the network's own, ReLU)")
    add("--batch-norm", action=argparse.BooleanOptionalAction, default=False, help="CONV-BN-ReLU")
    add("--black", type=number(float, -1, 0), default=-1.0, help="value of a black pixel; a white one is 1")
    add("--loss", choices=list(LOSSES), default="cross-entropy", help="what to minimise")
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="share of the target spread over all classes")
    add("--max-norm", type=number(float, 0), help="largest norm of a linear unit's incoming weights (None: no limit)")
    add("--schedule", choices=["constant", "cosine", "maxout"], default="constant", help="learning rate over time")
    add("--augment", action=argparse.BooleanOptionalAction, default=False, help="distort each training image anew")
    add("--average", type=number(float, 0, 1), help="decay per step of averaged weights, which are then the result")
    add("--second-stage", metavar="RUN", help="go on from RUN's best epoch with the held-out images too")
    add("--patience", type=number(int, 1), help="stop after so many epochs without a better validation accuracy")
    return parser


def build_schedule(args, optimizer, epoch_length):
    steps = args.epochs * epoch_length
    warmup = steps // 10

    def cosine(step):  # share of --lr: up in a straight line over the first tenth, down to 0 in half a cosine
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup) / (steps - warmup)))

    if args.schedule == "cosine":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    if args.schedule == "maxout":
        return MaxoutSchedule(optimizer, 1.000004, epoch_length)
    return None


def build(args, device, epoch_length):
    """The objects to train, by name, the step that trains them, and the network that is the result."""
    try:
        model = build_classifier(args.model, args.activation, args.batch_norm)
    except ValueError as error:
        raise utils.UserError(error) from error
    model = model.to(device)
    if args.amp:
        model = model.to(memory_format=torch.channels_last)  # in which bfloat16 convolutions are faster
    optimizer = utils.build_optimizer(args, model.parameters())
    state = {"model": model, "optimizer": optimizer}
    if schedule := build_schedule(args, optimizer, epoch_length):
        state["schedule"] = schedule
    if args.average is not None:
        state["average"] = Average(model, args.average)
    loss_of = LOSSES[args.loss]
    targets = target_probabilities(args, device)

    def train_step(images, labels):
        if args.augment:
            images = distort(images)
        logits = model(images)  # forward path
        loss = loss_of(logits, targets[labels])
        optimizer.zero_grad()
        loss.backward()  # backward path: dL/dW
        optimizer.step()  # W = W - lr * dL/dW
        if args.max_norm is not None:
            limit_column_norms(model, args.max_norm)
        if args.average is not None:
            state["average"].update(model)
        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}

    return state, train_step, state["average"].model if args.average is not None else model


def begin_second_stage(args, state, network, loss_of, batches):
    """Load what --second-stage had at its best epoch, and return its loss on the images that it was trained on.

    Goodfellow et al. 2013, section 5.1: the second stage ends when the images once held out are learnt as well.
    """
    first = utils.load_checkpoint(Path(args.second_stage) / "best.pt")
    if args.schedule == "cosine":
        raise utils.UserError("--second-stage: a cosine ends at a learning rate of 0; use --schedule constant in both")
    free = utils.FREE_ON_RESUME | {"second_stage", "recipe", "seed", "patience", "dry_run"}
    for name, value in first["options"].items():
        if name not in free and value != getattr(args, name, None):
            reason = f"{args.second_stage} was trained with another --{name.replace('_', '-')}"
            raise utils.UserError(f"--second-stage: {reason}; give both the same options")
    for name, item in state.items():
        item.load_state_dict(first["state"][name])
    logits, labels = utils.predict(network, batches)
    return loss_of(logits, target_probabilities(args, logits.device)[labels]).item()


def target_probabilities(args, device):
    """Row t is what the loss wants the network to say of label t: one-hot, perhaps smoothed; [10, 10]."""
    return torch.eye(10, device=device) * (1 - args.label_smoothing) + args.label_smoothing / 10


def main(argv=None):
    args = utils.parse_args(get_args_parser(), RECIPES, VARIANTS, argv)
    device = utils.pick_device(args.device)
    torch.manual_seed(args.seed)

    everything = load(args.dataset, args.data_dir, train=True)
    first_set, val_set = hold_out(*everything, args.val_size)
    train_set = everything if args.second_stage else first_set
    count = len(train_set[0])
    sizes = {min(args.batch_size, count), count % args.batch_size}  # of the batches; each process takes its part
    if args.batch_norm and any(size // utils.world_size() == 1 for size in sizes):
        raise utils.UserError(f"--batch-norm: one of {count} images would be a batch alone; change --batch-size")
    if args.patience and not args.val_size:
        raise utils.UserError("--patience needs held-out images to watch; add --val-size N")
    batches = Batches(*train_set, args.batch_size, device, low=args.black, seed=args.seed)
    held_out = Batches(*val_set, 1000, device, low=args.black, shuffle=False)
    state, train_step, network = build(args, device, len(batches))

    def validate():
        logits, labels = utils.predict(network, held_out)
        loss = LOSSES[args.loss](logits, target_probabilities(args, device)[labels])
        return {"val_loss": loss.item(), "val_accuracy": (logits.argmax(1) == labels).float().mean().item()}

    options = {}
    if args.second_stage:
        seen = Batches(*first_set, 1000, device, low=args.black, shuffle=False)
        if not args.resume:
            args.goal = begin_second_stage(args, state, network, LOSSES[args.loss], seen)
        print(f"second stage: until val_loss is at most {args.goal:.4g}, the first one's loss on its training images")
        options = {"score": None, "enough": lambda row: row["val_loss"] <= args.goal}  # the last epoch is the result
    elif args.patience:
        options = {"enough": lambda row: row["epoch"] - run.best_epoch("val_accuracy") >= args.patience}
    run = utils.Run(args, state, name=f"{args.model}-{args.dataset}")
    utils.train(run, train_step, batches, validate if args.val_size else None, **options)
    print(f"now measure it: python evaluate.py {run.folder}")


if __name__ == "__main__":
    utils.run_script(main)
