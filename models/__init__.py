"""The networks by name, and how a run's network is rebuilt. The flags offer what is registered here.

What a network can do is decided by its attributes (`hasattr`), never by its name. All images are [N, 1, 28, 28].

classifier: a network without `sample`: images in, logits [N, classes] out.
sample(n, generator) -> images with pixels in [0, 1]; generator: a torch.Generator or None.
noise(n, generator, device) -> z [n, d], and decode(z) -> images: a generator of images from latent z.
conditional = True: it also has `classes`, the number of classes, and decode(z, labels).
loss(images) -> scalar, and log_likelihood(images) -> [N] in nats: a model of binarised images, trained by likelihood.
    likelihood: "exact", "lower bound" or "estimate". Optional: `quick`, cheaper arguments of log_likelihood for
    validation; log_partition(generator=...) -> log Z as [(forward, error), (reverse, error)], and then log_likelihood
    takes `log_z`; images_of(images, generator) -> {name: images in rows of ten}, which show what the model has learned.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
LIKELIHOOD_MODELS: Registry = {"vae": VAE, "rbm": RBM, "rnn": RNN, "hmm": HMM}
# The flags that some of them take. Old runs had --units.
LIKELIHOOD_OPTIONS = (
    "hidden", "latent", "importance_samples", "gibbs_steps", "persistent_chains", "depth", "states", "units",
)  # fmt: skip

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,  # max(0, x)
    "leaky-relu": F.leaky_relu,  # max(0, x) + 0.01 min(0, x)
    "tanh": torch.tanh,  # (e^x - e^-x) / (e^x + e^-x)
    "sigmoid": torch.sigmoid,  # 1 / (1 + e^-x)
}


def build(registry: Registry, name: str, options: dict[str, Any]) -> nn.Module:
    """The network registered as `name`. Options that are None or False are left to the network.

    Raises ValueError if there is no such network, or it does not take one of the options or its value.
    """
    given = {option: value for option, value in options.items() if value is not None and value is not False}
    network = find(registry, name)
    try:
        return network(**given)
    except TypeError as error:
        for option, value in given.items():
            if f"unexpected keyword argument '{option}'" in str(error):
                flag = option.replace("_", "-")
                remedy = f"omit it{f', or add --no-{flag} if the recipe sets it' if value is True else ''}"
                missing = f"option --{flag}; {remedy}, or add it to the model's __init__"
                raise ValueError(f"the model {name} has no {missing}") from error
        raise


def find(registry: dict[str, Any], name: str) -> Any:
    if name not in registry:
        raise ValueError(f"there is no {name} in models/__init__.py; it has {', '.join(registry)}")
    return registry[name]


def build_classifier(options: dict[str, Any]) -> nn.Module:
    """The classifier that these options describe. Without --activation, it keeps its default activation."""
    activation = ACTIVATIONS[options["activation"]] if options.get("activation") else None
    given = {"activation": activation, "batch_norm": options.get("batch_norm"), "classes": len(options["classes"])}
    return build(CLASSIFIERS, options["model"], given)


def build_likelihood_model(options: dict[str, Any], pixel_means: Tensor | None = None) -> nn.Module:
    """The model of a run with these options, which starts at `pixel_means`, [1, 28, 28] in [0, 1], or None."""
    given = {name: options.get(name) for name in LIKELIHOOD_OPTIONS}
    return build(LIKELIHOOD_MODELS, options["model"], {**given, "pixel_means": pixel_means})


# Kind of a run -> the name of the resulting network in the checkpoint's state, and how to build that network from the
# run's options. A script of your own stores one of these kinds, or adds a new one here.
KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], nn.Module]]] = {
    "classifier": ("model", build_classifier),
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
