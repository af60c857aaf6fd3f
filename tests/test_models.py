"""models/: the lecture's networks, the paper's Maxout, and the registries."""

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import models
from models import ACTIVATIONS, CLASSIFIERS, build_classifier
from models.cnn import CNN, conv_output_size
from models.maxout import Maxout, MaxoutMLP, limit_column_norms, linear_layers
from models.mlp import MLP

# The slides' networks, typed from the slides and not from models/ -----------------------------------------------------


class LectureCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=64, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(in_channels=64, out_channels=128, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(in_channels=128, out_channels=256, kernel_size=3, stride=2, padding=1)
        self.fc = nn.Linear(in_features=4 * 4 * 256, out_features=10)

    def forward(self, x, activation=F.relu):
        x = activation(self.conv1(x))
        x = activation(self.conv2(x))
        x = activation(self.conv3(x))
        x = x.view(x.shape[0], -1)
        return self.fc(x)


class LectureMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(in_features=28 * 28, out_features=256)
        self.linear2 = nn.Linear(in_features=256, out_features=128)
        self.linear3 = nn.Linear(in_features=128, out_features=64)
        self.linear4 = nn.Linear(in_features=64, out_features=10)

    def forward(self, x, activation=F.relu):
        x = x.view(x.shape[0], -1)
        x = activation(self.linear1(x))
        x = activation(self.linear2(x))
        x = activation(self.linear3(x))
        return self.linear4(x)


class LectureMaxout(nn.Module):
    def __init__(self, n_in, n_out, k, dropout):
        super().__init__()
        self.n_out, self.k = n_out, k
        layers = [nn.Dropout(0.5)] if dropout else []
        self.model = nn.Sequential(*layers, nn.Linear(n_in, n_out * k))

    def forward(self, x):
        return self.model(x).view(x.shape[0], self.n_out, self.k).max(-1)[0]


LECTURE = {"mlp": LectureMLP, "cnn": LectureCNN}


@pytest.mark.parametrize(("model", "count"), [(MLP, 242_762), (CNN, 410_634)])
def test_number_of_parameters_is_the_slides(model, count):
    assert sum(p.numel() for p in model().parameters()) == count


@pytest.mark.parametrize("name", LECTURE)
def test_the_lectures_weights_load_and_give_the_lectures_logits(name):
    lecture, ours = LECTURE[name]().eval(), build_classifier(name).eval()
    ours.load_state_dict(lecture.state_dict(), strict=True)
    images = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(ours(images), lecture(images), rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_lectures_maxout_weights_load_and_give_equal_outputs(dropout):
    lecture, ours = LectureMaxout(12, 7, 5, dropout).eval(), Maxout(12, 7, k=5, dropout=dropout).eval()
    ours.load_state_dict(lecture.state_dict(), strict=True)
    x = torch.randn(4, 12)
    torch.testing.assert_close(ours(x), lecture(x), rtol=0, atol=0)


# Convolution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("p", [0, 1, 2])
def test_conv_output_size_is_that_of_conv2d(s, p):
    for k in range(1, 6):
        for i in range(k, 30, 3):
            assert conv_output_size(i, k, s, p) == nn.Conv2d(1, 1, k, s, p)(torch.zeros(1, 1, i, i)).shape[-1]


def test_conv_output_size_follows_the_three_formulas_of_the_slides():
    i, k, p, s = 12, 3, 2, 2
    assert conv_output_size(i, k) == i - k + 1
    assert conv_output_size(i, k, p=p) == i - k + 2 * p + 1
    assert conv_output_size(i, k, s, p) == math.floor((i - k + 2 * p) / s) + 1  # 13 / 2 is rounded down
    assert conv_output_size(7, 3, p=1) == 7  # the slide's example: 7x7 in, 7x7 out


# Activations ----------------------------------------------------------------------------------------------------------

FORMULAS = {
    "relu": [lambda x: max(0, x)],
    "leaky-relu": [lambda x: max(0, x) + 0.01 * min(0, x)],
    "tanh": [lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x))],
    "sigmoid": [
        lambda x: 1 / (1 + math.exp(-x)),
        lambda x: math.exp(x) / (math.exp(x) + 1),
        lambda x: 1 / 2 + 1 / 2 * math.tanh(x / 2),
    ],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_follows_the_slides_formula(name):
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    for formula in FORMULAS[name]:
        expected = torch.tensor([formula(value) for value in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(ACTIVATIONS[name](x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LECTURE)
def test_activation_is_applied_after_each_hidden_layer(name, activation):
    lecture, ours = LECTURE[name]().eval(), build_classifier(name, activation).eval()
    ours.load_state_dict(lecture.state_dict())
    images = 5 * torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(ours(images), lecture(images, ACTIVATIONS[activation]))


# Batch normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LECTURE)
def test_batch_norm_adds_only_bn1_to_bn3_to_the_state_dict(name):
    plain, normed = (build_classifier(name, batch_norm=on).state_dict().keys() for on in (False, True))
    assert plain <= normed
    assert {key.split(".")[0] for key in normed - plain} == {"bn1", "bn2", "bn3"}


@pytest.mark.parametrize("model", [MLP, CNN])
def test_batch_norm_stands_between_layer_and_activation(model):
    seen = []
    network = model(activation=lambda x: seen.append(x.transpose(0, 1).flatten(1)) or F.relu(x), batch_norm=True)
    network(torch.randn(32, 1, 28, 28))
    assert len(seen) == 3
    for channels in seen:
        torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)), rtol=0, atol=1e-4)
        assert channels.var(1).median() > 0.9


@pytest.mark.parametrize("name", LECTURE)
def test_batch_norm_network_learns_one_batch(name):
    network = build_classifier(name, batch_norm=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    images, labels = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    start = {key: value.clone() for key, value in network.state_dict().items()}
    losses = []
    for _ in range(8):
        losses.append(F.cross_entropy(network(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(start[f"bn{i}.weight"], network.state_dict()[f"bn{i}.weight"]) for i in (1, 2, 3))


# Registry -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_registered_model_gives_ten_logits_per_image(name):
    network = build_classifier(name)
    assert network.train()(torch.randn(7, 1, 28, 28)).shape == (7, 10)
    assert network.eval()(torch.randn(1, 1, 28, 28)).shape == (1, 10)


def test_every_registered_model_judges_each_image_alone():
    images = torch.randn(7, 1, 28, 28)
    for name in CLASSIFIERS:
        network = build_classifier(name).eval()
        torch.testing.assert_close(network(images[2:3]), network(images)[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"batch_norm": True}, "--batch-norm; omit it, or add --no-batch-norm if the recipe sets it$"),
        ({"activation": "tanh"}, "--activation; omit it$"),
    ],
)
def test_option_that_a_model_lacks_is_an_error_naming_the_flag(option, words):
    with pytest.raises(ValueError, match=f"maxout has no option {words}"):
        build_classifier("maxout", **option)


# Maxout ---------------------------------------------------------------------------------------------------------------


def test_maxout_is_the_largest_of_k_consecutive_pieces():
    layer, x = Maxout(6, 4, k=3, dropout=False), torch.randn(5, 6)
    weight, bias = layer.model[0].weight, layer.model[0].bias
    for n in range(5):
        for unit in range(4):
            pieces = [(weight[row] @ x[n] + bias[row]).item() for row in (3 * unit, 3 * unit + 1, 3 * unit + 2)]
            assert layer(x)[n, unit].item() == pytest.approx(max(pieces), abs=1e-5)


def test_maxout_drops_inputs_in_training_alone():
    layer, x = Maxout(100, 5, p=0.5), torch.ones(1, 100)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


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
        assert layer.weight.requires_grad
        assert layer.weight.grad_fn is None


# Files that can be lifted out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(Path(models.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_a_model_file_imports_torch_and_other_models_alone(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += ["." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {name.split(".")[0] for name in names}
    assert "torch" in found
    assert found <= {"torch", "models", "collections", "inspect", "math", "typing"}
    if path.name in ("mlp.py", "cnn.py", "maxout.py"):  # these can be copied on their own
        assert "models" not in found
