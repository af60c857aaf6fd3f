"""Maxout networks (Goodfellow et al. 2013, arXiv 1302.4389) and their norm limit."""

import torch
from torch import Tensor, nn


class Maxout(nn.Module):
    """The lecture's maxout layer: the maximum of `k` linear pieces, h_i = max_j (x W_ij + b_ij).

    Input: [N, in_features]. Output: [N, out_features].

    dropout: put a `Dropout(p)` before the linear layer, as the lecture's discriminator does.
    """

    def __init__(self, in_features: int, out_features: int, k: int = 2, dropout: bool = True, p: float = 0.5):
        super().__init__()
        self.out_features = out_features
        self.k = k
        layers = [nn.Dropout(p)] if dropout else []
        self.model = nn.Sequential(*layers, nn.Linear(in_features, out_features * k))

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.model(x).view(-1, self.out_features, self.k)  # [N, out, k]
        return pieces.max(dim=-1).values


class MaxoutMLP(nn.Module):
    """The paper's permutation-invariant MNIST classifier (section 5.1): maxout 240 x 5, maxout 240 x 5, softmax.

    Input: images [N, 1, 28, 28]. Output: logits [N, classes]. Dropout keeps .8 of the input and .5 of the hidden units;
    initial weights are U(-.005, .005), biases 0. As in the configuration the authors released (pylearn2's
    mnist_pi.yaml), the pixels that are kept are not scaled up.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.maxout1 = Maxout(28 * 28, 240, k=5, dropout=False)
        self.maxout2 = Maxout(240, 240, k=5, p=0.5)
        self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(240, classes))
        for layer in linear_layers(self):
            nn.init.uniform_(layer.weight, -0.005, 0.005)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            x = x * torch.empty_like(x).bernoulli_(0.8)
        return self.fc(self.maxout2(self.maxout1(x)))


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def limit_column_norms(network: nn.Module, max_norm: float) -> None:
    """Shrink each unit's incoming weights in every linear layer to a Euclidean norm of at most `max_norm`, in place.

    The paper's W is [in, out], so it limits columns; torch's weight is [out, in], so these are rows.
    """
    for layer in linear_layers(network):
        layer.weight.renorm_(p=2, dim=0, maxnorm=max_norm)
