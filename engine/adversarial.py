"""What train_gan.py and train_cgan.py share: their losses, the initial weights, the R1 penalty, and their flags."""

from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.flags import ArgumentParser, number, training_parser


def d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))). With logits l, -log D = softplus(-l), which is finite where D rounds to 0."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# What D minimises and what G minimises, given the logits of real and of fake images, [N, 1] each.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "non-saturating": (d_loss, lambda real, fake: F.softplus(-fake).mean()),  # G maximises log D(G(z))
    "saturating": (d_loss, lambda real, fake: -F.softplus(fake).mean()),  # G minimises log(1 - D(G(z)))
    # Pairs: D maximises log sigmoid(l(x) - l(G(z))), G the opposite (R3GAN, Huang et al. 2024, arXiv 2501.05441)
    "relativistic": (
        lambda real, fake: 2 * F.softplus(fake - real).mean(),
        lambda real, fake: F.softplus(real - fake).mean(),
    ),
}


def adversarial_parser(*args) -> ArgumentParser:
    """The flags that both scripts share. args: as for `training_parser`."""
    parser = training_parser(*args)
    add = parser.group("what to train")
    add("--loss", choices=list(LOSSES), default="non-saturating", help="what D and G minimise")
    add("--noise", choices=["unit", "centred"], default="unit", help="z uniform on [0, 1), or with mean 0, variance 1")
    add("--init", choices=["torch", "he", "paper"], default="torch", help="initial weights")
    add = parser.group("how to train")
    what = "weight of R1, the penalty on the gradient of D at real images (--loss relativistic: also at fakes)"
    add("--r1", type=number(float, 0), default=0.0, help=what)
    add("--simultaneous", action=BooleanOptionalAction, default=False, help="compute both updates before applying D's")
    add("--schedule", choices=["constant", "maxout"], default="constant", help="learning rate over time")
    return parser


@torch.no_grad()
def init_weights(generator: nn.Module, discriminator: nn.Module, kind: str, pixel_means: Tensor) -> None:
    """Initialise the linear layers; biases start at 0. Other layers keep torch's weights; `torch` keeps all.

    `he`: G's weights are N(0, 2 / fan-in) (He et al. 2015, arXiv 1502.01852), so that its first images differ with z.
    `paper`: G's weights are U(-.05, .05), D's U(-.005, .005), and G's images start at `pixel_means`, the
    training images' [1, 28, 28] in [0, 1] (Goodfellow et al. 2014). Layers that take labels keep torch's weights: with
    these small ones, one-hot vectors would hardly count.
    """
    if kind == "he":
        for layer in linear_layers(generator):
            init_linear(layer, nn.init.kaiming_normal_, nonlinearity="relu")
    elif kind == "paper":
        for network, limit in ((generator, 0.05), (discriminator, 0.005)):
            of_labels = linear_layers(getattr(network, "from_y", nn.Identity()))
            for layer in linear_layers(network):
                if layer not in of_labels:
                    init_linear(layer, nn.init.uniform_, a=-limit, b=limit)
        for layer in linear_layers(generator)[-1:]:
            if layer.bias is not None and layer.out_features == pixel_means.numel():
                layer.bias.copy_(pixel_means.flatten().clamp(1e-3, 1 - 1e-3).logit())


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def init_linear(layer: nn.Linear, init_weight: Callable, **options: Any) -> None:
    init_weight(layer.weight, **options)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def logits_of(discriminator: nn.Module, real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """D's logits, [N, 1] each, of real and of fake images; `real` and `fake` are what D is called with.

    One pass over both, unless D has batch norm: its statistics would be those of the mixture, which G's images alone do
    not have when G is updated.
    """
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in discriminator.modules()):
        return discriminator(*real).float(), discriminator(*fake).float()
    of_real, of_fake = discriminator(*map(torch.cat, zip(real, fake))).float().chunk(2)
    return of_real, of_fake


def learning(optimizer: Optimizer) -> list[Tensor]:
    """The weights that `optimizer` updates, without those that are frozen."""
    return [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]


def r1_penalty(discriminator: nn.Module, images: Tensor, *labels: Tensor) -> Tensor:
    """R1, which regularises D: the mean of |d logit / d x|^2 over images x (Mescheder et al. 2018, arXiv 1801.04406).

    Taken over every fourth image of the batch: an unbiased estimate, noisier, at a quarter of the cost.
    """
    x = images[::4].detach().requires_grad_()
    logits = discriminator(x, *(given[::4] for given in labels))
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
