"""Hidden Markov model that writes an image row by row (Rabiner 1989, "A tutorial on hidden Markov models")."""

import torch
from torch import Generator, Tensor, nn


class HMM(nn.Module):
    """A chain of hidden states from the top row to the bottom one, in which each state draws one row of pixels.

    Input: binarised images [N, 1, T, W], T time steps of W pixels. The parameters are the logits of what Rabiner calls
    pi_i = P(s_1 = i), A_ij = P(s_t+1 = j | s_t = i), and b_i(x) = prod_d p_id^x_d (1 - p_id)^(1 - x_d).

    pixel_means: [1, T, W] in [0, 1], the mean of each pixel. Each state starts as one row of it plus `noise`, and
    favours the states of the next row. None: T = W = 28, and all states start as noise alone.
    """

    likelihood = "exact"

    def __init__(self, states: int = 256, pixel_means: Tensor | None = None, noise: float = 1.0):
        super().__init__()
        means = torch.full((28, 28), 0.5) if pixel_means is None else pixel_means.flatten(0, -2).cpu()
        row = torch.arange(states) * len(means) // states  # the row that each state starts as
        self.initial = nn.Parameter(torch.zeros(states))
        self.transition = nn.Parameter(torch.randn(states, states) * 0.1)
        self.emission = nn.Parameter(means.clamp(0.01, 0.99).logit()[row] + noise * torch.randn(states, means.shape[1]))
        self.height = len(means)
        if pixel_means is not None:
            self.initial.data -= 4.0 * (row > 0)
            self.transition.data -= 2.0 * (row - row[:, None] - 1).abs().clamp(max=2)

    def log_b(self, images: Tensor) -> Tensor:
        """log b_i(x_t), [T, N, S] in nats: sum_d x_d l_d - log(1 + e^l_d), where l is the logit of p."""
        return images[:, 0].transpose(0, 1) @ self.emission.T - nn.functional.softplus(self.emission).sum(1)

    def forward_pass(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The scaled forward algorithm (Rabiner, section V.A). Returns, for each row t,

        alpha_t(i) = P(s_t = i | x_1 ... x_t) and b_i(x_t) / P(x_t | x_1 ... x_t-1), both [N, S],

        and then log P(x), [N] in nats.
        """
        pi, A, log_b = self.initial.softmax(0), self.transition.softmax(1), self.log_b(images)
        peak = log_b.amax(2, keepdim=True).detach()  # divided by the largest b, exp does not underflow
        alphas, scaled, log_p = [], [], peak.sum((0, 2))
        for b in (log_b - peak).exp():
            alpha = (alphas[-1] @ A if alphas else pi) * b
            c = alpha.sum(1, keepdim=True)  # P(x_t | x_1 ... x_t-1) / e^peak
            alphas.append(alpha / c)
            scaled.append(b / c)
            log_p = log_p + c.log().squeeze(1)
        return alphas, scaled, log_p

    def loss(self, images: Tensor) -> Tensor:
        """-log P(x), in nats per image; a scalar."""
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for T products in a row
            return -self.forward_pass(images)[2].mean()

    @torch.no_grad()
    def log_likelihood(self, images: Tensor) -> Tensor:
        """log P(x), [N] in nats."""
        return torch.cat([self.forward_pass(x)[2] for x in images.split(500)])

    @torch.no_grad()
    def baum_welch(self, images: Tensor) -> Tensor:
        """One step of EM over all `images`, in place (Rabiner, section III.C). Returns the mean log P(x) before it."""
        A, starts, moves, visits, ink, total = self.transition.softmax(1), 0, 0, 0, 0, 0
        for x in images.split(500):
            alphas, scaled, log_p = self.forward_pass(x)
            beta, total = torch.ones_like(alphas[0]), total + log_p.sum()
            for t in reversed(range(self.height)):
                gamma, b = alphas[t] * beta, scaled[t] * beta  # gamma_t(i) = P(s_t = i | x), [N, S]
                visits, ink = visits + gamma.sum(0), ink + gamma.T @ x[:, 0, t]
                moves = moves + A * (alphas[t - 1].T @ b) if t > 0 else moves  # sum_x P(s_t-1 = i, s_t = j | x), [S, S]
                beta = b @ A.T
            starts = starts + gamma.sum(0)
        self.initial.copy_((starts + 1e-6).log())  # tiny counts keep every probability above 0, for images to come
        self.transition.copy_((moves + 1e-6).log())
        self.emission.copy_(((ink + 0.01) / (visits[:, None] + 0.02)).logit())
        return total / len(images)

    @torch.no_grad()
    def viterbi(self, images: Tensor) -> Tensor:
        """The most probable path s_1 ... s_T of each image, int64 [N, T] (Rabiner, section III.B)."""
        if len(images) > 50:  # [50, S, S] at once
            return torch.cat([self.viterbi(x) for x in images.split(50)])
        (delta, *log_b), back = self.log_b(images), []
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
        """Draw n state paths and return the pixel probabilities of their states, [n, 1, T, W]."""
        path = [torch.multinomial(self.initial.softmax(0).expand(n, -1), 1, generator=generator)]
        while len(path) < self.height:
            path.append(torch.multinomial(self.transition.softmax(1)[path[-1][:, 0]], 1, generator=generator))
        return self.emission[torch.cat(path, 1)].sigmoid().unsqueeze(1)
