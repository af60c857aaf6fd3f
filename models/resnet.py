"""The lecture's CNN with residual blocks (He et al. 2015, arXiv 1512.03385)."""

import torch
from torch import nn


class Residual(nn.Module):
    """x + ReLU(BN(CONV(x))): the layers learn what to add to x. Input and output: [N, channels, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.model(x)


class ResNet(nn.Module):
    """The lecture's three convolutions with stride 2, two residual blocks after each, then the mean over the image.

    Input: images [N, 1, 28, 28]. Output: logits [N, classes].
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.model = nn.Sequential(
            *halve(1, 48, kernel_size=5), Residual(48), Residual(48),  # [N, 48, 14, 14]
            *halve(48, 96), Residual(96), Residual(96),  # [N, 96, 7, 7]
            *halve(96, 192), Residual(192), Residual(192),  # [N, 192, 4, 4]
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def halve(in_channels: int, out_channels: int, kernel_size: int = 3) -> list[nn.Module]:
    """CONV-BN-ReLU, which halves the sides of the image."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=2, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
