"""Make the judge's weights, measures/judge.pt, from a trained CNN, and check them on MNIST's test images.

python train_classifier.py --model cnn --recipe best --amp --seed 0
python benchmarks/judge.py runs/cnn-mnist --data-dir data
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import load
from engine.checkpoint import load_checkpoint
from measures.judge import WEIGHTS, Judge


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of the trained CNN")
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    args = parser.parse_args()
    weights = load_checkpoint(Path(args.run) / "best.pt")["state"]["ema"]["model"]
    judge = Judge().eval()
    judge.load_state_dict(weights)
    images, labels = load("mnist", args.data_dir, train=False)
    _, digits = judge.read(images / 255)
    torch.save(weights, WEIGHTS)
    print(f"test accuracy {(digits == labels).double().mean():.2%}, {WEIGHTS.stat().st_size} bytes")
    print(f"now put into measures/judge.py: SHA256 = {hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()!r}")


if __name__ == "__main__":
    main()
