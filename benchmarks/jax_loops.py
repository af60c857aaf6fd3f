"""The steps that benchmarks/speed.py times, in JAX: an epoch is one compiled function, a scan over its steps.

Networks, batches, losses and optimizers are those of the training scripts, and so are the initial weights of the recipe
`lecture`. Random numbers come from JAX's fastest generator.
"""

import jax
import jax.numpy as jnp
from jax import lax, nn

jax.config.update("jax_default_prng_impl", "rbg")


def linear(key, inputs, outputs, limit=None):
    """Weights and biases U(-limit, limit), by default torch's."""
    limit = inputs**-0.5 if limit is None else limit
    weight, bias = jax.random.split(key)
    return (
        jax.random.uniform(weight, (inputs, outputs), minval=-limit, maxval=limit),
        jax.random.uniform(bias, (outputs,), minval=-limit, maxval=limit),
    )


def linears(key, *sizes, limit=None):
    keys = jax.random.split(key, len(sizes))
    return [linear(k, *pair, limit=limit) for k, pair in zip(keys, sizes)]


def apply(layer, x):
    return x @ layer[0] + layer[1]


def maxout(layer, x, pieces=5):
    return apply(layer, x).reshape(len(x), -1, pieces).max(-1)


def dropout(key, x, share):
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0) if share else x


# Networks: name -> initial weights, and a function of them, of the input and of a random key --------------------------


def init_mlp(key):
    return linears(key, (784, 256), (256, 128), (128, 64), (64, 10))


def mlp(weights, x, key):
    for layer in weights[:-1]:
        x = nn.relu(apply(layer, x))
    return apply(weights[-1], x)


def init_cnn(key):
    *keys, last = jax.random.split(key, 4)
    filters = [linear(k, 9 * i, o) for k, (i, o) in zip(keys, ((1, 64), (64, 128), (128, 256)))]
    filters = [(weight.reshape(3, 3, -1, weight.shape[1]), bias) for weight, bias in filters]
    return [*filters, linear(last, 4096, 10)]


def cnn(weights, x, key):
    x = x.reshape(-1, 28, 28, 1)
    for weight, bias in weights[:-1]:
        x = lax.conv_general_dilated(x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = nn.relu(x + bias)
    return apply(weights[-1], x.reshape(len(x), -1))


def init_maxout(key):
    return linears(key, (784, 1200), (240, 1200), (240, 10), limit=0.005)


def maxout_mlp(weights, x, key):
    keys = jax.random.split(key, 3)
    x = jnp.where(jax.random.bernoulli(keys[0], 0.8, x.shape), x, 0)
    x = dropout(keys[1], maxout(weights[0], x), 0.5)
    return apply(weights[2], dropout(keys[2], maxout(weights[1], x), 0.5))


def generator(weights, z, labels, key):
    for layer in weights[:-1]:
        z = nn.relu(apply(layer, z))
    return nn.sigmoid(apply(weights[-1], z))


def discriminator(shares):
    """shares: dropped before each layer."""

    def discriminate(weights, x, labels, key):
        keys = jax.random.split(key, 3)
        for layer, share, k in zip(weights[:-1], shares, keys):
            x = maxout(layer, dropout(k, x, share))
        return apply(weights[-1], dropout(keys[2], x, shares[2]))

    return discriminate


def init_conditional_generator(key):
    return linears(key, (100, 200), (10, 1000), (1200, 1200), (1200, 784))


def conditional_generator(share):
    def generate(weights, z, labels, key):
        keys = jax.random.split(key, 3)
        z = dropout(keys[0], nn.relu(apply(weights[0], z)), share)
        y = dropout(keys[1], nn.relu(apply(weights[1], nn.one_hot(labels, 10))), share)
        hidden = dropout(keys[2], nn.relu(apply(weights[2], jnp.concatenate([z, y], 1))), share)
        return nn.sigmoid(apply(weights[3], hidden))

    return generate


def init_conditional_discriminator(key):
    return linears(key, (784, 1200), (10, 250), (290, 960), (240, 1))


def conditional_discriminator(share):
    def discriminate(weights, x, labels, key):
        keys = jax.random.split(key)
        hidden = [maxout(weights[0], x), maxout(weights[1], nn.one_hot(labels, 10))]
        hidden = maxout(weights[2], dropout(keys[0], jnp.concatenate(hidden, 1), share), pieces=4)
        return apply(weights[3], dropout(keys[1], hidden, share))

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


def build(case, args, images, labels):
    """A function that trains one epoch on these images, uint8 [N, 784], and labels, and returns mean metrics."""
    rate, momentum = args.lr, args.momentum
    init, update = adam(rate, *args.betas) if args.optimizer == "adam" else sgd(rate, momentum)
    first, second, key = jax.random.split(jax.random.key(0), 3)
    name = case.split(" batch")[0]
    if name in ("mlp", "cnn", "maxout"):
        weigh, network = {
            "mlp": (init_mlp, mlp), "cnn": (init_cnn, cnn), "maxout": (init_maxout, maxout_mlp),
        }[name]  # fmt: skip
        weights = weigh(first)
        state, step = (weights, init(weights), key), classifier_step(network, update, args.black)
    else:
        if name.startswith("cgan"):
            g, d = init_conditional_generator(first), init_conditional_discriminator(second)
            networks = conditional_generator(args.dropout_g), conditional_discriminator(args.dropout_d)
        elif args.networks == "paper":
            g = linears(first, (100, 1200), (1200, 1200), (1200, 784), limit=0.05)
            d = linears(second, (784, 1200), (240, 1200), (240, 1), limit=0.005)
            networks = generator, discriminator((0.2, 0.5, 0.5))
        else:
            g = linears(first, (100, 128), (128, 256), (256, 784))
            d = linears(second, (784, 1280), (256, 640), (128, 1))
            networks = generator, discriminator((0, 0.5, 0))
        state = (g, d, init(g), init(d), key)
        step = gan_step(*networks, update, args.noise == "centred", args.simultaneous)
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
