"""The second stage of `train_classifier.py --recipe paper` (Goodfellow et al. 2013, section 5.1).

python train_classifier.py --recipe paper --output-dir runs/first
python benchmarks/maxout_paper.py --first-stage runs/first --output-dir runs/second

It continues from the first stage's best epoch on all images, and ends when the loss on the former validation split is
as low as the first stage's on its training images. As in the configuration that the authors released (pylearn2's
mnist_pi_continued.yaml), both losses have dropout, and the schedule starts from the learning rate that the first stage
had reached, but keeps the momentum. The last epoch is the result.
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_classifier
import utils
from datasets import Batches, class_names, hold_out, load
from engine import flags, optim
from engine.checkpoint import load_checkpoint
from engine.errors import UserError, run_script
from measures.trained import check_rebuilt

RECIPES, VARIANTS = train_classifier.RECIPES, train_classifier.VARIANTS


def get_args_parser() -> flags.ArgumentParser:
    parser = train_classifier.get_args_parser()
    parser.prog = "benchmarks/maxout_paper.py"
    parser.describe(__doc__)
    parser.set_defaults(script=parser.prog, kind="classifier", recipe="paper")
    parser.add_argument("--first-stage", metavar="RUN", type=flags.run_folder, help="run of the recipe paper")
    return parser


def begin(args: argparse.Namespace, state: dict[str, Any], epoch_length: int) -> None:
    """Load the best epoch of --first-stage, with a schedule that starts from its learning rate. Raises UserError."""
    if not args.first_stage:
        raise UserError("the first stage is missing; add --first-stage RUN, of train_classifier.py --recipe paper")
    first = load_checkpoint(Path(args.first_stage) / "best.pt")
    if first["options"].get("schedule") != "maxout" or first["options"]["kind"] != args.kind:
        raise UserError(f"{args.first_stage} is not a first stage; train one with train_classifier.py --recipe paper")
    for name in ("model", "dataset", "val_size", "batch_size", "black", "optimizer"):
        if first["options"].get(name) != getattr(args, name):
            raise UserError(f"{args.first_stage} was trained with another {name}; use the same here")
    for name in ("model", "optimizer"):
        state[name].load_state_dict(first["state"][name])
    if "ema" in state:
        state["ema"].model.load_state_dict(first["state"]["model"])
    (group,) = state["optimizer"].param_groups
    del group["initial_lr"]
    state["schedule"] = optim.build_schedule(args, state["optimizer"], epoch_length, final_momentum=group["momentum"])


def loss_with_dropout(model: torch.nn.Module, batches: Batches) -> float:
    """The mean cross-entropy over all images of `batches`, with dropout as in training. `model` is not changed."""
    model, total = copy.deepcopy(model).train(), torch.zeros(())
    with torch.no_grad():
        for images, labels in map(batches.take, batches.rows(0)):
            total = total + torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
    return float(total) / len(batches.images)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, device = flags.start(get_args_parser(), RECIPES, VARIANTS, argv)
    args.classes = class_names(args.dataset, args.data_dir)
    images = load(args.dataset, args.data_dir)
    parts = [Batches(*part, 1000, device, args.black, shuffle=False) for part in hold_out(*images, args.val_size)]
    first_batches, val_batches = parts
    batches = Batches(*images, args.batch_size, device, args.black, seed=args.seed)
    state, train_step, network = train_classifier.build(args, device, batches)
    if not args.resume:
        begin(args, state, len(batches))
        args.goal = loss_with_dropout(network, first_batches)

    def validate():
        logits, labels = utils.predict(network, val_batches)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"val_accuracy": accuracy, "val_loss_with_dropout": loss_with_dropout(network, val_batches)}

    def should_stop(row):
        return row["val_loss_with_dropout"] <= args.goal

    print(f"until val_loss_with_dropout is at most {args.goal:.4g}, the first stage's on its training images")
    run = utils.Run(args, state, name="maxout-paper")
    check = partial(check_rebuilt, run, network, batches)
    return utils.train(run, train_step, batches, validate, should_stop=should_stop, check=check)


if __name__ == "__main__":
    run_script(main)
