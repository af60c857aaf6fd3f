"""Train a generator to draw the digit that it is asked for (Mirza & Osindero 2014; slide "Conditional GAN").

python train_cgan.py                                  # the lecture's recipe on MNIST
python train_cgan.py --dataset digits --recipe best   # without a download
python train_cgan.py --recipe paper                   # the paper's recipe
python train_cgan.py --resume runs/cgan-mnist         # go on where it stopped
"""

import torch
import torch.nn.functional as F

import utils
from datasets import DATASETS, SHOW_DIGITS, Batches, hold_out, load
from models.average import Average
from models.cgan import ConditionalDiscriminator, ConditionalGenerator
from models.gan import draw_noise, r1_penalty, set_first_weights
from models.judge import failure_signs, load_judge
from models.maxout import MaxoutSchedule
from models.parzen import SIGMAS, parzen_log_likelihood

RECIPES = {
    # 25 epochs on all 60,000 images; the lecture's published scripts.
    "lecture": dict(epochs=25, batch_size=16, optimizer="adam", lr=2e-4, betas=[0.5, 0.9], val_size=0),
    # What drew the digits that it was asked for, in all their shapes.
    "best": dict(
        noise="centred", init="he", epochs=100, batch_size=200, optimizer="adam", lr=1e-3, betas=[0.0, 0.9], val_size=0,
        r1=0.5, mismatched=0.1, dropout_g=0.0, dropout_d=0.2, average=0.9999,
    ),
    # Mirza & Osindero 2014, section 4.1: networks, batch, SGD and its schedule. The rest is ours, to hold D back: G's
    # first weights, centred z, R1, less dropout than their .5, the averaged weights.
    "paper": dict(
        noise="centred", init="he", epochs=100, batch_size=100, optimizer="sgd", lr=0.1, momentum=0.5,
        schedule="maxout", simultaneous=True, val_size=10_000, r1=0.5, dropout_g=0.0, dropout_d=0.2, average=0.9999,
    ),
}  # fmt: skip
VARIANTS = {
    ("best", "digits"): dict(epochs=500),
    ("paper", "digits"): dict(val_size=137),
}


def get_args_parser():
    parser = utils.adversarial_args_parser("train_cgan.py", __doc__.splitlines()[0], RECIPES, DATASETS)
    share = utils.number(float, 0, 0.99)
    parser.add_argument("--dropout-g", type=share, default=0.5, help="share of G's hidden units dropped")
    parser.add_argument("--dropout-d", type=share, default=0.5, help="share of D's hidden units dropped")
    parser.add_argument(
        "--mismatched", type=share, default=0.0, help="weight of real images with wrong labels as fakes"
    )
    return parser


def build(args, device, epoch_length, pixel_means):
    """The objects to train, by name, the step that trains them, and the generator that draws the samples."""
    generator = ConditionalGenerator(args.dropout_g).to(device)
    discriminator = ConditionalDiscriminator(args.dropout_d).to(device)
    set_first_weights(generator, discriminator, args.init, pixel_means)
    optimizer_g = utils.build_optimizer(args, generator.parameters())
    optimizer_d = utils.build_optimizer(args, discriminator.parameters())
    state = {
        "generator": generator, "discriminator": discriminator, "optimizer_g": optimizer_g, "optimizer_d": optimizer_d,
    }  # fmt: skip
    if args.schedule == "maxout":
        state["schedule_g"] = MaxoutSchedule(optimizer_g, 1.00004, epoch_length)
        state["schedule_d"] = MaxoutSchedule(optimizer_d, 1.00004, epoch_length)
    if args.average is not None:
        state["average"] = Average(generator, args.average)

    def train_step(images, labels):
        fakes = generator(draw_noise(len(images), args.noise, device), labels)  # G(z|y)

        # (1) update D: maximise log D(x|y) + log(1 - D(G(z|y)|y)); with logits l, -log D = softplus(-l), never infinite
        shown = [(images, labels), (fakes.detach(), labels)]
        if args.mismatched:
            shown.append((images, (labels + torch.randint_like(labels, 1, 10)) % 10))
        real, fake, *mismatched = discriminator(*map(torch.cat, zip(*shown))).float().split(len(images))
        loss_d = F.softplus(-real).mean() + (1 - args.mismatched) * F.softplus(fake).mean()
        for logits in mismatched:  # log(1 - D(x|a wrong y)), so that G keeps away from what could be another digit
            loss_d = loss_d + args.mismatched * F.softplus(logits).mean()
        penalty = args.r1 / 2 * r1_penalty(discriminator, images, labels) if args.r1 else 0
        optimizer_d.zero_grad()
        (loss_d / 2 + penalty).backward()  # loss_d / 2: the mean of the two halves, as the paper's SGD has it
        if not args.simultaneous:
            optimizer_d.step()

        # (2) update G: maximise log D(G(z|y)|y), or minimise log(1 - D(G(z|y)|y)), which saturates
        discriminator.requires_grad_(False)  # only G learns here
        logits = discriminator(fakes, labels).float()
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
    run = utils.Run(args, state, name=f"cgan-{args.dataset}")
    # A thousand z, each under all ten digits.
    noise = draw_noise(1000, args.noise, "cpu", torch.Generator().manual_seed(args.seed)).to(device)
    noise = noise.repeat_interleave(10, dim=0)
    digits = torch.arange(10, device=device).repeat(1000)
    judge = load_judge(device) if args.dataset in SHOW_DIGITS else None

    def validate():
        with utils.evaluating(sampler):
            densities = parzen_log_likelihood(sampler(noise, digits), val_images, SIGMAS)
        return {"val_log_likelihood": densities.mean(1).max().item()}

    def watch(row):
        with utils.evaluating(sampler):
            samples = sampler(noise[:1000], digits[:1000])
        rows = samples[:100].view(10, 10, 1, 28, 28).transpose(0, 1).flatten(0, 1)  # one row per digit
        utils.save_grid(rows, run.folder / "samples" / f"epoch-{row['epoch']:04d}.png", columns=10)
        seen = judge.look(samples)[1] if judge else None
        for sign in failure_signs(row, seen, digits[:1000].cpu()):
            print(f"warning: {sign}")

    try:
        utils.train(run, train_step, batches, validate if args.val_size else None, "val_log_likelihood", watch)
    finally:
        utils.save_gif(run.folder)
    print(f"now measure it: python evaluate.py {run.folder}")


if __name__ == "__main__":
    utils.run_script(main)
