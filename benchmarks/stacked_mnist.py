"""Which of 1,000 modes does a GAN reach? Stacked MNIST: each image has three digits, one in each channel.

python benchmarks/stacked_mnist.py --data-dir data --seeds 5
python benchmarks/stacked_mnist.py --data-dir data --only relativistic --seeds 1 --epochs 1    # one way alone

Metz et al. 2017 (arXiv 1611.02163, section 3.3.1). The modes are the numbers 0 to 999. The reference classifier reads
the three digits of 26,000 samples: a mode is reached if one sample shows it. Each MNIST image is three times in the
60,000 training images. The networks are those of `train_gan.py --networks large` with three channels, trained by its
train_step; `best` and `relativistic` have their settings, but --r1 0.3. The same command resumes what was interrupted,
in --output-dir.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import train_gan
import utils
from compare import mean_sd
from datasets import Batches, load
from engine import flags
from engine.device import pick_device
from engine.errors import run_script
from measures.generator import class_measures
from measures.reference import load_reference
from measures.samples import decode, latent_noise
from models import GANS
from models.gan import LargeDiscriminator, PaperGenerator
from models.maxout import Maxout

SAMPLES = 26_000
VARIANTS = {**train_gan.VARIANTS, ("best", "stacked"): {**train_gan.VARIANTS["best", "large"], "r1": 0.3}}
WAYS = {
    "lecture": "--recipe lecture --batch-size 128 --amp --compile",
    "best": "--recipe best --amp --compile",
    "relativistic": "--recipe best --loss relativistic --amp --compile",
}


class StackedGenerator(PaperGenerator):
    """100-1200-1200-2352. Input: noise z [N, 100]. Output: images [N, 3, 28, 28] with pixels in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.model[-2] = nn.Linear(1200, 3 * 28 * 28)

    def forward(self, z):
        return self.model(z).view(-1, 3, 28, 28)


class StackedDiscriminator(LargeDiscriminator):
    """Maxout 240 x 5, maxout 240 x 5, one logit. Input: images [N, 3, 28, 28]. Output: logits [N, 1]."""

    def __init__(self):
        super().__init__()
        self.model[0] = Maxout(3 * 28 * 28, 240, k=5, dropout=False)


def stack(images: torch.Tensor, labels: torch.Tensor, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n images [n, 3, 28, 28] of three digits each, and the numbers [n] that they show."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(images), generator=generator)[:n] for _ in range(3)]
    numbers = sum(10**place * labels[order] for place, order in zip((2, 1, 0), orders))
    return torch.cat([images[order] for order in orders], dim=1), numbers


def read_numbers(reference: Any, images: torch.Tensor) -> torch.Tensor:
    """The numbers [N] that the reference classifier reads in images [N, 3, 28, 28] with pixels in [0, 1]."""
    return reference.read(images.flatten(0, 1)[:, None])[1].view(-1, 3) @ torch.tensor([100, 10, 1])


def mode_measures(numbers: torch.Tensor) -> dict[str, float]:
    """How many of the numbers 0 to 999 appear in `numbers`, int64 [N]; KL(their frequencies || equal ones) in nats."""
    measures = class_measures(numbers, 1000)
    return {"modes": sum(frequency > 0 for frequency in measures["class_histogram"]), "kl": measures["class_kl"]}


def train(way: str, seed: int, options: argparse.Namespace) -> tuple[nn.Module, float]:
    """Train one seed, or what is left of it; returns the generator and the seconds of training."""
    folder = Path(options.output_dir) / f"{way}-{options.epochs}-epochs-{seed}"
    parser = train_gan.get_args_parser()
    parser.prog = "benchmarks/stacked_mnist.py"
    parser.set_defaults(script=parser.prog, kind="stacked-gan")  # which evaluate.py does not know
    shared = ["--networks", "stacked", "--val-size", "0", "--data-dir", options.data_dir, "--device", options.device]
    shared += ["--epochs", str(options.epochs), "--seed", str(seed), "--auto-resume", "--output-dir", str(folder)]
    args = flags.parse_args(parser, train_gan.RECIPES, VARIANTS, [*WAYS[way].split(), *shared])
    device = pick_device(args.device, args.amp)
    torch.manual_seed(args.seed)
    images, labels = load("mnist", args.data_dir)
    batches = Batches(*stack(images, labels, len(images), args.seed), args.batch_size, device, 0.0, seed=args.seed)
    state, train_step, generator = train_gan.build(args, device, batches)
    z = latent_noise(generator, 100, seed)

    def sample_numbers():  # the three digits of a sample side by side
        with utils.evaluating(generator):
            return decode(generator, z).transpose(1, 2).flatten(2)[:, None]

    run = utils.Run(args, state)
    utils.train(run, train_step, batches, sample=sample_numbers)
    return generator.eval(), sum(run.seconds)


def main(argv: list[str] | None = None) -> None:
    parser = flags.ArgumentParser("stacked_mnist.py", __doc__)
    add, positive = parser.add_argument, flags.number(int, 1)
    add("--data-dir", default="data", help="folder that holds MNIST")
    add("--device", default="cpu", help="where to train")
    add("--epochs", type=positive, default=25, help="per run")
    add("--seeds", type=positive, default=5, help="number of seeds")
    add("--only", choices=list(WAYS), help="train this way alone")
    add("--output-dir", default="runs/stacked-mnist", help="folder of the runs")
    options = parser.parse_args(argv)
    GANS["stacked"] = (StackedGenerator, StackedDiscriminator)

    reference = load_reference("cpu")
    rows: dict[str, list[dict[str, float]]] = {}
    for way in [options.only] if options.only else WAYS:
        rows[way] = []
        for seed in range(options.seeds):
            generator, seconds = train(way, seed, options)
            samples = decode(generator, latent_noise(generator, SAMPLES, seed))
            rows[way].append({**mode_measures(read_numbers(reference, samples)), "minutes": seconds / 60})
            print(f"{way}, seed {seed}: {rows[way][-1]}", flush=True)
    real, _ = stack(*load("mnist", options.data_dir), SAMPLES, 0)
    rows["real images"] = [mode_measures(read_numbers(reference, real / 255))]
    for way, seeds in rows.items():
        print(way, *(f"{name} {mean_sd(name, [seed[name] for seed in seeds])}" for name in seeds[0]), sep="  ")


if __name__ == "__main__":
    run_script(main)
