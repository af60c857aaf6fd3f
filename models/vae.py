"""Variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114) and its k-sample bound (IWAE, arXiv 1509.00519)."""

import math

import torch
from torch import Generator, Tensor, nn


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of pixels x in {0, 1} under p = sigmoid(logits), in nats: x l - log(1 + e^l).

    This form of it does not overflow, and is faster on a CPU than torch's own.
    """
    return x * logits - logits.relu() + logits.abs().sigmoid().log()


class VAE(nn.Module):
    """The network of Burda et al. 2015, section 5, with one stochastic layer: 784-200-200-50-200-200-784, tanh.

    Input: binarised images [N, 1, 28, 28]. p(z) = N(0, I), q(z|x) = N(mean(x), std(x)^2), p(x|z) = Bernoulli.

    importance_samples: k. With 1, the loss is the negative ELBO with the analytic KL divergence (Kingma & Welling
        2013, appendix B); with more, the negative IWAE bound L_k (Burda et al. 2015, equation 8).
    pixel_means: [1, 28, 28] in [0, 1]; the mean of each pixel, at which the output starts. None: it starts grey.
    """

    likelihood = "lower bound"
    quick = {"samples": 100}  # noqa: RUF012

    def __init__(self, importance_samples=1, latent=50, hidden=200, pixel_means: Tensor | None = None):
        super().__init__()
        self.importance_samples, self.latent = importance_samples, latent
        self.encoder = nn.Sequential(nn.Linear(28 * 28, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.mean = nn.Linear(hidden, latent)
        self.log_std = nn.Linear(hidden, latent)
        logits = nn.Linear(hidden, 28 * 28)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), logits)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # Glorot & Bengio 2010, as in the paper
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if pixel_means is not None:
            logits.bias.data.copy_(pixel_means.flatten().clamp(1e-3, 1 - 1e-3).logit())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and log standard deviation of q(z|x), both [N, latent]."""
        h = self.encoder(images.flatten(1))
        return self.mean(h).float(), self.log_std(h).float()

    def decode(self, z: Tensor) -> Tensor:
        """The pixel probabilities of p(x|z), [N, 1, 28, 28], for latent z [N, latent]."""
        return self.decoder(z).float().sigmoid().view(-1, 1, 28, 28)

    def loss(self, images: Tensor) -> Tensor:
        """The negative lower bound on log p(x), in nats per image; a scalar."""
        mean, log_std = self.encode(images)
        if self.importance_samples > 1:
            log_w = self.log_weights(images, mean, log_std, self.importance_samples)  # [k, N]
            return math.log(len(log_w)) - log_w.logsumexp(0).mean()  # L_k = E log 1/k sum_i w_i
        z = mean + log_std.exp() * torch.randn_like(mean)
        log_p = bernoulli_log_prob(images.flatten(1), self.decoder(z).float()).sum(1)
        kl = (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1) / 2  # KL(q(z|x) || p(z))
        return (kl - log_p).mean()  # ELBO = E_q log p(x|z) - KL

    def log_weights(self, images: Tensor, mean: Tensor, log_std: Tensor, k: int) -> Tensor:
        """log w = log p(x, z) - log q(z|x) for k samples z ~ q(z|x) of each image; [k, N] in nats."""
        eps = torch.randn(k, *mean.shape, device=mean.device)
        z = mean + log_std.exp() * eps  # [k, N, latent]
        log_p = bernoulli_log_prob(images.flatten(1), self.decoder(z).float()).sum(-1)  # log p(x|z)
        return log_p + ((eps**2 - z**2) / 2 + log_std).sum(-1)  # + log p(z) - log q(z|x); both have -1/2 log 2 pi

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, samples=5000, block=1000) -> Tensor:
        """The bound L_samples on log p(x), [N] in nats. `block`: how many decoded images fit in memory at once."""
        bounds = []
        for x in images.split(max(1, block // samples)):
            mean, log_std = self.encode(x)
            sizes = [min(block, samples - done) for done in range(0, samples, block)]
            parts = [self.log_weights(x, mean, log_std, k).logsumexp(0) for k in sizes]
            bounds.append(torch.stack(parts).logsumexp(0) - math.log(samples))
        return torch.cat(bounds)

    def noise(self, n: int, generator: Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """z ~ N(0, I), [n, latent]."""
        return torch.randn(n, self.latent, device=device, generator=generator)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """The pixel probabilities p(x|z) for z ~ N(0, I), [n, 1, 28, 28]."""
        return self.decode(self.noise(n, generator, self.mean.weight.device))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The pixel probabilities p(x|z) at the mean z of q(z|x), [N, 1, 28, 28]."""
        return self.decode(self.encode(images)[0])

    def images_of(self, images: Tensor, generator: Generator | None = None) -> dict[str, Tensor]:
        """reconstructions: images, each above its reconstruction.

        plane: if z has 2 dimensions, p(x|z) on a grid of quantiles of each (Kingma & Welling 2013, figure 4).
        """
        parts = images[:50].split(10)
        grids = {"reconstructions": torch.cat([torch.cat([part, self.reconstruct(part)]) for part in parts])}
        if self.latent == 2:
            quantiles = torch.special.ndtri((torch.arange(10, device=images.device) + 0.5) / 10)
            with torch.no_grad():
                grids["plane"] = self.decode(torch.cartesian_prod(quantiles, quantiles))
        return grids
