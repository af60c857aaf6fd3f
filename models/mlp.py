"""The lecture's multi-layer perceptron (slide "Code snippet")."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """784-256-128-64-10 classifier; 242,762 parameters as on the slide.

    Input: images [N, 1, 28, 28] (or any [N, ...] with 784 values). Output: logits [N, classes].

    activation: a function of one tensor, applied after each hidden layer.
    batch_norm: normalise before each activation; adds `bn1` to `bn3` to the state dict.
    classes: number of classes.
    """

    def __init__(self, activation: Callable = F.relu, batch_norm: bool = False, classes: int = 10):
        super().__init__()
        self.activation = activation
        self.linear1 = nn.Linear(in_features=28 * 28, out_features=256)
        self.linear2 = nn.Linear(in_features=256, out_features=128)
        self.linear3 = nn.Linear(in_features=128, out_features=64)
        self.linear4 = nn.Linear(in_features=64, out_features=classes)
        self.bn1 = nn.BatchNorm1d(256) if batch_norm else nn.Identity()
        self.bn2 = nn.BatchNorm1d(128) if batch_norm else nn.Identity()
        self.bn3 = nn.BatchNorm1d(64) if batch_norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        x = self.activation(self.bn1(self.linear1(x)))
        x = self.activation(self.bn2(self.linear2(x)))
        x = self.activation(self.bn3(self.linear3(x)))
        return self.linear4(x)
