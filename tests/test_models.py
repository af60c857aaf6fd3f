"""models/: the lecture's networks and arithmetic, the paper's Maxout, and the registries."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import DIGITS

import train_classifier
from datasets import Batches
from engine.flags import parse_args
from models import ACTIVATIONS, CLASSIFIERS, build, build_network
from models.cnn import CNN, conv_output_size
from models.maxout import MaxoutMLP, limit_column_norms, linear_layers
from models.mlp import MLP

LECTURE = {  # the layers, typed from the slides and not from models/
    "mlp": {
        "linear1": nn.Linear(in_features=28 * 28, out_features=256),
        "linear2": nn.Linear(in_features=256, out_features=128),
        "linear3": nn.Linear(in_features=128, out_features=64),
        "linear4": nn.Linear(in_features=64, out_features=10),
    },
    "cnn": {
        "conv1": nn.Conv2d(in_channels=1, out_channels=64, kernel_size=3, stride=2, padding=1),
        "conv2": nn.Conv2d(in_channels=64, out_channels=128, kernel_size=3, stride=2, padding=1),
        "conv3": nn.Conv2d(in_channels=128, out_channels=256, kernel_size=3, stride=2, padding=1),
        "fc": nn.Linear(in_features=4 * 4 * 256, out_features=10),
    },
}


def options_of(model, **options):
    """The options of a classifier's run."""
    defaults = {"activation": None, "batch_norm": False, "classes": "0123456789"}
    return {"kind": "classifier", "model": model, **defaults, **options}


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("name", LECTURE)
def test_the_lectures_weights_give_the_lectures_logits_with_every_activation(name, activation):
    ours, images = build_network(options_of(name, activation=activation)).eval(), 5 * torch.randn(3, 1, 28, 28)
    ours.load_state_dict(nn.ModuleDict(LECTURE[name]).state_dict(), strict=True)
    *hidden, last = LECTURE[name].values()
    x = images
    for layer in hidden:
        x = ACTIVATIONS[activation or "relu"](layer(x if name == "cnn" else x.flatten(1)))
    torch.testing.assert_close(ours(images), last(x.flatten(1)), rtol=0, atol=0)


def test_the_residual_network_is_its_definition():
    """y = x + ReLU(BN(CONV(x))) twice after each CONV-BN-ReLU with stride 2; then the mean over the image (He 2015)."""
    network = CLASSIFIERS["resnet"]().eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    images = torch.randn(3, 1, 28, 28)
    parts = list(network.state_dict().values())  # of each block: the kernel; BN's scale, shift, mean, variance, count
    x = images
    for i in range(9):
        kernel, scale, shift, mean, variance, _ = parts[6 * i : 6 * i + 6]
        stride = 2 if i % 3 == 0 else 1
        y = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        y = F.batch_norm(y, mean, variance, scale, shift).relu()
        x = y if stride == 2 else x + y
    torch.testing.assert_close(network(images), x.mean((2, 3)) @ parts[-2].T + parts[-1])


def test_forward_pass_loss_backward_pass_and_update_are_the_slides():
    """With the MLP, and plain SGD at rate rho = 0.1."""
    flags = [*DIGITS, "--model", "mlp", "--optimizer", "sgd", "--lr", "0.1"]
    args = parse_args(train_classifier.get_args_parser(), train_classifier.RECIPES, argv=flags)
    batches = Batches(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 4, "cpu")
    _, train_step, model = train_classifier.build(args, torch.device("cpu"), batches)
    images, labels = torch.rand(4, 1, 28, 28) * 2 - 1, torch.tensor([3, 1, 4, 1])
    w = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    # Forward pass: each layer's output is relu(W x + b); L = -sum_k t_k log Z_k with Z = softmax.
    x = [images.flatten(1)]  # the input of each layer
    for i in (1, 2, 3):
        x.append((x[-1] @ w[f"linear{i}.weight"].T + w[f"linear{i}.bias"]).clamp(min=0))
    y = x[3] @ w["linear4.weight"].T + w["linear4.bias"]
    z = y.exp() / y.exp().sum(1, keepdim=True)
    t = torch.eye(10)[labels]
    torch.testing.assert_close(train_step(images, labels)["loss"], -(t * z.log()).sum(1).mean())

    # Backward pass: dL/dW = dL/dY dY/dW. For softmax and cross-entropy dL/dY = (Z - t) / N, and dY/dW is the input.
    # Update: W = W - rho dL/dW.
    dy = (z - t) / len(images)
    for i in (4, 3, 2, 1):
        for name, gradient in ((f"linear{i}.weight", dy.T @ x[i - 1]), (f"linear{i}.bias", dy.sum(0))):
            torch.testing.assert_close(model.get_parameter(name).grad, gradient)
            torch.testing.assert_close(model.state_dict()[name], w[name] - 0.1 * gradient)
        dy = (dy @ w[f"linear{i}.weight"]) * (x[i - 1] > 0)


@pytest.mark.parametrize(("s", "p"), [(1, 0), (2, 1), (3, 2)])
def test_conv_output_size_is_that_of_conv2d(s, p):
    for k in range(1, 6):
        for i in range(k, 30, 3):
            assert conv_output_size(i, k, s, p) == nn.Conv2d(1, 1, k, s, p)(torch.zeros(1, 1, i, i)).shape[-1]


# Activations and batch normalisation ----------------------------------------------------------------------------------
FORMULAS = {
    "relu": lambda x: max(0, x),
    "leaky-relu": lambda x: max(0, x) + 0.01 * min(0, x),
    "tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_follows_the_slides_formula(name):
    x = torch.linspace(-6, 6, 25)
    torch.testing.assert_close(ACTIVATIONS[name](x), torch.tensor([FORMULAS[name](value) for value in x.tolist()]))


@pytest.mark.parametrize("model", [MLP, CNN])
def test_batch_norm_is_three_layers_between_layer_and_activation(model):
    plain, normed = (model(batch_norm=on).state_dict().keys() for on in (False, True))
    assert plain <= normed
    assert {key.split(".")[0] for key in normed - plain} == {"bn1", "bn2", "bn3"}
    seen = []
    network = model(activation=lambda x: seen.append(x.transpose(0, 1).flatten(1)) or F.relu(x), batch_norm=True)
    network(torch.randn(32, 1, 28, 28))
    assert len(seen) == 3
    for channels in seen:
        torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)), rtol=0, atol=1e-4)
        assert channels.var(1).median() > 0.9


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_gives_a_logit_for_each_class_and_takes_each_image_alone(name):
    network, images = build_network(options_of(name, classes="abc")), torch.randn(7, 1, 28, 28)
    assert network.train()(images).shape == network.eval()(images).shape == (7, 3)
    torch.testing.assert_close(network(images[2:3]), network(images)[2:3], rtol=1e-4, atol=1e-5)


def test_the_network_of_a_run_is_built_from_its_options():
    assert build_network({"kind": "gan", "networks": "lecture", "noise": "centred"}).noise(1000).min() < -1
    assert build_network({"kind": "cgan", "classes": "ab", "noise": "unit"}).classes == 2
    old = {"kind": "likelihood", "model": "rnn", "hidden": 8, "units": None, "states": None}  # --units is gone
    assert build_network(old).gru.hidden_size == 8
    given = {"vae": {"importance_samples": 4}, "rbm": {"gibbs_steps": 5, "persistent_chains": 7}, "rnn": {"depth": 3}}
    vae, rbm, rnn = (build_network({"kind": "likelihood", "model": name, **own}) for name, own in given.items())
    assert (vae.importance_samples, rbm.gibbs_steps, len(rbm.chains), len(rnn.deeper)) == (4, 5, 7, 2)
    with pytest.raises(ValueError, match=r"there is no diffusion in models/__init__\.py; it has classifier, gan"):
        build_network({"kind": "diffusion"})
    with pytest.raises(ValueError, match="the model hmm has no option --hidden; omit it"):
        build_network({"kind": "likelihood", "model": "hmm", "hidden": 8})
    with pytest.raises(ValueError, match="no option --batch-norm; omit it, or add --no-batch-norm if the recipe sets"):
        build_network(options_of("maxout", batch_norm=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):  # a mistake within the model
        build({"mine": lambda classes: nn.Linear(784, classes, colour="red")}, "mine", {"classes": 3})


# Maxout ---------------------------------------------------------------------------------------------------------------
def test_maxout_mlp_keeps_four_fifths_of_the_input_as_it_is_and_half_of_the_hidden_units():
    network, seen = MaxoutMLP(), []
    network.maxout1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.full((100, 1, 28, 28), 0.5))
    assert seen[0].unique().tolist() == [0, 0.5]
    assert abs(seen[0].mean() / 0.5 - 0.8) < 0.01
    network.eval()(torch.full((1, 1, 28, 28), 0.5))
    assert (seen[1] == 0.5).all()
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


def test_maxout_mlp_has_the_papers_layers_and_initial_weights():
    layers = linear_layers(MaxoutMLP())
    assert [tuple(layer.weight.shape) for layer in layers] == [(5 * 240, 784), (5 * 240, 240), (10, 240)]
    for layer in layers:
        assert 0.0049 < layer.weight.abs().max() <= 0.005
        assert not layer.bias.any()


def test_limit_column_norms_shortens_long_rows_and_leaves_short_ones_alone():
    network = MaxoutMLP()
    for layer in linear_layers(network):
        nn.init.normal_(layer.weight)
        layer.weight.data[::2] *= 0.01
    before = [layer.weight.detach().clone() for layer in linear_layers(network)]
    limit_column_norms(network, 1.9365)
    for layer, old in zip(linear_layers(network), before, strict=True):
        assert torch.equal(layer.weight[::2], old[::2])
        torch.testing.assert_close(layer.weight[1::2].norm(dim=1), torch.full((len(old) // 2,), 1.9365))
        torch.testing.assert_close(F.cosine_similarity(layer.weight, old), torch.ones(len(old)))
