"""Recurrent network that writes an image row by row, with an exact likelihood."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.vae import bernoulli_log_prob


class RNN(nn.Module):
    """p(x) = prod_i prod_j p(x_ij | the rows above, the pixels to the left in row i): autoregressive, and exact.

    A GRU (Cho et al. 2014, arXiv 1406.1078) reads the rows above, one step per row, like the Row LSTM of van den Oord
    et al. 2016 (arXiv 1601.06759). Within a row, masks let each pixel see only the pixels to its left (MADE, Germain et
    al. 2015, arXiv 1502.03509).

    Input: binarised images [N, 1, height, width].

    hidden: units of the GRU. units: hidden units for each pixel of a row in each of `depth` layers.
    pixel_means: [1, height, width] in [0, 1]; the mean of each pixel, at which the output starts. None: 28x28, grey.
    """

    likelihood = "exact"
    left_mask: Tensor
    deeper_mask: Tensor
    out_mask: Tensor

    def __init__(self, hidden=256, units=16, depth=1, pixel_means: Tensor | None = None):
        super().__init__()
        means = torch.full((28, 28), 0.5) if pixel_means is None else pixel_means[0]
        width = means.shape[1]
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.context = nn.Linear(hidden + width, width * units)
        self.left = nn.Linear(width, width * units, bias=False)
        self.deeper = nn.ModuleList(nn.Linear(width * units, width * units) for _ in range(depth - 1))
        self.out = nn.Linear(width * units, width)
        self.row_bias = nn.Parameter(means.clamp(0.001, 0.999).logit())
        pixel = torch.arange(width)
        unit = pixel.repeat_interleave(units)  # the pixel that each hidden unit belongs to
        for name, seen in (
            ("left_mask", pixel < unit[:, None]),  # a unit sees the pixels left of its own,
            ("deeper_mask", unit <= unit[:, None]),  # units of its own pixel and of those left of it,
            ("out_mask", unit <= pixel[:, None]),  # and so does a logit
        ):
            self.register_buffer(name, seen.float(), persistent=False)

    def contexts(self, rows: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the rows above [N, T, width] say about the units of each next row, [N, T, width * units]; the state."""
        h, state = self.gru(rows, state)
        return self.context(torch.cat([h, rows], 2)), state

    def logits(self, rows: Tensor, contexts: Tensor) -> Tensor:
        """The logits of all pixels, [N, T, width], each given the pixels to its left in `rows` [N, T, width]."""
        h = F.relu(contexts + F.linear(rows, self.left.weight * self.left_mask))
        for layer in self.deeper:
            assert isinstance(layer, nn.Linear)  # for mypy
            h = h + F.relu(F.linear(h, layer.weight * self.deeper_mask, layer.bias))
        return F.linear(h, self.out.weight * self.out_mask, self.out.bias).float()

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x), [N] in nats."""
        rows = images.squeeze(1)  # [N, height, width]
        above = F.pad(rows, (0, 0, 1, -1))  # row i - 1 at i; 0 above the first
        logits = self.logits(rows, self.contexts(above)[0]) + self.row_bias
        return bernoulli_log_prob(rows, logits).sum((1, 2))

    def loss(self, images: Tensor) -> Tensor:
        """-log p(x), in nats per image; a scalar."""
        return -self.log_prob(images).mean()

    @torch.no_grad()
    def log_likelihood(self, images: Tensor) -> Tensor:
        """log p(x), [N] in nats."""
        return torch.cat([self.log_prob(x) for x in images.split(500)])

    @torch.no_grad()
    def complete(self, images: Tensor, rows: int, generator: Generator | None = None) -> Tensor:
        """Keep the top `rows` of images [N, 1, height, width] and sample the others.

        Returns what was kept and, for each sampled pixel, its probability given the pixels before it.
        """
        x = images[:, 0].clone()
        probabilities = x.clone()
        state, above = None, torch.zeros_like(x[:, :1])
        for i, biases in enumerate(self.row_bias):
            context, state = self.contexts(above, state)
            for j, bias in enumerate(biases) if i >= rows else ():
                p = (self.logits(x[:, i : i + 1], context)[:, 0, j] + bias).sigmoid()
                probabilities[:, i, j] = p
                x[:, i, j] = (torch.rand(p.shape, device=p.device, generator=generator) < p).to(x.dtype)
            above = x[:, i : i + 1]
        return probabilities.unsqueeze(1)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """n images as each pixel's probability given the sampled ones before it, [n, 1, height, width]."""
        return self.complete(self.row_bias.new_zeros(n, 1, *self.row_bias.shape), 0, generator)

    def images_of(self, images: Tensor, generator: Generator | None = None) -> dict[str, Tensor]:
        """completions: ten images, their upper half, and four samples of the lower half of each."""
        ten, half, above = images[:10], images[:10].clone(), len(self.row_bias) // 2
        half[:, :, above:] = 0
        completed = [self.complete(half, above, generator) for _ in range(4)]
        return {"completions": torch.cat([ten, half, *completed])}
