"""Which of 1,000 modes does a GAN reach? Stacked MNIST: each image has three digits, one in each channel.

python benchmarks/stacked_mnist.py --data-dir data --seeds 5 --record
python benchmarks/stacked_mnist.py --data-dir data --only relativistic --seeds 1 --epochs 1    # one way alone

Metz et al. 2017 (arXiv 1611.02163, section 3.3.1). The modes are the numbers 0 to 999. The judge of evaluate.py reads
the three digits of 26,000 samples: a mode counts as reached if one sample shows it, and the Kullback-Leibler divergence
of the modes' shares from equal ones is given in nats. The training set has 60,000 images, in which each MNIST image
appears three times. The networks are those of `train_gan.py --networks large` with three channels, trained by its
train_step. `best` and `relativistic` have the settings of the large networks, but --r1 0.3. The same command resumes
what was interrupted, in --output-dir. Only --record writes to benchmarks/results/stacked-mnist.json.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import train_gan
import utils
from datasets import Batches, load
from engine import flags
from engine.device import pick_device
from engine.errors import run_script
from engine.provenance import environment
from measures.generator import class_measures
from measures.reference import load_reference
from measures.samples import decode, latent_noise
from models import GANS
from models.gan import LargeDiscriminator, PaperGenerator
from models.maxout import Maxout

SAMPLES = 26_000
RESULTS = ROOT / "benchmarks" / "results" / "stacked-mnist.json"
VARIANTS = {**train_gan.VARIANTS, ("best", "stacked"): {**train_gan.VARIANTS["best", "large"], "r1": 0.3}}
WAYS = {
    "lecture": "--recipe lecture --batch-size 128 --amp --compile",
    "best": "--recipe best --amp --compile",
    "relativistic": "--recipe best --adversarial-loss relativistic --amp --compile",
}


class StackedGenerator(PaperGenerator):
    """100-1200-1200-2352. Input: noise z [N, 100]. Output: images [N, 3, 28, 28] with pixels in [0, 1]."""

    def __init__(self, noise="unit"):
        super().__init__(noise)
        self.model[-2] = nn.Linear(1200, 3 * 28 * 28)

    def forward(self, z):
        return self.model(z).view(-1, 3, 28, 28)


class StackedDiscriminator(LargeDiscriminator):
    """Maxout 240 x 5, maxout 240 x 5, one logit. Input: images [N, 3, 28, 28]. Output: logits [N, 1]."""

    def __init__(self):
        super().__init__()
        self.model[0] = Maxout(3 * 28 * 28, 240, k=5, dropout=False)


def stack(images, labels, n, seed):
    """n images [n, 3, 28, 28] of three digits each, and the numbers [n] that they show."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(images), generator=generator)[:n] for _ in range(3)]
    numbers = sum(10**place * labels[order] for place, order in zip((2, 1, 0), orders))
    return torch.cat([images[order] for order in orders], dim=1), numbers


def read_numbers(judge, images):
    """The numbers [N] that the judge reads in images [N, 3, 28, 28] with pixels in [0, 1]."""
    return judge.read(images.flatten(0, 1)[:, None])[1].view(-1, 3) @ torch.tensor([100, 10, 1])


def mode_measures(numbers):
    """How many of the numbers 0 to 999 appear in `numbers`, int64 [N], and KL(their shares || equal shares) in nats."""
    measures = class_measures(numbers, 1000)
    return {"modes": sum(share > 0 for share in measures["class_histogram"]), "kl": measures["class_kl"]}


def train(way, seed, options):
    """Train one seed, or what is left of it; returns the generator, the run's options and its training time."""
    folder = Path(options.output_dir) / f"{way}-{options.epochs}-epochs-{seed}"
    parser = train_gan.get_args_parser()
    parser.prog = "benchmarks/stacked_mnist.py"
    parser.set_defaults(script=parser.prog, kind="stacked-gan")
    shared = ["--networks", "stacked", "--val-size", "0", "--data-dir", options.data_dir, "--device", options.device]
    shared += ["--epochs", str(options.epochs), "--seed", str(seed), "--auto-resume", "--output-dir", str(folder)]
    args = flags.parse_args(parser, train_gan.RECIPES, VARIANTS, [*WAYS[way].split(), *shared])
    device = pick_device(args.device, args.amp)
    torch.manual_seed(args.seed)
    images, labels = load("mnist", args.data_dir)
    batches = Batches(*stack(images, labels, len(images), args.seed), args.batch_size, device, 0.0, seed=args.seed)
    state, train_step, generator = train_gan.build(args, device, batches)
    z = latent_noise(generator, 100, seed)

    def draw_numbers():  # the three digits of a sample side by side
        with utils.evaluating(generator):
            return decode(generator, z).transpose(1, 2).flatten(2)[:, None]

    run = utils.Run(args, state)
    utils.train(run, train_step, batches, draw=draw_numbers)
    return generator.eval(), args, sum(run.seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--epochs", type=flags.number(int, 1), default=25, help="per run (default: 25)")
    parser.add_argument("--seeds", type=flags.number(int, 1), default=5, help="number of seeds (default: 5)")
    parser.add_argument("--only", choices=list(WAYS), help="train this way alone (default: all)")
    parser.add_argument("--output-dir", default="runs/stacked-mnist", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/")
    options = parser.parse_args(argv)
    GANS["stacked"] = (StackedGenerator, StackedDiscriminator)

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    judge = load_reference("cpu")
    images, labels = load("mnist", options.data_dir)
    real = read_numbers(judge, stack(images, labels, SAMPLES, 0)[0] / 255)
    for way in [options.only] if options.only else WAYS:
        row = {"options": WAYS[way], "epochs": options.epochs, "seeds": [], "training_seconds": []}
        for seed in range(options.seeds):
            generator, _, seconds = train(way, seed, options)
            samples = decode(generator, latent_noise(generator, SAMPLES, seed))
            row["seeds"].append(mode_measures(read_numbers(judge, samples)))
            row["training_seconds"].append(seconds)
            print(f"{way}, seed {seed}: {row['seeds'][-1]}, {seconds / 60:.1f} minutes", flush=True)
        results[way] = {**row, **environment()}
    results = {way: results[way] for way in WAYS if way in results}
    results["real images"] = {"seeds": [mode_measures(real)]}
    if options.record:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
