"""The networks by name: what is registered here is what the scripts' flags offer."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.cnn import CNN
from models.gan import Discriminator, Generator, LargeDiscriminator, PaperDiscriminator, PaperGenerator
from models.hmm import HMM
from models.maxout import MaxoutMLP
from models.mlp import MLP
from models.rbm import RBM
from models.resnet import ResNet
from models.rnn import RNN
from models.vae import VAE

# A new classifier is one file and one line here: images [N, 1, 28, 28] in, logits [N, classes] out.
CLASSIFIERS = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "maxout": MaxoutMLP,
}

# Generators and their discriminators: noise in, images [N, 1, 28, 28] out; images in, logits [N, 1] out.
GANS = {
    "lecture": (Generator, Discriminator),
    "paper": (PaperGenerator, PaperDiscriminator),
    "large": (PaperGenerator, LargeDiscriminator),
}

# Generative models that are trained by likelihood. Each has loss(images) -> scalar, sample(n, generator) -> images
# [n, 1, 28, 28], log_likelihood(images) -> [N] in nats, and `likelihood`: exact, lower bound or estimate.
LIKELIHOOD_MODELS = {
    "vae": VAE,
    "rbm": RBM,
    "rnn": RNN,
    "hmm": HMM,
}

ACTIVATIONS = {
    "relu": F.relu,  # max(0, x)
    "leaky-relu": F.leaky_relu,  # max(0, x) + 0.01 min(0, x)
    "tanh": torch.tanh,  # (e^x - e^-x) / (e^x + e^-x)
    "sigmoid": torch.sigmoid,  # 1 / (1 + e^-x)
}


def build_classifier(
    name: str, activation: str | None = None, batch_norm: bool = False, classes: int = 10
) -> nn.Module:
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
    if "classes" in inspect.signature(CLASSIFIERS[name]).parameters:
        options["classes"] = classes
    return build(CLASSIFIERS, name, options)


def build_likelihood_model(options: dict[str, Any], pixel_means: torch.Tensor | None = None) -> nn.Module:
    """The model registered as `options["model"]`, which starts at `pixel_means`, [1, 28, 28] in [0, 1], or None.

    options: all options of a run; those that some likelihood model takes are passed on unless they are None. Raises
    ValueError if this model does not take one of them or refuses its value.
    """
    taken = {name for kind in LIKELIHOOD_MODELS.values() for name in inspect.signature(kind).parameters}
    given = {name: value for name, value in options.items() if name in taken and value is not None}
    return build(LIKELIHOOD_MODELS, options["model"], {**given, "pixel_means": pixel_means})


def build(registry: dict[str, type[nn.Module]], name: str, options: dict[str, Any]) -> nn.Module:
    for option in sorted(options.keys() - inspect.signature(registry[name]).parameters.keys()):
        flag = option.replace("_", "-")
        remedy = f"omit it, or add --no-{flag} if the recipe sets it" if options[option] is True else "omit it"
        raise ValueError(f"the model {name} has no option --{flag}; {remedy}")
    return registry[name](**options)
