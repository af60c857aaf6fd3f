"""The steps that benchmarks/speed.py times, in JAX: an epoch is one compiled function, a scan over its steps.

Networks, first weights, batches, losses and optimizers are those of the training scripts. Random numbers come from
JAX's fastest generator.
"""

import jax
import jax.numpy as jnp
import optax
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


# Networks: functions of the weights, the input (noise or images), labels (which some ignore) and a random key ---------


def mlp(weights, x, labels, key):
    for layer in weights[:-1]:
        x = nn.relu(apply(layer, x))
    return apply(weights[-1], x)


def cnn(weights, x, labels, key):
    x = x.reshape(-1, 28, 28, 1)
    for weight, bias in weights[:-1]:
        x = lax.conv_general_dilated(x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = nn.relu(x + bias)
    return apply(weights[-1], x.reshape(len(x), -1))


def maxout_network(p, scale=True):
    """Two maxout layers and a linear one. p: dropout before each; scale: whether kept pixels are divided by 1 - p."""

    def network(weights, x, labels, key):
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
        return apply(weights[3], dropout(keys[2], nn.relu(apply(weights[2], jnp.concatenate([z, y], 1))), p))

    return generate


def conditional_discriminator(p):
    def discriminate(weights, x, labels, key):
        keys = jax.random.split(key)
        hidden = [maxout(weights[0], x), maxout(weights[1], nn.one_hot(labels, 10))]
        hidden = maxout(weights[2], dropout(keys[0], jnp.concatenate(hidden, 1), p), pieces=4)
        return apply(weights[3], dropout(keys[1], hidden, p))

    return discriminate


# Steps ----------------------------------------------------------------------------------------------------------------


def updated(optimizer, weights, gradients, state):
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(weights, updates), state


def classifier_step(args, optimizer):
    network = {"mlp": mlp, "cnn": cnn, "maxout": maxout_network((0.2, 0.5, 0.5), scale=False)}[args.model]

    def step(images, labels, state, rows):
        weights, own, key = state
        key, noise = jax.random.split(key)
        x, y = images[rows].astype(jnp.float32) * ((1 - args.black) / 255) + args.black, labels[rows]

        def loss_of(weights):
            logits = network(weights, x, y, noise)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        weights, own = updated(optimizer, weights, gradients, own)
        return (weights, own, key), {"loss": loss, "accuracy": (logits.argmax(1) == y).mean()}

    return step


def gan_step(args, optimizer):
    if args.kind == "cgan":
        generate, discriminate = conditional_generator(args.dropout_g), conditional_discriminator(args.dropout_d)
    else:
        p = {"lecture": (0, 0.5, 0), "large": (0, 0.2, 0.2)}[args.networks]
        generate, discriminate = mlp, maxout_network(p)

    def step(images, labels, state, rows):
        g, d, own_g, own_d, key = state
        key, noise, dropout_g, dropout_d, again = jax.random.split(key, 5)
        x, y = images[rows].astype(jnp.float32) / 255, labels[rows]
        z = jax.random.uniform(noise, (len(rows), 100))
        z = (2 * z - 1) * 3**0.5 if args.noise == "centred" else z
        fakes, pull = jax.vjp(lambda g: nn.sigmoid(generate(g, z, y, dropout_g)), g)

        def loss_d_of(d):
            logits = discriminate(d, jnp.concatenate([x, fakes]), jnp.concatenate([y, y]), dropout_d)
            real, fake = jnp.split(logits, 2)
            return (nn.softplus(-real).mean() + nn.softplus(fake).mean()) / 2

        loss_d, gradients = jax.value_and_grad(loss_d_of)(d)
        d, own_d = updated(optimizer, d, gradients, own_d)
        loss_g_of = lambda fakes: nn.softplus(-discriminate(d, fakes, y, again)).mean()  # noqa: E731
        loss_g, gradient = jax.value_and_grad(loss_g_of)(fakes)
        g, own_g = updated(optimizer, g, pull(gradient)[0], own_g)
        return (g, d, own_g, own_d, key), {"loss_d": 2 * loss_d, "loss_g": loss_g}

    return step


def build(args, networks, images, labels):
    """A function that trains one epoch on these images, uint8 [N, 784], and labels, and returns mean metrics.

    networks: the script's, in torch, whose weights it starts from.
    """
    adam = args.optimizer == "adam"
    optimizer = optax.adam(args.lr, *args.betas) if adam else optax.sgd(args.lr, args.momentum or None)
    weights = [weights_of(network) for network in networks]
    state = (*weights, *map(optimizer.init, weights), jax.random.key(0))
    step = (classifier_step if args.kind == "classifier" else gan_step)(args, optimizer)
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
