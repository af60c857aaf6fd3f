"""Train a generator against a discriminator (Goodfellow et al. 2014; slides "GAN").

python train_gan.py                                   # the lecture's recipe on MNIST
python train_gan.py --dataset digits --recipe best    # without a download
python train_gan.py --recipe paper                    # the paper's larger networks
python train_gan.py --resume runs/gan-mnist           # continue where it stopped
"""

import engine  # noqa: F401, I001 (before torch, so that Ctrl-C during its import prints one line)
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import utils
from datasets import DATASETS, SHOW_DIGITS, Batches, short_name, split
from engine import errors, flags, optim
from engine.adversarial import LOSSES, adversarial_parser, init_weights, learning, logits_of, r1_penalty
from measures.trained import check_rebuilt
from measures.watch import Watch
from models import GANS

RECIPES = {
    # 25 epochs on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=25, batch_size=16, optimizer="adam", lr=2e-4, betas=[0.5, 0.9], val_size=0),
    # The recipe with which the lecture's networks generate all digits.
    "best": dict(
        noise="centred", init="he", r1=0.5, epochs=50, batch_size=128, lr=2e-3, betas=[0.0, 0.9], ema=0.9999, val_size=0
    ),
    # Goodfellow et al. 2014, from the configuration they released; the EMA is ours.
    "paper": dict(
        networks="paper", noise="centred", init="paper", epochs=500, batch_size=100, optimizer="sgd", lr=0.1,
        momentum=0.5, schedule="maxout", simultaneous=True, val_size=10_000, ema=0.9999,
    ),
}  # fmt: skip
VARIANTS: flags.Variants = {
    ("best", "digits"): dict(epochs=500, val_size=0),
    ("best", "folder"): dict(val_size=0),
    ("best", "large"): dict(epochs=60, batch_size=200, lr=1e-3, ema=0.9998, val_size=10_000),
    ("paper", "digits"): dict(val_size=137),
}


def get_args_parser() -> flags.ArgumentParser:
    parser = adversarial_parser("gan", __file__, __doc__, RECIPES, DATASETS)
    add = parser.group("what to train")
    add("--networks", choices=list(GANS), default="lecture", help="sizes of generator and discriminator")
    return parser


def build(args: Namespace, device: torch.device, batches: Any) -> tuple[dict[str, Any], utils.TrainStep, nn.Module]:
    """Return `state` (what to train and to save, by name), the training step, and the generator to evaluate."""
    build_generator, build_discriminator = GANS[args.networks]
    generator: Any = build_generator(noise=args.noise)
    discriminator = build_discriminator()
    init_weights(generator, discriminator, args.init, batches.pixel_means())
    state = optim.adversarial_state(args, generator.to(device), discriminator.to(device), len(batches), decay=1.000004)
    optimizer_g, optimizer_d = state["optimizer_g"], state["optimizer_d"]
    loss_of_d, loss_of_g = LOSSES[args.loss]
    paired = args.loss == "relativistic"  # D compares x with G(z): a logit alone means nothing

    def train_step(images: Tensor, labels: Tensor) -> dict[str, Tensor | float]:  # images [N, 1, 28, 28] in [0, 1]
        fakes = generator(generator.noise(len(images), device=device))  # G(z)

        # (1) update D: maximise log D(x) + log(1 - D(G(z)))
        real, fake = logits_of(discriminator, [images], [fakes.detach()])  # [N, 1] each
        loss_d = loss_of_d(real, fake)
        penalised = [images, fakes.detach()] if paired else [images]
        penalty = args.r1 / 2 * sum(r1_penalty(discriminator, x) for x in penalised) if args.r1 else 0
        optimizer_d.zero_grad()
        (loss_d / 2 + penalty).backward()  # loss_d / 2: the mean over real and fake images, as in the paper's code
        if not args.simultaneous:  # else as in the paper's code: both gradients, then both updates
            optimizer_d.step()

        # (2) update G: maximise log D(G(z)), or minimise log(1 - D(G(z))), which saturates
        logits = discriminator(fakes).float()  # float32, also with --amp
        loss_g = loss_of_g(discriminator(images).float() if paired else real, logits)
        optimizer_g.zero_grad()
        loss_g.backward(inputs=learning(optimizer_g))  # only G learns here
        optimizer_g.step()
        if args.simultaneous:
            optimizer_d.step()
        if paired:
            real, fake = real - fake, fake - real
        d_x, d_g_z = (logits.detach().sigmoid().mean() for logits in (real, fake))
        return {"loss_d": loss_d.detach(), "loss_g": loss_g.detach(), "D(x)": d_x, "D(G(z))": d_g_z}

    return state, train_step, state["ema"].model if "ema" in state else generator


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args, device = flags.start(get_args_parser(), RECIPES, VARIANTS, argv)
    train_set, val_set = split(args)
    batches = Batches(*train_set, args.batch_size, device, black=0.0, seed=args.seed)
    state, train_step, sampler = build(args, device, batches)
    watch = Watch(sampler, val_set[0], args.seed, digits=args.dataset in SHOW_DIGITS and not args.dry_run)
    run = utils.Run(args, state, name=f"gan-{short_name(args.dataset)}")
    check = partial(check_rebuilt, run, sampler, batches)
    return utils.train(
        run, train_step, batches, validate=watch.validate, score="val_log_likelihood",
        sample=watch.grid, after_epoch=watch.warn, check=check,
    )  # fmt: skip


if __name__ == "__main__":
    errors.run_script(main)
