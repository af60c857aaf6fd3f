"""The networks by name, and how the network of a run is rebuilt. What is registered here is what the flags offer.

What a network can do is asked of it (`hasattr`), never of its name. All images are [N, 1, 28, 28].

classifier: a network without `sample`: images in, logits [N, classes] out.
sample(n, generator) -> images with pixels in [0, 1], a torch.Generator's.
noise(n, generator, device) -> z [n, d], and decode(z) -> images: a generator of images from latent z.
conditional = True: it also has `classes`, their number, and decode(z, labels).
loss(images) -> scalar, and log_likelihood(images) -> [N] in nats: a model of binarised images, trained by likelihood.
    likelihood: "exact", "lower bound" or "estimate". Optional: `quick`, cheaper arguments of log_likelihood for
    validation; log_partition() -> log Z as [(forward, error), (reverse, error)], and then log_likelihood takes `log_z`;
    images_of(images, generator) -> {name: images in rows of ten}, which show what the model has learned.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.cgan import ConditionalGenerator
from models.cnn import CNN
from models.gan import Discriminator, Generator, LargeDiscriminator, PaperDiscriminator, PaperGenerator
from models.hmm import HMM
from models.maxout import MaxoutMLP
from models.mlp import MLP
from models.rbm import RBM
from models.resnet import ResNet
from models.rnn import RNN
from models.vae import VAE

Registry = dict[str, Callable[..., nn.Module]]

# A new classifier is one file and one line here. It takes `classes`, how many there are.
CLASSIFIERS: Registry = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "maxout": MaxoutMLP,
}

# Generators, which take `noise` ("unit" or "centred"), and discriminators: images in, logits [N, 1] out.
GANS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "lecture": (Generator, Discriminator),
    "paper": (PaperGenerator, PaperDiscriminator),
    "large": (PaperGenerator, LargeDiscriminator),
}

# Models that are trained by likelihood. They take `pixel_means`, the training images' [1, 28, 28] in [0, 1], or None.
LIKELIHOOD_MODELS: Registry = {
    "vae": VAE,
    "rbm": RBM,
    "rnn": RNN,
    "hmm": HMM,
}
# The flags that some of them take. Old runs had --units.
LIKELIHOOD_OPTIONS = ("hidden", "importance_samples", "gibbs_steps", "persistent_chains", "depth", "states", "units")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
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
    options: dict[str, Any] = {"classes": classes}
    if activation is not None:
        options["activation"] = ACTIVATIONS[activation]
    if batch_norm:
        options["batch_norm"] = True
    return build(CLASSIFIERS, name, options)


def build_likelihood_model(options: dict[str, Any], pixel_means: torch.Tensor | None = None) -> nn.Module:
    """The model registered as `options["model"]`, which starts at `pixel_means`, [1, 28, 28] in [0, 1], or None.

    options: all options of a run. Raises ValueError if this model does not take one of LIKELIHOOD_OPTIONS that is set,
    or refuses its value.
    """
    given = {name: options[name] for name in LIKELIHOOD_OPTIONS if options.get(name) is not None}
    return build(LIKELIHOOD_MODELS, options["model"], {**given, "pixel_means": pixel_means})


def build(registry: Registry, name: str, options: dict[str, Any]) -> nn.Module:
    model = find(registry, name)
    try:
        return model(**options)
    except TypeError as error:
        for option, value in options.items():
            if f"unexpected keyword argument '{option}'" in str(error):
                raise ValueError(f"the model {name} has no {missing(option, value)}") from error
        raise


def find(registry: dict[str, Any], name: str) -> Any:
    if name not in registry:
        raise ValueError(f"there is no {name} in models/__init__.py; it has {', '.join(registry)}")
    return registry[name]


def missing(option: str, value: Any) -> str:
    """What a model lacks, and the remedy."""
    if option in ("classes", "pixel_means"):  # not from a flag
        return f"argument {option}; add it to its __init__"
    flag = option.replace("_", "-")
    remedy = f"omit it, or add --no-{flag} if the recipe sets it" if value is True else "omit it"
    return f"option --{flag}; {remedy}"


# The kinds of runs: the name of the network that is the result in the checkpoint's state, and how it is built from the
# run's options. A script of one's own stores one of these kinds, or adds its own.
KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], nn.Module]]] = {
    "classifier": (
        "model",
        lambda o: build_classifier(o["model"], o["activation"], o["batch_norm"], len(o["classes"])),
    ),
    "gan": ("generator", lambda o: find(GANS, o["networks"])[0](noise=o["noise"])),
    "cgan": ("generator", lambda o: ConditionalGenerator(classes=len(o["classes"]), noise=o["noise"])),
    "likelihood": ("model", build_likelihood_model),
}


def build_network(options: dict[str, Any]) -> nn.Module:
    """The network that is the result of a run with these options, with new weights.

    Raises ValueError if models/ has no such network, KeyError if an option is missing.
    """
    _, build_result = find(KINDS, options["kind"])
    return build_result(options)
