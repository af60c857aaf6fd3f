"""Hidden Markov model that writes an image row by row (Rabiner 1989, "A tutorial on hidden Markov models")."""

import torch
from torch import Generator, Tensor, nn


class HMM(nn.Module):
    """A chain of hidden states from the top row to the bottom one, in which each state writes one row of pixels.

    Input: binarised images [N, 1, T, W], T time steps of W pixels. The parameters are the logits of what Rabiner calls
    pi_i = P(s_1 = i), A_ij = P(s_t+1 = j | s_t = i), and b_i(x) = prod_d p_id^x_d (1 - p_id)^(1 - x_d).

    pixel_means: [1, T, W] in [0, 1], the mean of each pixel. Each state starts as one row of it plus noise, and favours
    the states of the next row. None: T = W = 28, and all states start as noise alone.
    """

    likelihood = "exact"

    def __init__(self, states: int = 256, pixel_means: Tensor | None = None):
        super().__init__()
        means = torch.full((28, 28), 0.5) if pixel_means is None else pixel_means.flatten(0, -2).cpu()
        row = torch.arange(states) * len(means) // states  # the row that each state starts as
        self.initial = nn.Parameter(torch.zeros(states))
        self.transition = nn.Parameter(torch.randn(states, states) * 0.1)
        self.emission = nn.Parameter(means.clamp(0.01, 0.99).logit()[row] + torch.randn(states, means.shape[1]))
        self.height = len(means)
        if pixel_means is not None:
            self.initial.data -= 4.0 * (row > 0)
            self.transition.data -= 2.0 * (row - row[:, None] - 1).abs().clamp(max=2)

    def log_b(self, images: Tensor) -> Tensor:
        """log b_i(x_t), [T, N, S] in nats: sum_d x_d l_d - log(1 + e^l_d), where l is the logit of p."""
        return images[:, 0].transpose(0, 1) @ self.emission.T - nn.functional.softplus(self.emission).sum(1)

    def log_prob(self, images: Tensor) -> Tensor:
        """log P(x), [N] in nats, by the scaled forward algorithm (Rabiner, section V.A)."""
        pi, A, log_b = self.initial.softmax(0), self.transition.softmax(1), self.log_b(images)
        peak = log_b.amax(2, keepdim=True).detach()  # dividing by the largest b keeps exp from underflowing
        before, log_p = pi, peak.sum((0, 2))  # P(s_t = i | x_1 ... x_t-1); for t = 1 it is pi
        for b in (log_b - peak).exp():
            alpha = before * b
            c = alpha.sum(1, keepdim=True)  # P(x_t | x_1 ... x_t-1) / e^peak
            before = (alpha / c) @ A
            log_p = log_p + c.log().squeeze(1)
        return log_p

    def loss(self, images: Tensor) -> Tensor:
        """-log P(x), in nats per image; a scalar."""
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for T products in a row
            return -self.log_prob(images).mean()

    @torch.no_grad()
    def log_likelihood(self, images: Tensor) -> Tensor:
        """log P(x), [N] in nats."""
        return torch.cat([self.log_prob(x) for x in images.split(500)])

    @torch.no_grad()
    def viterbi(self, images: Tensor) -> Tensor:
        """The most probable path s_1 ... s_T of each image, int64 [N, T] (Rabiner, section III.B)."""
        if len(images) > 50:  # [50, S, S] at once
            return torch.cat([self.viterbi(x) for x in images.split(50)])
        back: list[Tensor] = []
        delta, *log_b = self.log_b(images)
        delta = delta + self.initial.log_softmax(0)  # log P of the best path that ends in each state, [N, S]
        for b in log_b:
            delta, best = (delta.unsqueeze(2) + self.transition.log_softmax(1)).max(1)
            delta, back = delta + b, [*back, best]  # best: the state before each state
        path = [delta.argmax(1, keepdim=True)]
        for best in reversed(back):
            path.insert(0, best.gather(1, path[0]))
        return torch.cat(path, 1)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """The pixel probabilities of the states on n sampled paths, [n, 1, T, W]."""
        path = [torch.multinomial(self.initial.softmax(0).expand(n, -1), 1, generator=generator)]
        while len(path) < self.height:
            path.append(torch.multinomial(self.transition.softmax(1)[path[-1][:, 0]], 1, generator=generator))
        return self.emission[torch.cat(path, 1)].sigmoid().unsqueeze(1)

    @torch.no_grad()
    def images_of(self, images: Tensor, generator: Generator | None = None) -> dict[str, Tensor]:
        """paths: images, each above the pixel probabilities of the states on its most probable path."""
        parts = images[:50].split(10)
        best = [self.emission.sigmoid()[self.viterbi(part)].unsqueeze(1) for part in parts]
        return {"paths": torch.cat([torch.cat(pair) for pair in zip(parts, best)])}
