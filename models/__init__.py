"""The networks by name: what is registered here is what the scripts' flags offer."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from models.cnn import CNN
from models.gan import Discriminator, Generator, LargeDiscriminator, PaperDiscriminator, PaperGenerator
from models.maxout import MaxoutMLP
from models.mlp import MLP

# A new classifier is one file and one line here: images [N, 1, 28, 28] in, logits [N, 10] out.
CLASSIFIERS = {
    "mlp": MLP,
    "cnn": CNN,
    "maxout": MaxoutMLP,
}

# Generators and their discriminators: noise in, images [N, 1, 28, 28] out; images in, logits [N, 1] out.
GANS = {
    "lecture": (Generator, Discriminator),
    "paper": (PaperGenerator, PaperDiscriminator),
    "large": (PaperGenerator, LargeDiscriminator),
}

ACTIVATIONS = {
    "relu": F.relu,  # max(0, x)
    "leaky-relu": F.leaky_relu,  # max(0, x) + 0.01 min(0, x)
    "tanh": torch.tanh,  # (e^x - e^-x) / (e^x + e^-x)
    "sigmoid": torch.sigmoid,  # 1 / (1 + e^-x)
}


def build_classifier(name: str, activation: str | None = None, batch_norm: bool = False) -> nn.Module:
    """The network registered as `name`, with the activation of that name (None: the network's own).

    Raises ValueError if there is no such network or it has no such option.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"there is no model {name} in models/__init__.py; it has {', '.join(CLASSIFIERS)}")
    options = {}
    if activation is not None:
        options["activation"] = ACTIVATIONS[activation]
    if batch_norm:
        options["batch_norm"] = True
    for option in sorted(options.keys() - inspect.signature(CLASSIFIERS[name]).parameters.keys()):
        flag = option.replace("_", "-")
        raise ValueError(f"the model {name} has no option --{flag}; omit it (--no-{flag} if the recipe sets it)")
    return CLASSIFIERS[name](**options)
