"""Generative adversarial networks (Goodfellow et al. 2014, arXiv 1406.2661; slides "GAN")."""

import torch
from torch import Tensor, nn

from models.maxout import Maxout


class UniformNoise(nn.Module):
    """Base class of generators. prior of z: `unit`, U[0, 1); `centred`, U[-sqrt 3, sqrt 3), with mean 0, variance 1."""

    def __init__(self, prior: str):
        super().__init__()
        self.prior = prior

    def noise(self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """z [n, 100] from the prior, for training and for sampling alike."""
        z = torch.rand(n, 100, device=device, generator=generator)
        return z if self.prior == "unit" else (2 * z - 1) * 3**0.5

    def decode(self, *inputs: Tensor) -> Tensor:
        return self(*inputs)


class Generator(UniformNoise):
    """The lecture's generator, 100-128-256-784.

    Input: noise z [N, 100]. Output: images [N, 1, 28, 28] with pixels in [0, 1].
    """

    def __init__(self, noise: str = "unit", hidden: tuple[int, int] = (128, 256)):
        super().__init__(noise)
        self.model = nn.Sequential(
            nn.Linear(in_features=100, out_features=hidden[0]),
            nn.ReLU(inplace=True),
            nn.Linear(in_features=hidden[0], out_features=hidden[1]),
            nn.ReLU(inplace=True),
            nn.Linear(in_features=hidden[1], out_features=28 * 28),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.model(z).view(-1, 1, 28, 28)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self(self.noise(n, generator, next(self.parameters()).device))


class PaperGenerator(Generator):
    """The paper's generator for MNIST, 100-1200-1200-784. Input and output as the lecture's."""

    def __init__(self, noise: str = "unit"):
        super().__init__(noise, hidden=(1200, 1200))


class Discriminator(nn.Module):
    """The lecture's discriminator: maxout 256 x 5, maxout 128 x 5, one logit.

    Input: images [N, 1, 28, 28] with pixels in [0, 1]. Output: logits [N, 1]; their sigmoid is D(x), the probability
    of being real. Logits keep log D(x) finite where D(x) rounds to 0.
    """

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            Maxout(28 * 28, 256, dropout=False, k=5),
            Maxout(256, 128, dropout=True, k=5),
            nn.Linear(128, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1))


class PaperDiscriminator(Discriminator):
    """The paper's discriminator for MNIST: maxout 240 x 5, maxout 240 x 5, one logit.

    Input and output as the lecture's. dropout: fraction of hidden units dropped. of_input: drop .2 of the input too.
    """

    def __init__(self, dropout: float = 0.5, of_input: bool = True):
        super().__init__()
        self.model = nn.Sequential(
            Maxout(28 * 28, 240, k=5, dropout=of_input, p=0.2),
            Maxout(240, 240, k=5, p=dropout),
            nn.Dropout(dropout),
            nn.Linear(240, 1),
        )


class LargeDiscriminator(PaperDiscriminator):
    """The paper's sizes with less dropout. R1 already regularises this D; the paper's dropout slows both networks."""

    def __init__(self):
        super().__init__(dropout=0.2, of_input=False)
