"""Conditional generative adversarial networks (Mirza & Osindero 2014, arXiv 1411.1784; slide "Conditional GAN")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gan import UniformNoise
from models.maxout import Maxout


class ConditionalGenerator(UniformNoise):
    """The paper's generator: z -> 200, y -> 1000, both -> 1200, -> 784; ReLU and dropout after each hidden layer.

    Input: noise z [N, 100] and labels [N]. Output: images [N, 1, 28, 28] with pixels in [0, 1].

    dropout: fraction of the hidden units dropped in training. classes: number of labels.
    """

    conditional = True

    def __init__(self, dropout: float = 0.5, classes: int = 10, noise: str = "unit"):
        super().__init__(noise)
        self.classes = classes
        self.from_z = nn.Linear(100, 200)
        self.from_y = nn.Linear(classes, 1000)
        self.joint = nn.Linear(200 + 1000, 1200)
        self.output = nn.Linear(1200, 28 * 28)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        z = self.dropout(F.relu(self.from_z(z)))
        y = self.dropout(F.relu(self.from_y(one_hot(labels, self.classes, z.dtype))))
        hidden = self.dropout(F.relu(self.joint(torch.cat([z, y], dim=1))))
        return self.output(hidden).sigmoid().view(-1, 1, 28, 28)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images of all classes in turn."""
        z = self.noise(n, generator, self.output.weight.device)
        return self(z, torch.arange(n, device=z.device) % self.classes)


class ConditionalDiscriminator(nn.Module):
    """The paper's discriminator: x -> maxout 240 x 5, y -> maxout 50 x 5, both -> maxout 240 x 4, -> one logit.

    Input: images [N, 1, 28, 28] with pixels in [0, 1], and labels [N]. Output: logits [N, 1]; their sigmoid is D(x|y).

    dropout: fraction of the units dropped before the joint layer and before the last. classes: number of labels.
    """

    def __init__(self, dropout: float = 0.5, classes: int = 10):
        super().__init__()
        self.classes = classes
        self.from_x = Maxout(28 * 28, 240, k=5, dropout=False)
        self.from_y = Maxout(classes, 50, k=5, dropout=False)
        self.joint = Maxout(240 + 50, 240, k=4, p=dropout)
        self.output = nn.Sequential(nn.Dropout(dropout), nn.Linear(240, 1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.from_x(x.flatten(1))
        y = self.from_y(one_hot(labels, self.classes, x.dtype))
        return self.output(self.joint(torch.cat([x, y], dim=1)))


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels [N, classes]. Not F.one_hot, which reads the labels on a CPU: such a step cannot be compiled."""
    return torch.eye(classes, dtype=dtype, device=labels.device)[labels]
