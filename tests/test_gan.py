"""The networks and the steps of train_gan.py and train_cgan.py, apart from any process."""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import DIGITS, load

import train_cgan
import train_gan
import utils
from datasets import Batches
from engine import flags as engine_flags
from engine.errors import UserError
from measures.watch import Watch, failure_signs
from models import GANS
from models.cgan import ConditionalDiscriminator, ConditionalGenerator
from models.gan import (
    Discriminator,
    Generator,
    PaperDiscriminator,
    PaperGenerator,
    draw_noise,
    init_weights,
    r1_penalty,
)

PAIRS = {"gan": train_gan, "cgan": train_cgan}


def build(script, *flags):
    """The state and the step of a training script, as (args, state, train_step)."""
    module = PAIRS[script]
    with contextlib.redirect_stdout(None):
        args = engine_flags.parse_args(module.get_args_parser(), module.RECIPES, argv=[*DIGITS, *flags])
    images = torch.full((100, 1, 28, 28), 51, dtype=torch.uint8)  # 0.2 * 255
    batches = Batches(images, torch.arange(100) % 10, 1, "cpu", black=0.0)
    state, train_step, _ = module.build(args, torch.device("cpu"), batches)
    return args, state, train_step


def without_chance(state, script, monkeypatch):
    """Switch dropout off and let the same noise be drawn each time; returns that noise."""
    for name in ("generator", "discriminator"):
        for module in state[name].modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    z = torch.rand(6, 100)
    monkeypatch.setattr(PAIRS[script], "draw_noise", lambda *_: z)
    return z


def weights(network):
    return copy.deepcopy(network.state_dict())


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


# Networks


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
    assert torch.allclose(discriminator.probability(x), theirs.model(x.flatten(1)), atol=1e-6)


@pytest.mark.parametrize("networks", [*GANS.values(), (ConditionalGenerator, ConditionalDiscriminator)])
def test_generators_draw_images_and_discriminators_give_one_logit(networks):
    generator, discriminator = (network() for network in networks)
    labels = [torch.tensor([3, 1, 4])] if isinstance(generator, ConditionalGenerator) else []
    images = generator(draw_noise(3, "unit", "cpu"), *labels)
    assert images.shape == (3, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert discriminator(images, *labels).shape == (3, 1)
    assert discriminator.probability(images, *labels).shape == (3, 1)


def test_noise_is_uniform_as_lecture_and_paper_draw_it():
    z = draw_noise(1000, "unit", "cpu")
    assert z.min() >= 0
    assert z.max() < 1
    assert z.mean() == pytest.approx(0.5, abs=0.01)
    z = draw_noise(1000, "centred", "cpu")
    assert z.abs().max() == pytest.approx(3**0.5, abs=0.01)
    assert z.abs().max() <= 3**0.5
    assert z.std() == pytest.approx(1, abs=0.01)


def test_paper_networks_have_the_papers_layers():
    generator, discriminator = PaperGenerator(), PaperDiscriminator()
    shapes = [tuple(p.shape) for p in generator.parameters() if p.dim() == 2]
    assert shapes == [(1200, 100), (1200, 1200), (784, 1200)]
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.dim() == 2]
    assert shapes == [(240 * 5, 784), (240 * 5, 240), (1, 240)]
    assert [m.p for m in discriminator.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]


@pytest.mark.parametrize("script", PAIRS)
def test_paper_init_has_the_papers_limits_and_starts_at_the_pixel_means(script):
    _, state, _ = build(script, "--recipe", "paper")
    for name, limit in (("generator", 0.05), ("discriminator", 0.005)):
        for weight in state[name].parameters():
            if weight.dim() == 2 and weight.shape[1] != 10:
                assert weight.abs().max() <= limit
                assert weight.abs().max() > 0.95 * limit
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
        state = build(script, *flags)[1]
        given = [torch.zeros(1000, dtype=torch.int64)] if script == "cgan" else []
        return state["generator"].eval()(draw_noise(1000, "centred", "cpu"), *given).logit().std(0).mean()

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


def test_conditional_dropout_is_on_in_training_and_off_when_sampling():
    generator, z, labels = ConditionalGenerator(), torch.rand(4, 100), torch.tensor([0, 3, 9, 3])
    assert not torch.equal(generator(z, labels), generator(z, labels))
    generator.eval()
    assert torch.equal(generator(z, labels), generator(z, labels))


def test_conditional_discriminator_has_the_papers_layers_and_hears_the_label():
    discriminator = ConditionalDiscriminator().eval()
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.dim() == 2]
    assert shapes == [(240 * 5, 784), (50 * 5, 10), (240 * 4, 290), (1, 240)]
    x = torch.rand(1, 1, 28, 28)
    assert discriminator(x, torch.tensor([3])) != discriminator(x, torch.tensor([4]))


# Steps


@pytest.mark.parametrize("script", PAIRS)
@pytest.mark.parametrize("loss", ["non-saturating", "saturating"])
def test_losses_are_the_slides_formulas(script, loss, monkeypatch):
    _, state, train_step = build(script, "--generator-loss", loss)
    z = without_chance(state, script, monkeypatch)
    generator, discriminator = state["generator"], state["discriminator"]
    images, labels = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4, 5])
    given = [labels] if script == "cgan" else []
    with torch.no_grad():
        d_x = discriminator.probability(images, *given)
        d_g = discriminator.probability(generator(z, *given), *given)
        fakes = generator(z, *given)
    metrics = train_step(images, labels)
    assert metrics["D(x)"].item() == pytest.approx(d_x.mean().item(), abs=1e-6)
    assert metrics["D(G(z))"].item() == pytest.approx(d_g.mean().item(), abs=1e-6)
    assert metrics["loss_d"].item() == pytest.approx(-(d_x.log() + (1 - d_g).log()).mean().item(), rel=1e-5)
    with torch.no_grad():  # G is judged by the D that stage 1 left behind
        d_g = discriminator.probability(fakes, *given)
    by_hand = -d_g.log().mean() if loss == "non-saturating" else (1 - d_g).log().mean()
    assert metrics["loss_g"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_real_images_under_wrong_labels_weigh_as_asked(monkeypatch):
    _, state, train_step = build("cgan", "--mismatched", "0.25")
    z = without_chance(state, "cgan", monkeypatch)
    monkeypatch.setattr(torch, "randint_like", lambda labels, low, high: torch.full_like(labels, high - 1))
    generator, discriminator = state["generator"], state["discriminator"]
    images, labels = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 9, 5, 5, 7])
    wrong = torch.tensor([9, 0, 8, 4, 4, 6])
    with torch.no_grad():
        d_x, d_wrong = discriminator.probability(images, labels), discriminator.probability(images, wrong)
        d_g = discriminator.probability(generator(z, labels), labels)
    by_hand = -(d_x.log() + 0.75 * (1 - d_g).log() + 0.25 * (1 - d_wrong).log()).mean()
    assert train_step(images, labels)["loss_d"].item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("script", PAIRS)
@pytest.mark.parametrize("recipe", ["lecture", "paper"])
def test_each_stage_changes_its_own_network_alone(script, recipe):
    args, state, train_step = build(script, "--recipe", recipe)
    networks = {"g": state["generator"], "d": state["discriminator"]}
    seen = []

    def watched(name, update):
        def step():
            before = {key: weights(network) for key, network in networks.items()}
            gradients = {key: [p.grad for p in network.parameters()] for key, network in networks.items()}
            update()
            changed = {key for key, network in networks.items() if not equal(before[key], weights(network))}
            seen.append((name, changed, {key for key, grads in gradients.items() if grads[0] is not None}))

        return step

    for name in networks:
        state[f"optimizer_{name}"].step = watched(name, state[f"optimizer_{name}"].step)
    train_step(torch.rand(6, 1, 28, 28), torch.arange(6))
    stage_1, stage_2 = ("d", {"d"}), ("g", {"g"})
    if args.simultaneous:
        assert [entry[:2] for entry in seen] == [stage_2, stage_1]
    else:
        assert [entry[:2] for entry in seen] == [stage_1, stage_2]
        assert seen[0][2] == {"d"}  # no gradient flows from stage 1 into G


@pytest.mark.parametrize("script", PAIRS)
@pytest.mark.parametrize("flags", [[], ["--simultaneous"]])
def test_stage_2_leaves_no_gradient_in_d(script, flags, monkeypatch):
    _, state, train_step = build(script, *flags)
    z = without_chance(state, script, monkeypatch)
    discriminator = state["discriminator"]
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6)
    given = [labels] if script == "cgan" else []
    twin = copy.deepcopy(discriminator)
    fakes = state["generator"](z, *given).detach()
    real, fake = twin(images, *given), twin(fakes, *given)
    ((F.softplus(-real).mean() + F.softplus(fake).mean()) / 2).backward()
    train_step(images, labels)
    for ours, expected in zip(discriminator.parameters(), twin.parameters()):
        assert ours.requires_grad
        assert torch.allclose(ours.grad, expected.grad, atol=1e-7)


@pytest.mark.parametrize("script", PAIRS)
def test_losses_stay_finite_where_d_is_certain(script):
    _, state, train_step = build(script)
    with torch.no_grad():
        for parameter in state["discriminator"].parameters():
            parameter *= 1000
    metrics = train_step(torch.rand(6, 1, 28, 28), torch.arange(6))
    assert max(metrics["loss_d"], metrics["loss_g"]) > 100  # log(sigmoid) would be infinite here
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("script", PAIRS)
def test_the_ema_of_the_generator_follows_it(script, tmp_path):
    args, state, train_step = build(script, "--ema", "0.9", "--epochs", "1", "--output-dir", str(tmp_path / "run"))
    before = weights(state["ema"].model)
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    utils.train(utils.Run(args, state), train_step, Batches(images, torch.arange(6), 6, "cpu", black=0.0))
    after, now = weights(state["ema"].model), weights(state["generator"])
    assert not equal(before, after)
    assert not equal(after, now)
    assert equal(load(tmp_path / "run" / "checkpoint.pt")["state"]["ema"]["model"], after)


def test_paper_learns_at_the_papers_rates():
    for script, decay in (("gan", 1.000004), ("cgan", 1.00004)):
        _, state, _ = build(script, "--recipe", "paper")
        for name in ("schedule_g", "schedule_d"):
            state[name].optimizer.step()
            state[name].step()
            assert state[name].get_last_lr() == [pytest.approx(0.1 / decay, rel=1e-9)]
            assert state[name].optimizer.param_groups[0]["momentum"] == 0.5
            for _ in range(99):
                state[name].step()
            assert state[name].get_last_lr() == [pytest.approx(0.1 / decay**100, rel=1e-9)]
            momentum = state[name].optimizer.param_groups[0]["momentum"]
            assert momentum == pytest.approx(0.5 + 0.2 / 249)  # after one epoch of 100 steps


@pytest.mark.parametrize("script", PAIRS)
def test_r1_is_the_squared_gradient_at_real_images(script):
    discriminator = build(script)[1]["discriminator"].eval()
    images, labels = torch.rand(8, 1, 28, 28).double(), torch.arange(8)
    given = [labels] if script == "cgan" else []
    discriminator.double()
    penalty = r1_penalty(discriminator, images, *given)
    squares = []
    for i in (0, 4):  # by differences along random directions: E (v . gradient)^2 = |gradient|^2 for v ~ N(0, I)
        one = [label[i : i + 1].expand(2000) for label in given]
        v = torch.randn(2000, 1, 28, 28, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (discriminator(images[i] + sign * 1e-5 * v, *one) for sign in (1, -1))
        squares.append(((ahead - behind) / 2e-5).square().mean())
    assert penalty.item() == pytest.approx(sum(squares).item() / 2, rel=0.15)
    penalty.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in discriminator.parameters() if parameter.grad is not None)


def test_r1_holds_d_back():
    norms = {}
    for weight in ("0", "10"):
        torch.manual_seed(0)
        _, state, train_step = build("gan", "--r1", weight, "--lr", "1e-3")
        images = torch.rand(32, 1, 28, 28)
        for _ in range(30):
            train_step(images, torch.zeros(32))
        norms[weight] = r1_penalty(state["discriminator"], images).item()
    assert norms["10"] < norms["0"] / 2


def test_the_relativistic_step_is_its_equations(monkeypatch):
    """D minimises softplus(l(G(z)) - l(x)) + r1 / 2 (R1 + R2), G softplus(l(x) - l(G(z))); Huang et al. 2024."""
    _, state, train_step = build("gan", "--adversarial-loss", "relativistic", "--r1", "0.8", "--simultaneous")
    z, images = without_chance(state, "gan", monkeypatch), torch.rand(6, 1, 28, 28)
    generator, discriminator = copy.deepcopy(state["generator"]), copy.deepcopy(state["discriminator"])
    metrics = train_step(images, torch.zeros(6))

    def squared_gradient(x):
        x = x[::4].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()

    fakes = generator(z)
    loss_d = F.softplus(discriminator(fakes.detach()) - discriminator(images)).mean()
    (loss_d + 0.4 * (squared_gradient(images) + squared_gradient(fakes))).backward()
    for ours, theirs in zip(state["discriminator"].parameters(), discriminator.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    loss_g = F.softplus(discriminator(images) - discriminator(fakes)).mean()
    loss_g.backward()
    for ours, theirs in zip(state["generator"].parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert metrics["loss_d"].item() == pytest.approx(2 * loss_d.item(), rel=1e-5)
    assert metrics["loss_g"].item() == pytest.approx(loss_g.item(), rel=1e-5)


# Signs of failure


def test_failing_runs_are_told_in_words():
    ten = torch.arange(1000) % 10
    assert list(failure_signs({"loss_d": 1.2}, ten, ten)) == []
    assert "near zero" in next(failure_signs({"loss_d": 0.001}, ten, ten))
    assert "the digit 7" in next(failure_signs({"loss_d": 1.2}, torch.full((1000,), 7)))
    assert "asked for" in next(failure_signs({"loss_d": 1.2}, ten, ten.roll(1)))
    assert list(failure_signs({"loss_d": 1.2})) == []


@pytest.mark.parametrize(
    "images", [torch.rand(2, 784), torch.rand(2, 1, 28, 28) * 2 - 1, torch.rand(2, 1, 28, 28) * 255]
)
def test_a_generator_that_draws_no_images_is_refused(images):
    with pytest.raises(UserError, match=r"must draw \[N, 1, 28, 28\] with pixels in \[0, 1\]"):
        Watch(lambda n: images, torch.zeros(0, 1, 28, 28, dtype=torch.uint8), judge=False)
