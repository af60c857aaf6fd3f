"""The steps that benchmarks/speed.py times, in JAX: an epoch is one compiled function, a scan over its steps.

Networks, first weights, batches, losses and optimizers are those of the training scripts. Random numbers come from
JAX's fastest generator.
"""

import jax
import jax.numpy as jnp
from jax import lax, nn

jax.config.update("jax_default_prng_impl", "rbg")


def weights_of(network):
    """A torch network's layers as (weights [inputs, outputs] or [height, width, inputs, outputs], biases)."""
    tensors = [jnp.asarray(tensor.detach().cpu().numpy().T) for tensor in network.parameters()]
    weights = [w.transpose(1, 0, 2, 3) if w.ndim == 4 else w for w in tensors[::2]]
    return list(zip(weights, tensors[1::2]))


def apply(layer, x):
    return x @ layer[0] + layer[1]


def maxout(layer, x, pieces=5):
    return apply(layer, x).reshape(len(x), -1, pieces).max(-1)


def dropout(key, x, p, scale=True):
    return jnp.where(jax.random.bernoulli(key, 1 - p, x.shape), x / (1 - p if scale else 1), 0) if p else x


# Networks: functions of the weights, the input (noise or images, and labels) and a random key -------------------------


def mlp(weights, x, key):
    for layer in weights[:-1]:
        x = nn.relu(apply(layer, x))
    return apply(weights[-1], x)


def cnn(weights, x, key):
    x = x.reshape(-1, 28, 28, 1)
    for weight, bias in weights[:-1]:
        x = lax.conv_general_dilated(x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = nn.relu(x + bias)
    return apply(weights[-1], x.reshape(len(x), -1))


def maxout_network(p, scale=True):
    """Two maxout layers and a linear one. p: dropout before each; scale: whether kept pixels are divided by 1 - p."""

    def network(weights, x, key):
        keys = jax.random.split(key, 3)
        x = maxout(weights[0], dropout(keys[0], x, p[0], scale))
        x = maxout(weights[1], dropout(keys[1], x, p[1]))
        return apply(weights[2], dropout(keys[2], x, p[2]))

    return network


def conditional_generator(p):
    def generate(weights, z, labels, key):
        keys = jax.random.split(key, 3)
        z = dropout(keys[0], nn.relu(apply(weights[0], z)), p)
        y = dropout(keys[1], nn.relu(apply(weights[1], nn.one_hot(labels, 10))), p)
        hidden = dropout(keys[2], nn.relu(apply(weights[2], jnp.concatenate([z, y], 1))), p)
        return nn.sigmoid(apply(weights[3], hidden))

    return generate


def conditional_discriminator(p):
    def discriminate(weights, x, labels, key):
        keys = jax.random.split(key)
        hidden = [maxout(weights[0], x), maxout(weights[1], nn.one_hot(labels, 10))]
        hidden = maxout(weights[2], dropout(keys[0], jnp.concatenate(hidden, 1), p), pieces=4)
        return apply(weights[3], dropout(keys[1], hidden, p))

    return discriminate


# Optimizers: initial state, and a function that returns new weights and a new state -----------------------------------


def adam(rate, beta1, beta2):
    def update(weights, gradients, state):
        m, v, t = state
        t = t + 1
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, m, gradients)
        v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, v, gradients)
        step, scale = rate / (1 - beta1**t), 1 / jnp.sqrt(1 - beta2**t)
        weights = jax.tree.map(lambda w, m, v: w - step * m / (jnp.sqrt(v) * scale + 1e-8), weights, m, v)
        return weights, (m, v, t)

    return lambda weights: (*(jax.tree.map(jnp.zeros_like, weights) for _ in "mv"), jnp.zeros(())), update


def sgd(rate, momentum):
    def update(weights, gradients, state):
        state = jax.tree.map(lambda b, g: momentum * b + g, state, gradients)
        return jax.tree.map(lambda w, b: w - rate * b, weights, state), state

    return lambda weights: jax.tree.map(jnp.zeros_like, weights), update


# Steps ----------------------------------------------------------------------------------------------------------------


def classifier_step(network, update, black):
    def step(images, labels, state, rows):
        weights, optimizer, key = state
        key, own = jax.random.split(key)
        x, y = images[rows].astype(jnp.float32) * ((1 - black) / 255) + black, labels[rows]

        def loss_of(weights):
            logits = network(weights, x, own)
            return -jnp.take_along_axis(nn.log_softmax(logits), y[:, None], 1).mean(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        weights, optimizer = update(weights, gradients, optimizer)
        return (weights, optimizer, key), {"loss": loss, "accuracy": (logits.argmax(1) == y).mean()}

    return step


def gan_step(generate, discriminate, update, centred, simultaneous):
    def step(images, labels, state, rows):
        g, d, optimizer_g, optimizer_d, key = state
        key, noise, own_g, own_d, again = jax.random.split(key, 5)
        x, y = images[rows].astype(jnp.float32) / 255, labels[rows]
        z = jax.random.uniform(noise, (len(rows), 100))
        z = (2 * z - 1) * 3**0.5 if centred else z
        fakes, pull = jax.vjp(lambda g: generate(g, z, y, own_g), g)

        def loss_d_of(d):
            logits = discriminate(d, jnp.concatenate([x, fakes]), jnp.concatenate([y, y]), own_d)
            real, fake = jnp.split(logits, 2)
            return (nn.softplus(-real).mean() + nn.softplus(fake).mean()) / 2

        loss_d, gradients = jax.value_and_grad(loss_d_of)(d)
        new_d, optimizer_d = update(d, gradients, optimizer_d)
        d = d if simultaneous else new_d
        loss_g, gradient = jax.value_and_grad(lambda fakes: nn.softplus(-discriminate(d, fakes, y, again)).mean())(
            fakes
        )
        g, optimizer_g = update(g, *pull(gradient), optimizer_g)
        return (g, new_d, optimizer_g, optimizer_d, key), {"loss_d": 2 * loss_d, "loss_g": loss_g}

    return step


def build(args, networks, images, labels):
    """A function that trains one epoch on these images, uint8 [N, 784], and labels, and returns mean metrics.

    networks: the script's, in torch, whose weights it starts from.
    """
    init, update = adam(args.lr, *args.betas) if args.optimizer == "adam" else sgd(args.lr, args.momentum)
    weights = [weights_of(network) for network in networks]
    state = (*weights, *map(init, weights), jax.random.key(0))
    if hasattr(args, "model"):
        network = {"mlp": mlp, "cnn": cnn, "maxout": maxout_network((0.2, 0.5, 0.5), scale=False)}[args.model]
        step = classifier_step(network, update, args.black)
    else:
        if hasattr(args, "networks"):
            discriminate = maxout_network((0.2, 0.5, 0.5) if args.networks == "paper" else (0, 0.5, 0))
            g, d = lambda w, z, _, key: nn.sigmoid(mlp(w, z, key)), lambda w, x, _, key: discriminate(w, x, key)
        else:
            g, d = conditional_generator(args.dropout_g), conditional_discriminator(args.dropout_d)
        step = gan_step(g, d, update, args.noise == "centred", args.simultaneous)
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    @jax.jit
    def train(state, order):
        return lax.scan(lambda state, rows: step(images, labels, state, rows), state, order)

    def epoch(order):
        """order: row numbers [steps, batch size]."""
        nonlocal state
        state, metrics = train(state, jnp.asarray(order))
        return {name: float(metrics[name].mean()) for name in sorted(metrics, key=len)}  # loss, accuracy

    return epoch
