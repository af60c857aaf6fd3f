"""models/vae.py, rbm.py, rnn.py and hmm.py: each against what enumeration, quadrature or the textbook says."""

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS

import evaluate
import train_likelihood
from datasets import binarise, load
from measures.likelihood import likelihood_measures
from models import LIKELIHOOD_MODELS
from models.hmm import HMM
from models.rbm import RBM
from models.rnn import RNN
from models.vae import VAE

GOLDEN = Path(__file__).resolve().parent.parent.parent / "shared" / "golden" / "rbm_cd25.npz"
MODELS = {
    "vae": VAE,
    "iwae": partial(VAE, importance_samples=3),
    "cd": partial(RBM, hidden=50, gibbs_steps=2),
    "pcd": partial(RBM, hidden=50, gibbs_steps=5, persistent_chains=50),
    "rnn": partial(RNN, hidden=32, units=2, depth=2),
    "hmm": partial(HMM, states=30),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def striped_images(n):
    """Binary images [n, 1, 28, 28] with horizontal or vertical stripes; a tenth of the pixels is flipped."""
    stripes = (torch.arange(28) // 4 % 2).float().expand(28, 28)
    kind = torch.rand(n, 1, 1) < 0.5
    return (torch.where(kind, stripes, stripes.T) - (torch.rand(n, 28, 28) < 0.1).float()).abs().unsqueeze(1)


def all_binary(n):
    """All 2^n vectors of n bits, [2^n, n]."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)))


def grey(height, width):
    """The means of pixels that are as often black as white."""
    return torch.full((1, height, width), 0.5)


def randomise(model, scale=1.0):
    """Weights so large that no two images are equally probable by accident."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale)
    return model


# The contract of all four ---------------------------------------------------------------------------------------------
@each_model
def test_samples_are_probabilities_that_the_generator_decides_as_are_the_models_own_images(build):
    images = striped_images(20)
    model, state = build(pixel_means=images.mean(0)), torch.get_rng_state()
    a, b, c = (model.sample(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert a.shape == (4, 1, 28, 28)
    assert 0 <= a.min() <= a.max() <= 1
    assert not a.requires_grad
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    grids = model.images_of(images, torch.Generator().manual_seed(0)).values()
    assert torch.equal(torch.get_rng_state(), state), "it drew from torch's own generator"
    assert grids
    for grid in grids:  # rows of ten, the first of them the images
        assert grid.shape == (len(grid) // 10 * 10, 1, 28, 28)
        assert torch.equal(grid[:10], images[:10])
        assert 0 <= grid.min() <= grid.max() <= 1


@each_model
def test_a_new_model_starts_at_the_mean_of_each_pixel(build):
    means = torch.full((1, 28, 28), 0.1)
    means[:, 7:21, 7:21] = 0.9
    shown = build(pixel_means=means).sample(100, torch.Generator().manual_seed(0)).mean(0)
    assert torch.corrcoef(torch.stack([shown.flatten(), means.flatten()]))[0, 1] > 0.5


@each_model
def test_bfloat16_hardly_changes_the_loss(build):
    means = striped_images(200).mean(0)
    model, images = build(pixel_means=means), striped_images(20)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(images)
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01, abs=1)


@pytest.mark.parametrize(
    ("build", "kind"), [(lambda: RBM(hidden=6), "estimate"), (lambda: RNN(4, 2), "exact"), (lambda: HMM(4), "exact")]
)
def test_the_measures_are_the_mean_and_its_error_of_the_models_own_log_likelihood(build, kind, capsys):
    model, images, given = build(), striped_images(20), {}
    if kind == "estimate":
        model.log_partition = lambda generator: [(500.0, 0.1), (501.5, 0.2)]
        given = {"log_z": 500.0}
    scores = model.log_likelihood(images, **given)
    measures = likelihood_measures(model, images)
    evaluate.print_likelihood(measures)
    assert measures["kind"] == kind
    assert measures["log_likelihood"] == pytest.approx(scores.mean().item())
    assert measures["log_likelihood_error"] == pytest.approx(scores.std().item() / 20**0.5)
    assert f"{measures['log_likelihood']:.2f} ±" in capsys.readouterr().out
    if given:
        assert measures["log_likelihood_reverse"] == pytest.approx(measures["log_likelihood"] - 1.5)


# Training and evaluating ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", LIKELIHOOD_MODELS)
def test_every_model_is_trained_and_validated_by_the_script(model, tmp_path, monkeypatch):
    """validate() gives the quick log-likelihood of the held-out images, the last ones, of the EMA."""
    monkeypatch.setattr(RBM, "quick", {"temperatures": 100})
    flags = ["--model", model, "--dry-run", "--val-size", "20", "--ema", "0.5", "--output-dir", str(tmp_path / "run")]
    size = ["--states", "5"] if model == "hmm" else ["--hidden", "5"]
    result = train_likelihood.main([*DIGITS, *flags, *size])
    network, _ = evaluate.load_network(tmp_path / "run", "cpu")
    unseen = binarise(load("digits", "")[0][-20:], train_likelihood.VALIDATION_SEED) / 255
    expected = network.log_likelihood(unseen, **getattr(network, "quick", {})).mean().item()
    assert result["val_log_likelihood"] == pytest.approx(expected, rel=0.02 if model == "vae" else 1e-5)
    assert -784 < expected < -50


def test_the_shown_samples_are_the_emas_and_do_not_begin_with_the_random_numbers_of_the_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(RBM, "sample", lambda self, n, generator: seen.extend([self, generator.initial_seed()]))
    ema = lambda run: seen.append(run.state["ema"].model)  # noqa: E731
    monkeypatch.setattr(train_likelihood.utils, "train", lambda run, *_, sample, **__: (sample(), ema(run)))
    train_likelihood.main([*DIGITS, "--model", "rbm", "--hidden", "5", "--ema", "0.9", "--seed", "3"])
    sampled, seed, averaged = seen
    assert sampled is averaged
    assert seed != 3


# VAE ------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_vae():
    """A VAE whose one latent number is integrated over exactly, and images [3, 1, 28, 28]."""
    model = VAE(latent=1, hidden=8)
    model.decoder[-1].weight.data.mul_(0.3)  # a posterior as wide as an encoder that has not been trained
    return model, striped_images(3)


def quadrature(model, images):
    """log p(x) = log of the integral of p(x|z) N(z; 0, 1) dz, [N]."""
    z = torch.linspace(-8, 8, 4001).unsqueeze(1)
    log_p = -F.binary_cross_entropy_with_logits(
        model.decoder(z).unsqueeze(1).expand(-1, len(images), -1).double(),
        images.flatten(1).expand(len(z), -1, -1).double(),
        reduction="none",
    ).sum(2)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).double()
    return (log_p + prior).logsumexp(0) + math.log(16 / 4000)


def test_vae_bound_of_many_samples_is_the_integral(small_vae):
    model, images = small_vae
    with torch.no_grad():
        exact = quadrature(model, images)
    rows = []
    model.decoder.register_forward_hook(lambda module, inputs, output: rows.append(output.numel() // 784))
    for block in (700, 20_000):  # a part of one image's samples; all samples of all images
        bound = model.log_likelihood(images, block=block)
        assert torch.allclose(bound.double(), exact, atol=0.15), (bound, exact)
        assert max(rows) <= block, "it decodes no more than a block at once"
        assert sum(rows) == 15_000
        rows.clear()


def test_vae_elbo_with_analytic_kl_is_the_mean_of_log_w(small_vae):
    model, images = small_vae
    with torch.no_grad():
        log_w = model.log_weights(images, *model.encode(images), 4000)
        elbo = -torch.stack([model.loss(images) for _ in range(500)])
    error = log_w.mean(1).std() / 4000**0.5 + elbo.std() / 500**0.5
    assert abs(log_w.mean() - elbo.mean()) < 4 * error
    assert error < 1


def test_vae_more_samples_tighten_the_bound(small_vae):
    model, images = small_vae
    bounds = []
    for k in (1, 5, 50):
        model.importance_samples = k
        with torch.no_grad():
            bounds.append(-torch.stack([model.loss(images) for _ in range(200)]).mean())
    assert bounds[0] < bounds[1] < bounds[2] < quadrature(model, images).mean() + 0.1


# RBM ------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_rbm():
    """12 visible and 8 hidden units, and the exact log Z."""
    rbm = randomise(RBM(hidden=8, pixel_means=torch.rand(12)))
    h = all_binary(8).double()
    inputs = h @ rbm.weight.detach().double() + rbm.visible_bias.detach()  # of the visible units
    log_p = h @ rbm.hidden_bias.detach().double() + F.softplus(inputs).sum(1)  # log of the sum over v of p*(v, h)
    return rbm, log_p.logsumexp(0).item()


def test_rbm_ais_finds_log_z_from_both_sides_with_which_likelihoods_sum_to_1(small_rbm):
    rbm, log_z = small_rbm
    assert rbm.log_likelihood(all_binary(12), log_z).logsumexp(0).item() == pytest.approx(0, abs=1e-4)
    for estimate, error in rbm.log_partition(400, 500, torch.Generator().manual_seed(0)):
        assert 0 < error < 0.05
        assert estimate == pytest.approx(log_z, abs=4 * error)


def test_rbm_gibbs_samples_its_own_distribution(small_rbm):
    rbm, log_z = small_rbm
    v = all_binary(12)
    p = (-rbm.free_energy(v).detach() - log_z).exp()
    samples = rbm.gibbs(torch.zeros(20_000, 12), 100)
    assert torch.allclose(samples.mean(0), p @ v, atol=0.02)
    assert torch.allclose(samples.T @ samples / 20_000, (v * p[:, None]).T @ v, atol=0.02)


def test_rbm_gradient_is_the_textbook_cd_update(monkeypatch):
    """Hinton 2002: dW = <v h>_data - <v h>_reconstruction, db = <v>_data - <v>_recon., da = <h>_data - <h>_recon."""
    rbm = randomise(RBM(hidden=20, gibbs_steps=3), 0.1)
    images, chain = striped_images(30), striped_images(30).flatten(1)
    calls = []
    monkeypatch.setattr(rbm, "gibbs", lambda v, steps, *rest: calls.append((v, steps)) or chain)
    rbm.loss(images).backward()
    (start, steps), data = calls[0], images.flatten(1)
    assert steps == 3
    assert torch.equal(start, data), "CD starts at the data"
    h_data, h_chain = (torch.sigmoid(v @ rbm.weight.T + rbm.hidden_bias).detach() for v in (data, chain))
    assert torch.allclose(-rbm.weight.grad, (h_data.T @ data - h_chain.T @ chain) / 30, atol=1e-5)
    assert torch.allclose(-rbm.visible_bias.grad, (data - chain).mean(0), atol=1e-6)
    assert torch.allclose(-rbm.hidden_bias.grad, (h_data - h_chain).mean(0), atol=1e-5)


def test_rbm_chains_persist_in_training_alone():
    rbm, images = RBM(hidden=20, persistent_chains=7), striped_images(10)
    start = rbm.chains.clone()
    rbm.eval().loss(images)
    assert torch.equal(rbm.chains, start)
    torch.manual_seed(1)
    rbm.train().loss(images)
    torch.manual_seed(1)
    assert torch.equal(rbm.chains.float(), rbm.gibbs(start.float(), 1)), "they start where they were"
    assert rbm.state_dict()["chains"].shape == (7, 784)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}")
def test_rbm_log_z_of_the_authors_network(data_dir):
    """451.28 (Salakhutdinov & Murray 2008, table 1: CD-25, 500 units). They number pixels by columns: transposed."""
    train, _ = load("mnist", data_dir)
    test, _ = load("mnist", data_dir, train=False)
    rbm = RBM(pixel_means=train.float().mean(0).transpose(1, 2) / 255)
    for name, values in np.load(GOLDEN).items():
        getattr(rbm, name).data.copy_(torch.from_numpy(values))
    pixels = torch.bernoulli(test.transpose(2, 3).float() / 255)
    assert -rbm.free_energy(pixels.flatten(1)).mean().item() == pytest.approx(364.926, abs=0.2)
    for estimate, error in rbm.log_partition(200, 3500, torch.Generator().manual_seed(0)):
        assert error < 0.3
        assert estimate == pytest.approx(451.28, abs=0.3 + error)


# RNN ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [1, 3])
def test_rnn_probabilities_sum_to_1(depth):
    rnn = randomise(RNN(hidden=5, units=3, depth=depth, pixel_means=grey(3, 3)))
    images = all_binary(9).view(-1, 1, 3, 3)
    log_p = rnn.log_likelihood(images)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert log_p.std() > 1  # far from uniform
    assert rnn.loss(images).item() == pytest.approx(-log_p.mean().item())


def test_rnn_uses_all_earlier_pixels_and_no_later_ones():
    rnn = randomise(RNN(hidden=8, units=32, pixel_means=grey(3, 3)), 0.3)
    rows = torch.rand(1, 3, 3, requires_grad=True)
    logits = rnn.logits(rows, rnn.contexts(F.pad(rows, (0, 0, 1, -1)))[0]).flatten()
    seen = torch.stack([torch.autograd.grad(logit, rows, retain_graph=True)[0].flatten() != 0 for logit in logits])
    assert torch.equal(seen, torch.ones(9, 9).tril(-1).bool())


def test_deeper_layers_of_the_rnn_add_to_the_units_below():
    rnn = randomise(RNN(hidden=5, units=3, depth=2, pixel_means=grey(3, 3)))
    images = all_binary(9).view(-1, 1, 3, 3)
    for parameter in rnn.deeper.parameters():
        parameter.data.zero_()
    nothing_added, rnn.deeper = rnn.log_likelihood(images), torch.nn.ModuleList()
    assert torch.equal(nothing_added, rnn.log_likelihood(images))


def test_rnn_samples_its_own_distribution():
    rnn = randomise(RNN(hidden=5, units=3, pixel_means=grey(2, 3)))
    x = all_binary(6)
    p = rnn.log_likelihood(x.view(-1, 1, 2, 3)).exp()
    sampled = rnn.sample(20_000, torch.Generator().manual_seed(0))  # given the pixels before; the mean is the marginal
    assert torch.allclose(sampled.mean(0).flatten(), p @ x, atol=0.02)
    top = torch.tensor([1.0, 0.0, 1.0])
    given = (x[:, :3] == top).all(1)
    completed = rnn.complete(top.repeat(20_000, 1, 2, 1), 1, torch.Generator().manual_seed(0))
    assert torch.equal(completed[:, 0, 0], top.expand(20_000, 3))
    assert torch.allclose(completed[:, 0, 1].mean(0), p[given] @ x[given, 3:] / p[given].sum(), atol=0.02)


# HMM ------------------------------------------------------------------------------------------------------------------
def test_hmm_likelihood_is_the_sum_over_all_paths_and_viterbis_is_the_best():
    hmm = randomise(HMM(states=3, pixel_means=grey(4, 2)))  # 4 rows of 2 pixels
    images = all_binary(8).view(-1, 1, 4, 2)
    parts = hmm.initial.softmax(0), hmm.transition.softmax(1), hmm.emission.sigmoid()
    pi, A, p = (part.detach().double() for part in parts)
    paths, joint = torch.tensor(list(itertools.product(range(3), repeat=4))), []
    for path in paths:
        of_path = pi[path[0]].log() + sum(A[i, j].log() for i, j in itertools.pairwise(path))
        joint.append(of_path + torch.where(images[:, 0] == 1, p[path], 1 - p[path]).log().sum((1, 2)))
    joint = torch.stack(joint, 1)  # log P(x, s), float64 [N, paths]
    log_p = hmm.log_likelihood(images)
    assert torch.allclose(log_p.double(), joint.logsumexp(1), atol=1e-5)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert hmm.loss(images).item() == pytest.approx(-log_p.mean().item(), abs=1e-5)
    assert torch.equal(hmm.viterbi(images), paths[joint.argmax(1)])


def test_hmm_stays_finite_far_from_the_data():
    """Black images under states that write white ones: e^-1400, which no float can hold."""
    hmm = HMM(states=4)
    hmm.emission.data.fill_(50.0)
    loss = hmm.loss(torch.zeros(2, 1, 28, 28))
    loss.backward()
    assert loss.item() == pytest.approx(50 * 784, rel=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in hmm.parameters())


def test_hmm_samples_follow_the_transitions():
    hmm = HMM(states=3, pixel_means=grey(4, 2))
    with torch.no_grad():
        hmm.initial.copy_(torch.tensor([20.0, 0, 0]))
        hmm.transition.copy_(20 * torch.eye(3).roll(1, 1))  # 0 -> 1 -> 2 -> 0
    assert torch.allclose(hmm.sample(5), hmm.emission[[0, 1, 2, 0]].sigmoid().expand(5, 1, 4, 2))
