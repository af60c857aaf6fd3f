"""The lecture's convolutional network (slides "Convolutional neural network" and "Code snippet")."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def conv_output_size(i: int, k: int, s: int = 1, p: int = 0) -> int:
    """Side of a convolution's output: o = floor((i - k + 2p) / s) + 1 (slide "Convolution").

    i: input side, k: kernel side, s: stride, p: padding on each side, all in pixels.
    """
    return (i - k + 2 * p) // s + 1


class CNN(nn.Module):
    """Three 3x3 convolutions with stride 2, then one linear layer; 410,634 parameters as on the slide.

    Input: images [N, 1, 28, 28]. Output: logits [N, classes].

    activation: a function of one tensor, applied after each convolution.
    batch_norm: CONV-BN-ReLU as on the slide; adds `bn1` to `bn3` to the state dict.
    classes: number of classes.
    """

    def __init__(self, activation: Callable = F.relu, batch_norm: bool = False, classes: int = 10):
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=64, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(in_channels=64, out_channels=128, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(in_channels=128, out_channels=256, kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64) if batch_norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(128) if batch_norm else nn.Identity()
        self.bn3 = nn.BatchNorm2d(256) if batch_norm else nn.Identity()
        side = 28
        for _ in (self.conv1, self.conv2, self.conv3):
            side = conv_output_size(side, k=3, s=2, p=1)  # 28 -> 14 -> 7 -> 4
        self.fc = nn.Linear(in_features=side * side * 256, out_features=classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.bn1(self.conv1(x)))  # [N, 64, 14, 14]
        x = self.activation(self.bn2(self.conv2(x)))  # [N, 128, 7, 7]
        x = self.activation(self.bn3(self.conv3(x)))  # [N, 256, 4, 4]
        return self.fc(x.flatten(1))
