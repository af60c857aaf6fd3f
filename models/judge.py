"""The judge: one fixed classifier of MNIST digits, in whose eyes generators are measured.

`judge.pt` holds the CNN of `python train_classifier.py --model cnn --recipe best --amp --seed 0`, trained on MNIST's
training images and written by `python benchmarks/judge.py RUN`, which checks it on the test images. Figures made with
another judge cannot be compared with those made with this one.
"""

import hashlib
from pathlib import Path

import torch

from models.cnn import CNN

WEIGHTS = Path(__file__).with_name("judge.pt")
SHA256 = "5e6051821ba3bafa95cf166fc18a1a2559861bc350ec90f7b3dabbe20602bda7"


class Judge(CNN):
    """The CNN with batch norm, for images [N, 1, 28, 28] with pixels in [0, 1], such as generators draw."""

    def __init__(self):
        super().__init__(batch_norm=True)

    def forward(self, images):
        return super().forward(images * 2 - 1)

    @torch.no_grad()
    def look(self, images, block=1000):
        """What the judge sees in images [N, 1, 28, 28], wherever they are: features [N, 256], the last convolution's
        outputs averaged over their places, and the digits [N] that it reads; both on the CPU."""
        features, digits = [], []
        hook = self.bn3.register_forward_hook(lambda _, __, out: features.append(out.relu().mean((2, 3)).cpu()))
        for part in images.split(block):
            digits.append(self(part.to(self.fc.weight.device)).argmax(1).cpu())
        hook.remove()
        return torch.cat(features), torch.cat(digits)


def load_judge(device):
    """The judge in eval mode. Raises OSError where judge.pt is missing or not the one that this repository ships."""
    content = WEIGHTS.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError(f"{WEIGHTS} is not the judge of this repository (its SHA-256 differs); git checkout {WEIGHTS}")
    judge = Judge()
    judge.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    return judge.eval().to(device)


def failure_signs(row, digits=None, asked=None):
    """Yield what a person should be told of a generator's training, a sentence for each sign of failure.

    row: an epoch's mean `loss_d`. digits: what the judge reads in samples, [N]. asked: what they should show, [N].
    """
    if row["loss_d"] < 0.02:
        yield f"D's loss is near zero ({row['loss_d']:.4f}): it tells all fakes, and G learns nothing; try --r1 0.5"
    if digits is None:
        return
    remedy = "if that lasts, try --recipe best, or there a larger --r1"
    share, digit = digits.bincount(minlength=10).div(len(digits)).max(0)
    if share > 0.5:
        yield f"{share:.0%} of the samples are read as the digit {digit}; {remedy}"
    if asked is not None and (right := (digits == asked).float().mean()) < 0.5:
        yield f"only {right:.0%} of the samples are read as the digit asked for; {remedy}"
