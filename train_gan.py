"""Train a generator against a discriminator to draw digits (Goodfellow et al. 2014; slides "GAN").

python train_gan.py                                   # the lecture's recipe on MNIST
python train_gan.py --dataset digits --recipe best    # without a download
python train_gan.py --recipe paper                    # the paper's larger networks
python train_gan.py --resume runs/gan-mnist           # continue where it stopped
"""

import torch
import torch.nn.functional as F

import utils
from datasets import DATASETS, SHOW_DIGITS, Batches, class_names, hold_out, load, short_name
from engine import distributed, errors, flags, optim
from engine.adversarial import init_weights, r1_penalty
from engine.device import pick_device
from measures.watch import Watch
from models import GANS

RECIPES = {
    # 25 epochs on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=25, batch_size=16, optimizer="adam", lr=2e-4, betas=[0.5, 0.9], val_size=0),
    # What drew all digits on the lecture's networks.
    "best": dict(
        noise="centred", init="he", r1=0.5, epochs=50, batch_size=128, lr=2e-3, betas=[0.0, 0.9], ema=0.9999, val_size=0
    ),
    # Goodfellow et al. 2014, from the configuration they released; the EMA is ours.
    "paper": dict(
        networks="paper", noise="centred", init="paper", epochs=500, batch_size=100, optimizer="sgd", lr=0.1,
        momentum=0.5, schedule="maxout", simultaneous=True, val_size=10_000, ema=0.9999,
    ),
}  # fmt: skip
VARIANTS = {
    ("best", "digits"): dict(epochs=500, val_size=0),
    ("best", "large"): dict(epochs=60, batch_size=200, lr=1e-3, ema=0.9998, val_size=10_000),
    ("paper", "digits"): dict(val_size=137),
}


def get_args_parser():
    parser = flags.adversarial_args_parser("train_gan.py", __doc__.splitlines()[0], RECIPES, DATASETS)
    add = parser.add_argument
    add("--networks", choices=list(GANS), default="lecture", help="whose generator and discriminator")
    add("--adversarial-loss", choices=["gan", "relativistic"], default="gan", help="D judges images, or pairs (R3GAN)")
    return parser


def build(args, device, batches):
    """The objects to train, by name, the step that trains them, and the generator that draws the samples."""
    build_generator, build_discriminator = GANS[args.networks]
    generator, discriminator = build_generator(noise=args.noise), build_discriminator()
    init_weights(generator, discriminator, args.init, batches.pixel_means())
    state = optim.adversarial_state(args, generator.to(device), discriminator.to(device), len(batches), decay=1.000004)
    optimizer_g, optimizer_d = state["optimizer_g"], state["optimizer_d"]
    relativistic = args.adversarial_loss == "relativistic"  # R3GAN (Huang et al. 2024, arXiv 2501.05441)

    def train_step(images, labels):
        fakes = generator(generator.noise(len(images), device=device))  # G(z)

        # (1) update D: maximise log D(x) + log(1 - D(G(z))); with logits l, -log D = softplus(-l), never infinite
        real, fake = discriminator(torch.cat([images, fakes.detach()])).float().chunk(2)
        if relativistic:  # maximise log sigmoid(l(x) - l(G(z))) over pairs: x is more real than G(z)
            loss_d = 2 * F.softplus(fake - real).mean()
        else:
            loss_d = F.softplus(-real).mean() + F.softplus(fake).mean()
        penalised = [images, fakes.detach()] if relativistic else [images]
        penalty = args.r1 / 2 * sum(r1_penalty(discriminator, x) for x in penalised) if args.r1 else 0
        optimizer_d.zero_grad()
        (loss_d / 2 + penalty).backward()  # loss_d / 2: the mean of the two halves, as in the paper's SGD
        if not args.simultaneous:
            optimizer_d.step()

        # (2) update G: maximise log D(G(z)), or minimise log(1 - D(G(z))), which saturates
        discriminator.requires_grad_(False)  # only G learns here
        logits = discriminator(fakes).float()
        if relativistic:  # maximise log sigmoid(l(G(z)) - l(x)): G(z) is more real than x
            loss_g = F.softplus(discriminator(images).float() - logits).mean()
        elif args.generator_loss == "saturating":
            loss_g = -F.softplus(logits).mean()
        else:
            loss_g = F.softplus(-logits).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        discriminator.requires_grad_(True)
        if args.simultaneous:
            optimizer_d.step()
        if relativistic:  # which of a pair is real, because l alone may be shifted by any constant
            real, fake = real - fake, fake - real
        d_x, d_g_z = (logits.detach().sigmoid().mean() for logits in (real, fake))
        return {"loss_d": loss_d.detach(), "loss_g": loss_g.detach(), "D(x)": d_x, "D(G(z))": d_g_z}

    return state, train_step, state["ema"].model if "ema" in state else generator


def main(argv=None):
    args = flags.parse_args(get_args_parser(), RECIPES, VARIANTS, argv)
    if args.adversarial_loss == "relativistic" and args.generator_loss == "saturating":
        raise errors.UserError("--adversarial-loss relativistic sets G's loss too; omit --generator-loss saturating")
    device = pick_device(args.device, args.amp)
    torch.manual_seed(args.seed)
    args.classes = distributed.broadcast(lambda: class_names(args.dataset, args.data_dir, args.resume and args.classes))
    train_set, val_set = hold_out(*distributed.rank_0_first(lambda: load(args.dataset, args.data_dir)), args.val_size)
    batches = Batches(*train_set, args.batch_size, device, black=0.0, seed=args.seed)
    state, train_step, sampler = build(args, device, batches)
    watch = Watch(sampler, val_set[0], args.seed, digits=args.dataset in SHOW_DIGITS)
    run = utils.Run(args, state, name=f"gan-{short_name(args.dataset)}")
    return utils.train(run, train_step, batches, watch.validate, "val_log_likelihood", watch.grid, watch.warn)


if __name__ == "__main__":
    errors.run_script(main)
