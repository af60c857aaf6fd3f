"""What training a generator against a discriminator needs: first weights, and the R1 penalty."""

import torch
from torch import nn


@torch.no_grad()
def init_weights(generator: nn.Module, discriminator: nn.Module, kind: str, pixel_means: torch.Tensor) -> None:
    """Set the initial weights of all linear layers; biases start at 0. Other layers keep torch's; `torch` keeps all.

    `he`: G's weights are N(0, 2 / fan-in) (He et al. 2015, arXiv 1502.01852), so that its first images differ with z.
    With torch's smaller weights they are nearly one image, and D's gradient moves all of them as one.
    `paper`: G's weights are U(-.05, .05), D's U(-.005, .005), and G's images start at `pixel_means`, the training
    images' [1, 28, 28] in [0, 1] (Goodfellow et al. 2014), if a last linear layer draws them. Layers that take labels
    keep torch's weights: with these small ones, one-hot vectors would hardly count.
    """
    if kind == "he":
        for layer in linear_layers(generator):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            zero_bias(layer)
    elif kind == "paper":
        init_uniform(generator, 0.05)
        init_uniform(discriminator, 0.005)
        layers = linear_layers(generator)
        if layers and layers[-1].bias is not None and layers[-1].out_features == pixel_means.numel():
            layers[-1].bias.copy_(pixel_means.flatten().clamp(1e-3, 1 - 1e-3).logit())


def init_uniform(network: nn.Module, limit: float) -> None:
    of_labels = set(linear_layers(network.get_submodule("from_y"))) if hasattr(network, "from_y") else set()
    for layer in linear_layers(network):
        if layer not in of_labels:
            nn.init.uniform_(layer.weight, -limit, limit)
            zero_bias(layer)


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def zero_bias(layer: nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def r1_penalty(discriminator: nn.Module, images: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
    """R1: the mean of |d logit / d x|^2 over real images x (Mescheder et al. 2018, arXiv 1801.04406); a scalar.

    It keeps D from becoming certain. Computed on every fourth image of the batch: an unbiased estimate, noisier, at a
    quarter of the cost.
    """
    x = images[::4].detach().requires_grad_()
    logits = discriminator(x, *(given[::4] for given in labels))
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
