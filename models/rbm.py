"""Restricted Boltzmann machine (Hinton 2002; persistent chains: Tieleman 2008), and its partition function by AIS."""

import math

import torch
from torch import Generator, Tensor, nn


def bernoulli(p: Tensor, generator: Generator | None = None) -> Tensor:
    return (torch.rand(p.shape, device=p.device, generator=generator) < p).float()


def softplus(x: Tensor) -> Tensor:
    return x.relu() - x.abs().sigmoid().log()  # log(1 + e^x), faster on a CPU than torch's own


class RBM(nn.Module):
    """p(v) = 1/Z sum_h e^(h W v + b v + a h), with pixels v in {0, 1}^visible and hidden units h in {0, 1}^hidden.

    Images are binarised, [N, 1, 28, 28]; v is [N, visible]. gibbs_steps: k of CD-k. persistent_chains: how many chains
    continue from step to step (0: start at the data). pixel_means: [1, 28, 28]; b and AIS start at their logits b_0.
    """

    likelihood, quick = "estimate", {"temperatures": 1000}
    base_bias: Tensor
    chains: Tensor

    def __init__(self, hidden=500, gibbs_steps=1, persistent_chains=0, pixel_means: Tensor | None = None):
        super().__init__()
        means = torch.full((784,), 0.5) if pixel_means is None else pixel_means.flatten().cpu().clamp(0.01, 0.99)
        self.gibbs_steps = gibbs_steps
        self.weight = nn.Parameter(0.01 * torch.randn(hidden, len(means)))  # W
        self.visible_bias, self.hidden_bias = nn.Parameter(means.logit()), nn.Parameter(torch.zeros(hidden))  # b, a
        self.register_buffer("base_bias", means.logit())  # b_0
        self.register_buffer("chains", bernoulli(means.expand(persistent_chains, -1)).bool())

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -b v - sum_j log(1 + e^(W_j v + a_j)), so that p(v) = e^-F(v) / Z; [N] in nats."""
        return -(v * self.visible_bias).sum(1) - softplus((v @ self.weight.T).float() + self.hidden_bias).sum(1)

    def loss(self, images: Tensor) -> Tensor:
        """Mean F of the data minus mean F of samples of the model; a scalar in nats, which says nothing about log p.

        Its gradient is the CD update (Hinton 2002): dloss/dW = -<p(h|v) v>_data + <p(h|v) v>_samples.
        """
        data = images.flatten(1)
        samples = self.gibbs(self.chains.float() if len(self.chains) else data, self.gibbs_steps)
        if self.training:
            self.chains.copy_(samples[: len(self.chains)])
        return self.free_energy(data).mean() - self.free_energy(samples).mean()

    def gibbs(self, v: Tensor, steps: int, generator: Generator | None = None) -> Tensor:
        """v [N, visible] after `steps` times h ~ p(h|v), v ~ p(v|h)."""
        return self.anneal(v, [1.0] * (steps + 1), generator)[0]

    @torch.no_grad()
    def anneal(self, v: Tensor, betas: list[float], generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Move v ~ p_beta along `betas`, one Gibbs step each. Returns v and log prod_beta p*_next(v) / p*_beta(v), [N].

        p*_beta(v) = e^((1 - beta) b_0 v + beta b v) prod_j (1 + e^(beta (W_j v + a_j))) (Salakhutdinov & Murray 2008).
        """
        precise = torch.float32 if v.device.type == "mps" else torch.float64  # MPS has no float64
        log_w = torch.zeros(len(v), dtype=precise, device=v.device)
        for i, beta in enumerate(betas[1:]):
            x = torch.addmm(self.hidden_bias, v, self.weight.T)  # W v + a, [N, hidden]
            if beta != betas[i]:
                log_w += (beta - betas[i]) * (v @ (self.visible_bias - self.base_bias))
                log_w += (softplus(beta * x) - softplus(betas[i] * x)).sum(1)
            h = bernoulli((beta * x).sigmoid(), generator)  # p(h_j = 1|v) = sigmoid(W_j v + a_j)
            bias = torch.lerp(self.base_bias, self.visible_bias, beta)
            v = bernoulli(torch.addmm(bias, h, self.weight, alpha=beta).sigmoid(), generator)  # p(v_i = 1|h)
        return v, log_w

    def log_partition(self, chains=100, temperatures=14_500, generator=None) -> list[tuple[float, float]]:
        """log Z by AIS (Salakhutdinov & Murray 2008), in nats: [(forward, standard error), (reverse, standard error)].

        Forward, from independent pixels to the RBM, is too low on average. Reverse, from the forward chains 1,000 Gibbs
        steps later, is too high. If they differ, trust neither.
        """
        parts = (500, 0, 0.5), (4000, 0.5, 0.9), (10_000, 0.9, 1)  # of the paper's 14,500 temperatures
        betas = torch.cat([torch.linspace(a, b, temperatures * n // 14_500 + 2) for n, a, b in parts]).tolist()
        v, up = self.anneal(bernoulli(self.base_bias.sigmoid().expand(chains, -1), generator), betas, generator)
        v = self.gibbs(v, 1000, generator)
        log_w = torch.stack([up, self.anneal(v, betas[::-1], generator)[1]])  # [2, chains]
        log_mean_w = (log_w.logsumexp(1) - math.log(chains)) * log_w.new_tensor([1, -1])
        log_z = softplus(self.base_bias).sum() + len(self.weight) * math.log(2) + log_mean_w  # log Z at beta = 0 first
        return list(zip(log_z.tolist(), (log_w.softmax(1).std(1) * chains**0.5).tolist()))

    def log_likelihood(self, images: Tensor, log_z: float | None = None, temperatures=14_500) -> Tensor:
        """-F(v) - log Z, [N] in nats. log_z: None estimates it forward, by `log_partition`, which may take minutes."""
        if log_z is None:
            generator = Generator(images.device).manual_seed(0)
            log_z = self.log_partition(temperatures=temperatures, generator=generator)[0][0]
        return -self.free_energy(images.flatten(1)).detach() - log_z

    def reconstruct(self, images: Tensor) -> Tensor:
        """The pixel probabilities after a step to the hidden means and back, in the shape of `images`."""
        h = torch.addmm(self.hidden_bias, images.flatten(1), self.weight.T).sigmoid()
        return torch.addmm(self.visible_bias, h, self.weight).sigmoid().detach().view_as(images)

    def sample(self, n: int, generator: Generator | None = None, steps: int = 200) -> Tensor:
        """Anneal n samples in `steps` steps, take `steps` Gibbs steps, return pixel probabilities [n, 1, 28, 28]."""
        betas = [i / steps for i in range(steps + 1)] + [1.0] * steps
        v, _ = self.anneal(bernoulli(self.base_bias.sigmoid().expand(n, -1), generator), betas, generator)
        return self.reconstruct(v.view(n, 1, 28, 28))

    def images_of(self, images: Tensor, generator: Generator | None = None) -> dict[str, Tensor]:
        """reconstructions: images, each above its reconstruction. gibbs_chains: ten images, and chains from them."""
        parts, ten = images[:50].split(10), images[:10]
        rows, v = [ten], ten.flatten(1)
        for steps in (1, 1, 3, 5, 10, 30, 50, 100, 300, 500):  # 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000 in all
            v = self.gibbs(v, steps, generator)
            rows.append(self.reconstruct(v.view_as(ten)))
        pairs = [torch.cat([part, self.reconstruct(part)]) for part in parts]
        return {"reconstructions": torch.cat(pairs), "gibbs_chains": torch.cat(rows)}
