"""Train the slide's other generative models by maximum likelihood (slide "Various generative models").

python train_likelihood.py --model vae                     # variational autoencoder, on MNIST
python train_likelihood.py --model rnn --dataset digits    # recurrent network, without a download
python train_likelihood.py --model rbm                     # restricted Boltzmann machine
python train_likelihood.py --model hmm --states 512        # hidden Markov model
python train_likelihood.py --resume runs/vae-mnist         # continue where it stopped
"""

import engine  # noqa: F401, I001 (before torch, so that Ctrl-C during its import prints one line)
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import utils
from datasets import DATASETS, Batches, binarise, short_name, split
from datasets.binarise import TRAIN_SEED, VALIDATION_SEED
from engine import flags, optim
from engine.errors import UserError, run_script
from measures.samples import watched_generator
from measures.trained import check_rebuilt
from models import LIKELIHOOD_MODELS, build_likelihood_model

RECIPES = {
    "lecture": dict(batch_size=100, schedule="cosine", val_size=0),  # minutes on two CPU cores
    "best": dict(batch_size=100, schedule="cosine", val_size=0),  # longer: see VARIANTS
}
VARIANTS: flags.Variants = {
    ("lecture", "vae"): dict(epochs=50, lr=4e-3),
    ("lecture", "rbm"): dict(epochs=30, optimizer="sgd", lr=0.3, persistent_chains=100, ema=0.999),
    ("lecture", "rnn"): dict(epochs=5, lr=0.012, hidden=128, ema=0.999),
    ("lecture", "hmm"): dict(epochs=4, lr=0.1, states=256),
    ("best", "vae"): dict(epochs=1000, batch_size=50, lr=1e-3, eps=1e-4, ema=0.999),
    ("best", "rbm"): dict(epochs=60, optimizer="sgd", lr=0.2, persistent_chains=100, gibbs_steps=5, ema=0.999),
    ("best", "rnn"): dict(epochs=12, lr=0.01, hidden=256, depth=2, ema=0.999),
    ("best", "hmm"): dict(epochs=8, lr=0.1, states=512),
    ("lecture", "digits"): dict(epochs=100),
    ("best", "digits"): dict(epochs=200),
}


def get_args_parser() -> flags.ArgumentParser:
    parser, number = flags.training_parser("likelihood", __file__, __doc__, RECIPES, DATASETS), flags.number
    add = parser.group("what to train")
    add("--model", choices=list(LIKELIHOOD_MODELS), default="vae", help="network to train")
    add("--hidden", type=number(int, 1), help="hidden units (vae, rbm, rnn)")
    add("--latent", type=number(int, 1), help="dimensions of z; with 2, evaluate.py draws a map of the plane (vae)")
    add("--importance-samples", type=number(int, 1), help="k of the IWAE bound (vae)")
    add("--gibbs-steps", type=number(int, 1), help="k of CD-k (rbm)")
    add("--persistent-chains", type=number(int, 0), help="chains of persistent CD; 0 is CD (rbm)")
    add("--depth", type=number(int, 1), help="layers within a row (rnn)")
    add("--states", type=number(int, 1), help="hidden states (hmm)")
    add = parser.group("on what")
    add("--binarise", choices=["dynamic", "fixed", "none"], default="dynamic", help="in every epoch, once, or never")
    add = parser.group("how to train")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="learning rate over time")
    return parser


def build(args: Namespace, device: torch.device, batches: Any) -> tuple[dict[str, Any], utils.TrainStep, Any]:
    """Return `state` (what to train and to save, by name), the training step, and the network to evaluate."""
    try:
        model: Any = build_likelihood_model(vars(args), batches.pixel_means().cpu()).to(device)
    except ValueError as error:
        raise UserError(error) from error
    scored = ["log_likelihood"] if args.val_size else []
    if missing := [name for name in ("loss", "sample", *scored) if not hasattr(model, name)]:
        raise UserError(f"the model {args.model} lacks {', '.join(missing)}; models/__init__.py says what each is")
    optimizer = optim.build_optimizer(args, model.parameters())
    state = optim.training_state(args, model, optimizer, len(batches))

    def train_step(images: Tensor, labels: Tensor) -> dict[str, Tensor | float]:  # images [N, 1, 28, 28] in [0, 1]
        if args.binarise == "dynamic":
            images = (torch.rand_like(images) < images).float()  # white with probability grey / 255, at each visit
        loss = model.loss(images)  # -log p(x) in nats per image, or what stands for it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return state, train_step, state["ema"].model if "ema" in state else model


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args, device = flags.start(get_args_parser(), RECIPES, VARIANTS, argv)
    (images, labels), (val_images, _) = split(args)
    if args.binarise == "fixed":
        images = binarise(images, TRAIN_SEED)
    batches = Batches(images, labels, args.batch_size, device, black=0.0, seed=args.seed)
    val_images = (binarise(val_images, VALIDATION_SEED) / 255).to(device)
    state, train_step, network = build(args, device, batches)

    def validate() -> dict[str, float]:
        if not args.val_size:
            return {}
        quick = getattr(network, "quick", {})  # less work than for evaluate.py
        return {"val_log_likelihood": network.log_likelihood(val_images, **quick).mean().item()}

    def sample() -> Tensor:
        return network.sample(100, watched_generator(args.seed, device))

    run = utils.Run(args, state, name=f"{args.model}-{short_name(args.dataset)}")
    check = partial(check_rebuilt, run, network, batches)
    return utils.train(run, train_step, batches, validate, score="val_log_likelihood", sample=sample, check=check)


if __name__ == "__main__":
    run_script(main)
