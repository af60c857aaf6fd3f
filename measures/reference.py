"""The reference classifier of MNIST digits, in whose features generators are measured.

Its weights are weights/cnn.pt, those of `python train_classifier.py --model cnn --recipe best --amp --seed 0`. The
network is a separate fixed copy, so edits to models/ do not change it. Values from different reference classifiers
cannot be compared.
"""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from engine.provenance import pinned

WEIGHTS = Path(__file__).parent.parent / "weights" / "cnn.pt"
SHA256 = "db3d0871f108fde500a7224c079faf3fc4ea173fe35b83da2293621296c99ca8"


class ReferenceClassifier(nn.Module):
    """Three convolutions with batch norm. Input: images [N, 1, 28, 28] with pixels in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128)
        self.conv3, self.bn3 = nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.BatchNorm2d(256)
        self.fc = nn.Linear(4 * 4 * 256, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 256], the last convolution's outputs averaged over their positions, and logits [N, 10]."""
        x = F.relu(self.bn1(self.conv1(images * 2 - 1)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return x.mean((2, 3)), self.fc(x.flatten(1))

    @torch.no_grad()
    def read(self, images: Tensor, block: int = 1000) -> tuple[Tensor, Tensor]:
        """Features [N, 256] and predicted digits [N] of images [N, 1, 28, 28] on any device; both on the CPU.

        Raises UserError if a pixel is outside [0, 1].
        """
        low, high = images.aminmax()
        if low < 0 or high > 1:
            found = f"pixels from {low:.3g} to {high:.3g}"
            raise UserError(f"{found}; the reference classifier takes images with pixels in [0, 1]")
        parts = [self(part.to(self.fc.weight.device)) for part in images.split(block)]
        return torch.cat([f.cpu() for f, _ in parts]), torch.cat([logits.argmax(1).cpu() for _, logits in parts])


def load_reference(device: torch.device | str) -> ReferenceClassifier:
    """The reference classifier in eval mode. Raises UserError if weights/cnn.pt is missing or not the pinned file."""
    checkpoint = torch.load(io.BytesIO(pinned(WEIGHTS, SHA256)), map_location="cpu", weights_only=True)
    classifier = ReferenceClassifier()
    classifier.load_state_dict(checkpoint["state"]["model"])
    return classifier.eval().to(device)
