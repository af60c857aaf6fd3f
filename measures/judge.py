"""The judge: one fixed classifier of MNIST digits, which reads what generators draw.

Its weights are weights/cnn.pt, those of `python train_classifier.py --model cnn --recipe best --amp --seed 0`. The
network is a copy of its own, which edits to models/ leave alone. Figures from different judges cannot be compared.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = Path(__file__).parent.parent / "weights" / "cnn.pt"
SHA256 = "db3d0871f108fde500a7224c079faf3fc4ea173fe35b83da2293621296c99ca8"


class Judge(nn.Module):
    """Three convolutions with batch norm. Input: images [N, 1, 28, 28] with pixels in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128)
        self.conv3, self.bn3 = nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.BatchNorm2d(256)
        self.fc = nn.Linear(4 * 4 * 256, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, 256], the last convolution's outputs averaged over their positions, and logits [N, 10]."""
        x = F.relu(self.bn1(self.conv1(images * 2 - 1)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return x.mean((2, 3)), self.fc(x.flatten(1))

    @torch.no_grad()
    def read(self, images: torch.Tensor, block: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, 256] and digits [N] of images [N, 1, 28, 28] on any device; both on the CPU.

        Raises ValueError if a pixel is outside [0, 1].
        """
        low, high = images.aminmax()
        if low < 0 or high > 1:
            raise ValueError(f"pixels from {low:.3g} to {high:.3g}; the judge reads images with pixels in [0, 1]")
        parts = [self(part.to(self.fc.weight.device)) for part in images.split(block)]
        return torch.cat([f.cpu() for f, _ in parts]), torch.cat([logits.argmax(1).cpu() for _, logits in parts])


def load_judge(device: torch.device | str) -> Judge:
    """The judge in eval mode. Raises OSError if weights/cnn.pt is missing or not the file that was pinned."""
    content = WEIGHTS.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError(f"{WEIGHTS} is not the judge of this repository (its SHA-256 differs); git checkout {WEIGHTS}")
    judge = Judge()
    judge.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True)["state"]["model"])
    return judge.eval().to(device)
