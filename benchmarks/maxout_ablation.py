"""Which details of the released Maxout configuration matter? The first stage, with one detail changed at a time.

python benchmarks/maxout_ablation.py --data-dir data --seeds 2 --record
python benchmarks/maxout_ablation.py --data-dir data --only "no norm limit"    # one case alone

Goodfellow et al. 2013 (arXiv 1302.4389), section 5.1, and pylearn2's mnist_pi.yaml, which `train_classifier.py --recipe
paper` follows. Each case trains for --epochs epochs; the one with the best validation accuracy is tested. The same
command resumes what was interrupted, in --output-dir. Only --record writes to
benchmarks/results/maxout-ablation.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import evaluate
import train_classifier
from datasets import Batches
from engine.errors import run_script
from engine.flags import number
from engine.provenance import environment
from models import CLASSIFIERS
from models.maxout import MaxoutMLP
from reproduce import read_seconds

RESULTS = ROOT / "benchmarks" / "results" / "maxout-ablation.json"


class ScaledPixels(MaxoutMLP):
    """Dropout as usual: the pixels that are kept are divided by 0.8."""

    def forward(self, x):
        x = nn.functional.dropout(x.flatten(1), 0.2, self.training)
        return self.fc(self.maxout2(self.maxout1(x)))


class NoLastDropout(MaxoutMLP):
    """No dropout before the softmax layer."""

    def __init__(self, classes: int = 10):
        super().__init__(classes)
        self.fc[0] = nn.Identity()


class FreeLinear(nn.Module):
    """The weights of a linear layer, which limit_column_norms does not find."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class FreeLastLayer(MaxoutMLP):
    """No norm limit in the softmax layer."""

    def __init__(self, classes: int = 10):
        super().__init__(classes)
        self.fc[1] = FreeLinear(self.fc[1])


class FixedBatches(Batches):
    """The training images are put into batches once; each epoch has the same batches, in another order."""

    def rows(self, epoch: int, start: int = 0):
        rows = torch.arange(len(self.images), device=self.images.device).split(self.batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(rows), generator=generator) if self.shuffle else torch.arange(len(rows))
        return (rows[number] for number in order[start:])


CASES = {  # name -> network, batches, flags
    "as released": (MaxoutMLP, Batches, []),
    "kept pixels scaled by 1 / 0.8": (ScaledPixels, Batches, []),
    "no dropout before the softmax": (NoLastDropout, Batches, []),
    "no norm limit": (MaxoutMLP, Batches, ["--max-norm", "1e9"]),
    "no norm limit in the softmax layer": (FreeLastLayer, Batches, []),
    "constant learning rate and momentum": (MaxoutMLP, Batches, ["--schedule", "constant"]),
    "5,000 images held out": (MaxoutMLP, Batches, ["--val-size", "5000"]),
    "the same batches in each epoch": (MaxoutMLP, FixedBatches, []),
}


def train(name, seed, options):
    """Train and evaluate one seed of a case, or what is left of it; returns its test errors and its training time."""
    folder = Path(options.output_dir) / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{options.epochs}-epochs-{seed}"
    CLASSIFIERS["maxout"], train_classifier.Batches, flags = CASES[name]
    data = ["--data-dir", options.data_dir, "--device", options.device]
    flags = ["--recipe", "paper", "--compile", "--epochs", str(options.epochs), "--seed", str(seed), *flags]
    train_classifier.main([*flags, *data, "--auto-resume", "--output-dir", str(folder)])
    evaluate.main([str(folder), *data])
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    return metrics["test_errors"], sum(read_seconds(folder))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--epochs", type=number(int, 1), default=150, help="per run (default: 150)")
    parser.add_argument("--seeds", type=number(int, 1), default=2, help="number of seeds (default: 2)")
    parser.add_argument("--only", choices=list(CASES), help="train this case alone (default: all)")
    parser.add_argument(
        "--output-dir", default="runs/maxout-ablation", help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/")
    options = parser.parse_args(argv)

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [options.only] if options.only else CASES:
        errors, seconds = zip(*(train(name, seed, options) for seed in range(options.seeds)))
        print(f"{name}: {', '.join(map(str, errors))} test errors", flush=True)
        row = {"flags": CASES[name][-1], "epochs": options.epochs, "test_errors": errors, "training_seconds": seconds}
        results[name] = {**row, **environment()}
    if options.record:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
