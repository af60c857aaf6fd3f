"""The slides' arithmetic by hand, against what one step of train_classifier.py does."""

import pytest
import torch
from helpers import DIGITS

import train_classifier
from datasets import Batches
from engine.flags import parse_args


@pytest.fixture
def step():
    """The MLP, its train_step with plain SGD at rate rho = 0.1, and one batch."""
    flags = [*DIGITS, "--model", "mlp", "--optimizer", "sgd", "--lr", "0.1"]
    args = parse_args(train_classifier.get_args_parser(), train_classifier.RECIPES, argv=flags)
    batches = Batches(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 4, "cpu")
    _, train_step, model = train_classifier.build(args, torch.device("cpu"), batches)
    images, labels = torch.rand(4, 1, 28, 28) * 2 - 1, torch.tensor([3, 1, 4, 1])
    return model, train_step, images, labels


def test_forward_pass_loss_backward_pass_and_update_are_the_slides(step):
    model, train_step, images, labels = step
    w = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    # Forward pass: each layer's output is relu(W x + b); L = -sum_k t_k log Z_k with Z = softmax.
    h1 = (images.flatten(1) @ w["linear1.weight"].T + w["linear1.bias"]).clamp(min=0)
    h2 = (h1 @ w["linear2.weight"].T + w["linear2.bias"]).clamp(min=0)
    h3 = (h2 @ w["linear3.weight"].T + w["linear3.bias"]).clamp(min=0)
    y = h3 @ w["linear4.weight"].T + w["linear4.bias"]
    z = y.exp() / y.exp().sum(1, keepdim=True)
    t = torch.eye(10)[labels]
    loss = -(t * z.log()).sum(1).mean()

    # Backward pass: dL/dW = dL/dY dY/dW. For softmax and cross-entropy dL/dY = (Z - t) / N, and dY/dW is the input.
    dy4 = (z - t) / len(images)
    dy3 = (dy4 @ w["linear4.weight"]) * (h3 > 0)

    metrics = train_step(images, labels)
    torch.testing.assert_close(metrics["loss"], loss)
    torch.testing.assert_close(model.linear4.weight.grad, dy4.T @ h3)
    torch.testing.assert_close(model.linear3.weight.grad, dy3.T @ h2)
    torch.testing.assert_close(model.linear3.bias.grad, dy3.sum(0))

    # Update: W = W - rho dL/dW.
    for name in ("linear3.weight", "linear4.weight", "linear4.bias"):
        torch.testing.assert_close(model.state_dict()[name], w[name] - 0.1 * model.get_parameter(name).grad)
