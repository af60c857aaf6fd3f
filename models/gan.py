"""Generative adversarial networks (Goodfellow et al. 2014, arXiv 1406.2661; slides "GAN")."""

import torch
from torch import Tensor, nn

from models.maxout import Maxout


def uniform_noise(n: int, prior: str, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Noise z [n, 100]. prior: `unit` is uniform on [0, 1), `centred` on (-sqrt 3, sqrt 3): mean 0, variance 1."""
    z = torch.rand(n, 100, device=device, generator=generator)
    return z if prior == "unit" else (2 * z - 1) * 3**0.5


class Generator(nn.Module):
    """The lecture's generator, 100-128-256-784.

    Input: noise z [N, 100]. Output: images [N, 1, 28, 28] with pixels in [0, 1].

    noise: the prior of z, `unit` or `centred` (see `uniform_noise`). hidden: units of the two hidden layers.
    """

    def __init__(self, noise: str = "unit", hidden: tuple[int, int] = (128, 256)):
        super().__init__()
        self.prior = noise
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

    def noise(self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """z [n, 100] from the prior, for training and for sampling alike."""
        return uniform_noise(n, self.prior, generator, device)

    def decode(self, z: Tensor) -> Tensor:
        return self(z)

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


class LargeDiscriminator(Discriminator):
    """The paper's sizes with less dropout: .2 of the hidden units. Input and output as the lecture's.

    The R1 penalty already regularises this D; the paper's dropout on top slows both networks down.
    """

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            Maxout(28 * 28, 240, k=5, dropout=False),
            Maxout(240, 240, k=5, p=0.2),
            nn.Dropout(0.2),
            nn.Linear(240, 1),
        )


class PaperDiscriminator(Discriminator):
    """The paper's discriminator for MNIST: maxout 240 x 5, maxout 240 x 5, one logit.

    Dropout keeps .8 of the input and .5 of the hidden units. Input and output as the lecture's.
    """

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            Maxout(28 * 28, 240, k=5, p=0.2),
            Maxout(240, 240, k=5, p=0.5),
            nn.Dropout(0.5),
            nn.Linear(240, 1),
        )
