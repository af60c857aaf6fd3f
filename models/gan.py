"""Generative adversarial networks (Goodfellow et al. 2014, arXiv 1406.2661; slides "GAN")."""

import torch
import torch.nn as nn

from models.maxout import Maxout, linear_layers


def draw_noise(n: int, kind: str, device: torch.device | str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Noise z [n, 100], for training and for sampling alike.

    kind: `unit` is uniform on [0, 1), `centred` uniform on (-sqrt 3, sqrt 3), with mean 0 and variance 1.
    """
    z = torch.rand(n, 100, device=device, generator=generator)
    return z if kind == "unit" else (2 * z - 1) * 3**0.5


@torch.no_grad()
def init_weights(generator: nn.Module, discriminator: nn.Module, kind: str, pixel_means: torch.Tensor) -> None:
    """Draw the initial weights; biases start at 0. `torch` keeps those that torch draws.

    `he`: G's weights are N(0, 2 / fan-in) (He et al. 2015, arXiv 1502.01852), so that its first images differ with z.
    With torch's smaller weights they are nearly one image, and D's gradient moves all of them as one.
    `paper`: G's weights are U(-.05, .05), D's U(-.005, .005), and G's images start at `pixel_means`, the
    training images' [1, 28, 28] in [0, 1] (Goodfellow et al. 2014). Layers that take labels keep torch's weights: with
    these small ones, one-hot vectors would hardly count.
    """
    if kind == "he":
        for layer in linear_layers(generator):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    elif kind == "paper":
        for network, limit in ((generator, 0.05), (discriminator, 0.005)):
            of_labels = linear_layers(network.from_y) if hasattr(network, "from_y") else []
            for layer in linear_layers(network):
                if layer not in of_labels:
                    nn.init.uniform_(layer.weight, -limit, limit)
                    nn.init.zeros_(layer.bias)
        linear_layers(generator)[-1].bias.copy_(pixel_means.flatten().clamp(1e-3, 1 - 1e-3).logit())


def r1_penalty(discriminator: nn.Module, images: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
    """R1: the mean of |d logit / d x|^2 over real images x (Mescheder et al. 2018, arXiv 1801.04406).

    It keeps D from becoming certain. Taken over every fourth image of the batch: an unbiased estimate, noisier, at a
    quarter of the cost.
    """
    x = images[::4].detach().requires_grad_()
    logits = discriminator(x, *(given[::4] for given in labels))
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


class Generator(nn.Module):
    """The lecture's generator, 100-128-256-784.

    Input: noise z [N, 100]. Output: images [N, 1, 28, 28] with pixels in [0, 1].
    """

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(in_features=100, out_features=128),
            nn.ReLU(inplace=True),
            nn.Linear(in_features=128, out_features=256),
            nn.ReLU(inplace=True),
            nn.Linear(in_features=256, out_features=28 * 28),
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.model(z).view(-1, 1, 28, 28)


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

    def forward(self, x):
        return self.model(x.flatten(1))

    def probability(self, x):
        """D(x), as on the slide; [N, 1]."""
        return self(x).sigmoid()


class PaperGenerator(nn.Module):
    """The paper's generator for MNIST, 100-1200-1200-784.

    Input: noise z [N, 100]. Output: images [N, 1, 28, 28] with pixels in [0, 1].
    """

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(100, 1200), nn.ReLU(inplace=True),
            nn.Linear(1200, 1200), nn.ReLU(inplace=True),
            nn.Linear(1200, 28 * 28), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, z):
        return self.model(z).view(-1, 1, 28, 28)


class LargeDiscriminator(Discriminator):
    """The paper's sizes with less dropout: .2 of the hidden units. Input and output as the lecture's.

    The R1 penalty already holds this D back; the paper's dropout on top slows both networks down.
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
