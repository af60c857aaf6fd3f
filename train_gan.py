"""Train a generator against a discriminator to draw digits (Goodfellow et al. 2014; slides "GAN").

python train_gan.py                                   # the lecture's recipe on MNIST
python train_gan.py --dataset digits --recipe best    # without a download
python train_gan.py --recipe paper                    # the paper's larger networks
python train_gan.py --resume runs/gan-mnist           # go on where it stopped
"""

import torch
import torch.nn.functional as F

import utils
from datasets import DATASETS, SHOW_DIGITS, Batches, hold_out, load
from models import GANS
from models.average import Average
from models.gan import draw_noise, r1_penalty, set_first_weights
from models.judge import failure_signs, load_judge
from models.maxout import MaxoutSchedule
from models.parzen import SIGMAS, parzen_log_likelihood

RECIPES = {
    # 25 epochs on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=25, batch_size=16, optimizer="adam", lr=2e-4, betas=[0.5, 0.9], val_size=0),
    # What drew all digits on the lecture's networks.
    "best": dict(
        noise="centred", init="he", epochs=50, batch_size=128, optimizer="adam", lr=2e-3, betas=[0.0, 0.9],
        r1=0.5, val_size=0, average=0.9999,
    ),
    # Goodfellow et al. 2014, from the configuration they released; the averaged weights are ours.
    "paper": dict(
        networks="paper", noise="centred", init="paper", epochs=500, batch_size=100, optimizer="sgd", lr=0.1,
        momentum=0.5, schedule="maxout", simultaneous=True, val_size=10_000, average=0.9999,
    ),
}  # fmt: skip
VARIANTS = {
    ("best", "digits"): dict(epochs=500, val_size=0),
    ("best", "large"): dict(epochs=60, batch_size=200, lr=1e-3, r1=0.3, average=0.9998, val_size=10_000),
    ("paper", "digits"): dict(val_size=137),
}


def get_args_parser():
    parser = utils.adversarial_args_parser("train_gan.py", __doc__.splitlines()[0], RECIPES, DATASETS)
    parser.add_argument("--networks", choices=list(GANS), default="lecture", help="whose generator and discriminator")
    return parser


def build(args, device, epoch_length, pixel_means):
    """The objects to train, by name, the step that trains them, and the generator that draws the samples."""
    generator, discriminator = (network().to(device) for network in GANS[args.networks])
    set_first_weights(generator, discriminator, args.init, pixel_means)
    optimizer_g = utils.build_optimizer(args, generator.parameters())
    optimizer_d = utils.build_optimizer(args, discriminator.parameters())
    state = {
        "generator": generator, "discriminator": discriminator, "optimizer_g": optimizer_g, "optimizer_d": optimizer_d,
    }  # fmt: skip
    if args.schedule == "maxout":
        state["schedule_g"] = MaxoutSchedule(optimizer_g, 1.000004, epoch_length)
        state["schedule_d"] = MaxoutSchedule(optimizer_d, 1.000004, epoch_length)
    if args.average is not None:
        state["average"] = Average(generator, args.average)

    def train_step(images, labels):
        fakes = generator(draw_noise(len(images), args.noise, device))  # G(z)

        # (1) update D: maximise log D(x) + log(1 - D(G(z))); with logits l, -log D = softplus(-l), never infinite
        real, fake = discriminator(torch.cat([images, fakes.detach()])).float().chunk(2)
        loss_d = F.softplus(-real).mean() + F.softplus(fake).mean()
        penalty = args.r1 / 2 * r1_penalty(discriminator, images) if args.r1 else 0
        optimizer_d.zero_grad()
        (loss_d / 2 + penalty).backward()  # loss_d / 2: the mean of the two halves, as the paper's SGD has it
        if not args.simultaneous:
            optimizer_d.step()

        # (2) update G: maximise log D(G(z)), or minimise log(1 - D(G(z))), which saturates
        discriminator.requires_grad_(False)  # only G learns here
        logits = discriminator(fakes).float()
        loss_g = F.softplus(-logits).mean() if args.generator_loss == "non-saturating" else -F.softplus(logits).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        discriminator.requires_grad_(True)

        if args.simultaneous:
            optimizer_d.step()
        if args.average is not None:
            state["average"].update(generator)
        return {
            "loss_d": loss_d.detach(),
            "loss_g": loss_g.detach(),
            "D(x)": real.detach().sigmoid().mean(),
            "D(G(z))": fake.detach().sigmoid().mean(),
        }

    return state, train_step, state["average"].model if args.average is not None else generator


def main(argv=None):
    args = utils.parse_args(get_args_parser(), RECIPES, VARIANTS, argv)
    device = utils.pick_device(args.device)
    torch.manual_seed(args.seed)

    train_set, (val_images, _) = hold_out(*load(args.dataset, args.data_dir, train=True), args.val_size)
    batches = Batches(*train_set, args.batch_size, device, low=0.0, seed=args.seed)
    val_images = val_images[:1000].to(device) / 255
    pixel_means = train_set[0].float().mean(0).flatten() / 255
    state, train_step, sampler = build(args, device, len(batches), pixel_means)
    run = utils.Run(args, state, name=f"gan-{args.dataset}")
    noise = draw_noise(10_000, args.noise, "cpu", torch.Generator().manual_seed(args.seed)).to(device)

    judge = load_judge(device) if args.dataset in SHOW_DIGITS else None

    def validate():
        with utils.evaluating(sampler):
            densities = parzen_log_likelihood(sampler(noise), val_images, SIGMAS)
        return {"val_log_likelihood": densities.mean(1).max().item()}

    def watch(row):
        with utils.evaluating(sampler):
            samples = sampler(noise[:1000])
        utils.save_grid(samples[:100], run.folder / "samples" / f"epoch-{row['epoch']:04d}.png", columns=10)
        for sign in failure_signs(row, judge.look(samples)[1] if judge else None):
            print(f"warning: {sign}")

    try:
        utils.train(run, train_step, batches, validate if args.val_size else None, "val_log_likelihood", watch)
    finally:
        utils.save_gif(run.folder)
    print(f"now measure it: python evaluate.py {run.folder}")


if __name__ == "__main__":
    utils.run_script(main)
