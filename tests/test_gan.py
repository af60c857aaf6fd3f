"""The networks and the steps of train_gan.py and train_cgan.py, apart from any process."""

import copy

import pytest
import torch
import torch.nn as nn
from helpers import DIGITS

import train_cgan
import train_gan
from datasets import Batches
from engine import flags as engine_flags
from engine.adversarial import init_weights
from models import GANS
from models.cgan import ConditionalDiscriminator, ConditionalGenerator
from models.gan import Discriminator, Generator

PAIRS = {"gan": train_gan, "cgan": train_cgan}


def build(script, *flags):
    """The state and the step of a training script, as (args, state, train_step)."""
    module = PAIRS[script]
    args = engine_flags.parse_args(module.get_args_parser(), module.RECIPES, argv=[*DIGITS, *flags])
    images = torch.full((100, 1, 28, 28), 51, dtype=torch.uint8)  # 0.2 * 255
    batches = Batches(images, torch.arange(100) % 10, 1, "cpu", black=0.0)
    state, train_step, _ = module.build(args, torch.device("cpu"), batches)
    return args, state, train_step


def without_chance(state):
    """Switch dropout off and give the same noise each time; returns that noise."""
    for name in ("generator", "discriminator"):
        for module in state[name].modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    z = torch.rand(6, 100)
    state["generator"].noise = lambda *_, **__: z
    return z


# Networks -------------------------------------------------------------------------------------------------------------
def lecture_maxout(inputs, outputs, k, dropout):
    """The lecture's Maxout holds its layers in `self.model` and takes the max over k consecutive outputs."""
    layer = nn.Module()
    layer.model = nn.Sequential(*([nn.Dropout(0.5)] if dropout else []), nn.Linear(inputs, outputs * k))
    layer.forward = lambda x: layer.model(x).view(-1, outputs, k).max(-1)[0]
    return layer


def test_lecture_weights_load_and_give_the_lectures_images_and_probabilities():
    theirs = nn.Module()
    theirs.model = nn.Sequential(
        nn.Linear(100, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid()
    )
    generator = Generator()
    generator.load_state_dict(theirs.state_dict(), strict=True)
    z = torch.rand(5, 100)
    assert torch.allclose(generator(z).flatten(1), theirs.model(z))

    theirs = nn.Module()
    first, second = lecture_maxout(784, 256, 5, dropout=False), lecture_maxout(256, 128, 5, dropout=True)
    theirs.model = nn.Sequential(first, second, nn.Linear(128, 1), nn.Sigmoid())
    theirs.eval()
    discriminator = Discriminator().eval()
    discriminator.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(5, 1, 28, 28)
    assert torch.allclose(discriminator(x).sigmoid(), theirs.model(x.flatten(1)), atol=1e-6)


@pytest.mark.parametrize("network", [Generator, ConditionalGenerator])
def test_noise_is_uniform_as_in_the_lecture_and_the_paper(network):
    z = network(noise="unit").noise(1000)
    assert 0 <= z.min() <= z.max() < 1
    assert z.mean() == pytest.approx(0.5, abs=0.01)
    z = network(noise="centred").noise(1000)
    assert z.abs().max() == pytest.approx(3**0.5, abs=0.01)
    assert z.abs().max() <= 3**0.5
    assert z.std() == pytest.approx(1, abs=0.01)


def sizes(network):
    return [tuple(p.shape) for p in network.parameters() if p.dim() == 2]


PAPER, LARGE = [(0.2, 784), (0.5, 240), (0.5, 240)], [(0.2, 240), (0.2, 240)]


@pytest.mark.parametrize(("name", "dropout"), [("paper", PAPER), ("large", LARGE)])
def test_paper_and_large_networks_have_the_papers_layers_and_their_own_dropout(name, dropout):
    generator, discriminator = (network() for network in GANS[name])
    assert sizes(generator) == [(1200, 100), (1200, 1200), (784, 1200)]
    assert sizes(discriminator) == [(240 * 5, 784), (240 * 5, 240), (1, 240)]
    seen = []
    for module in discriminator.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, x, y: seen.append((module.p, y.shape[1])))
    discriminator(torch.rand(500, 1, 28, 28))
    assert seen == dropout


@pytest.mark.parametrize("script", PAIRS)
def test_paper_init_has_the_papers_limits_and_starts_at_the_pixel_means(script):
    _, state, _ = build(script, "--recipe", "paper")
    for name, limit in (("generator", 0.05), ("discriminator", 0.005)):
        linear = [module for module in state[name].modules() if isinstance(module, nn.Linear)]
        for layer in (layer for layer in linear if layer.in_features != 10):  # not those of labels
            assert 0.95 * limit < layer.weight.abs().max() <= limit
            assert layer.bias is None or layer.out_features == 784 or not layer.bias.any()
    last = list(state["generator"].parameters())[-1]
    assert torch.allclose(last.sigmoid(), torch.full((784,), 0.2))


def test_paper_init_leaves_the_layers_of_any_number_of_labels_alone():
    pair = ConditionalGenerator(classes=3), ConditionalDiscriminator(classes=3)
    init_weights(*pair, "paper", torch.full((1, 28, 28), 0.2))
    assert pair[0].from_y.weight.abs().max() > 0.3
    assert pair[1].from_y.model[0].weight.abs().max() > 0.3
    assert pair[0].from_z.weight.abs().max() <= 0.05


@pytest.mark.parametrize("script", PAIRS)
def test_he_init_makes_the_first_images_differ(script):
    def spread(*flags):
        state = build(script, "--noise", "centred", *flags)[1]
        given = [torch.zeros(1000, dtype=torch.int64)] if script == "cgan" else []
        return state["generator"].eval()(state["generator"].noise(1000), *given).logit().std(0).mean()

    assert spread("--init", "torch") < 0.2
    assert spread("--init", "he") > 0.4


def test_conditional_generator_has_the_papers_layers_with_relu_on_both_branches():
    generator = ConditionalGenerator().eval()
    z, labels = torch.rand(4, 100) - 0.5, torch.tensor([0, 3, 9, 3])
    w = dict(generator.named_parameters())
    assert [tuple(w[f"{name}.weight"].shape) for name in ("from_z", "from_y", "joint", "output")] == [
        (200, 100), (1000, 10), (1200, 1200), (784, 1200)
    ]  # fmt: skip
    from_z = (z @ w["from_z.weight"].T + w["from_z.bias"]).clamp(min=0)
    from_y = (torch.eye(10)[labels] @ w["from_y.weight"].T + w["from_y.bias"]).clamp(min=0)
    joint = (torch.cat([from_z, from_y], 1) @ w["joint.weight"].T + w["joint.bias"]).clamp(min=0)
    by_hand = 1 / (1 + torch.exp(-(joint @ w["output.weight"].T + w["output.bias"])))
    assert torch.allclose(generator(z, labels).flatten(1), by_hand, atol=1e-6)


def test_conditional_discriminator_has_the_papers_layers_and_hears_the_label():
    discriminator = ConditionalDiscriminator().eval()
    assert sizes(discriminator) == [(240 * 5, 784), (50 * 5, 10), (240 * 4, 290), (1, 240)]
    x = torch.rand(1, 1, 28, 28)
    assert discriminator(x, torch.tensor([3])) != discriminator(x, torch.tensor([4]))


def test_each_conditional_network_has_the_dropout_of_its_own_flag():
    _, state, _ = build("cgan", "--dropout-g", "0.1", "--dropout-d", "0.2")
    seen = []
    for name, x in (("generator", torch.rand(2, 100)), ("discriminator", torch.rand(2, 1, 28, 28))):
        for layer in state[name].modules():
            if isinstance(layer, nn.Dropout):
                layer.register_forward_hook(lambda module, _, y: seen.append((module.p, y.shape[1])))
        state[name](x, torch.arange(2))
    assert seen == [(0.1, 200), (0.1, 1000), (0.1, 1200), (0.2, 240 + 50), (0.2, 240)]


# Steps ----------------------------------------------------------------------------------------------------------------
def test_real_images_with_wrong_labels_weigh_as_asked(monkeypatch):
    _, state, train_step = build("cgan", "--wrong-label", "0.25")
    z = without_chance(state)
    monkeypatch.setattr(torch, "randint_like", lambda labels, low, high: torch.full_like(labels, high - 1))
    generator, discriminator = state["generator"], state["discriminator"]
    images, labels = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 9, 5, 5, 7])
    wrong = torch.tensor([9, 0, 8, 4, 4, 6])
    with torch.no_grad():
        d_x, d_wrong = discriminator(images, labels).sigmoid(), discriminator(images, wrong).sigmoid()
        d_g = discriminator(generator(z, labels), labels).sigmoid()
    by_hand = -(d_x.log() + 0.75 * (1 - d_g).log() + 0.25 * (1 - d_wrong).log()).mean()
    assert train_step(images, labels)["loss_d"].item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("script", PAIRS)
def test_what_is_frozen_stays_frozen(script):
    _, state, train_step = build(script)
    frozen = [next(state[name].parameters()).requires_grad_(False) for name in ("generator", "discriminator")]
    before = [weight.clone() for weight in frozen]
    for _ in range(3):
        train_step(torch.rand(6, 1, 28, 28), torch.arange(6))
    assert all(map(torch.equal, frozen, before))


RELATIVISTIC = ["--loss", "relativistic", "--r1", "0.8", "--simultaneous"]


@pytest.mark.parametrize("flags", [[], ["--loss", "saturating"], ["--simultaneous"], ["--r1", "0.8"], RELATIVISTIC])
@pytest.mark.parametrize("script", PAIRS)
def test_each_networks_gradient_is_that_of_its_own_loss(script, flags):
    """As on the slides. D: loss_d / 2, with -log D(x) - log(1 - D(G(z))), and r1 / 2 |d logit / d x|^2 at every fourth
    real image. G: -log D(G(z)), or the saturating log(1 - D(G(z))), under D, updated or not.

    Relativistic (Huang et al. 2024): D minimises -log sigmoid(l(x) - l(G(z))), with the penalty at fakes too (R1 + R2),
    and G the opposite.
    """
    args, state, train_step = build(script, *flags)
    z, relativistic = without_chance(state), args.loss == "relativistic"
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6)
    given = [labels] if script == "cgan" else []
    generator, twin = copy.deepcopy(state["generator"]), copy.deepcopy(state["discriminator"])
    fakes = generator(z, *given)
    real, fake = twin(images, *given), twin(fakes.detach(), *given)
    d_x, d_g = ((real - fake).sigmoid(), (fake - real).sigmoid()) if relativistic else (real.sigmoid(), fake.sigmoid())
    loss_d = -(d_x.log() + (1 - d_g).log()).mean() / 2
    penalty = 0
    for x in [images, fakes] if relativistic else [images]:
        x = x[::4].detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(twin(x, *(each[::4] for each in given)).sum(), x, create_graph=True)
        penalty += slope.square().sum((1, 2, 3)).mean()
    (loss_d + args.r1 / 2 * penalty).backward()
    metrics = train_step(images, labels)
    assert metrics["D(x)"].item() == pytest.approx(d_x.mean().item(), abs=1e-6)
    assert metrics["D(G(z))"].item() == pytest.approx(d_g.mean().item(), abs=1e-6)
    for ours, expected in zip(state["discriminator"].parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-7)
        assert ours.dim() == 1 or not torch.equal(ours, expected), "D is updated"  # a relativistic bias need not be
    d = twin if args.simultaneous else state["discriminator"]
    d_g = (d(fakes, *given) - (d(images, *given) if relativistic else 0)).sigmoid()
    loss_g = (1 - d_g).log().mean() if args.loss == "saturating" else -d_g.log().mean()
    loss_g.backward()
    for ours, expected in zip(state["generator"].parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-7)
        assert not torch.equal(ours, expected), "G is updated"
    assert metrics["loss_d"].item() == pytest.approx(2 * loss_d.item(), rel=1e-5)
    assert metrics["loss_g"].item() == pytest.approx(loss_g.item(), rel=1e-5)


@pytest.mark.parametrize("script", PAIRS)
def test_real_images_have_pixels_from_0_to_1_as_the_generators(script, monkeypatch):
    seen = []
    monkeypatch.setattr(PAIRS[script].utils, "train", lambda run, step, batches, *_, **__: seen.append(batches))
    PAIRS[script].main([*DIGITS, "--dry-run"])
    images, _ = seen[0].take(torch.arange(1437))
    assert [images.min().item(), images.max().item()] == pytest.approx([0, 1])


@pytest.mark.parametrize("script", PAIRS)
def test_losses_stay_finite_where_d_is_certain(script):
    _, state, train_step = build(script)
    with torch.no_grad():
        for parameter in state["discriminator"].parameters():
            parameter *= 1000
    metrics = train_step(torch.rand(6, 1, 28, 28), torch.arange(6))
    assert max(metrics["loss_d"], metrics["loss_g"]) > 100  # log(sigmoid) would be infinite here
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(("script", "decay"), [("gan", 1.000004), ("cgan", 1.00004)])
def test_paper_learns_at_the_papers_rates(script, decay):
    _, state, _ = build(script, "--recipe", "paper")
    for schedule in (state["schedule_g"], state["schedule_d"]):
        schedule.optimizer.step()
        for _ in range(100):
            schedule.step()
        assert schedule.get_last_lr() == [pytest.approx(0.1 / decay**100, rel=1e-9)]
        momentum = schedule.optimizer.param_groups[0]["momentum"]
        assert momentum == pytest.approx(0.5 + 0.2 / 249)  # after one epoch of 100 steps
