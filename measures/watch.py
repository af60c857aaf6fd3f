"""What a training script watches while a generator trains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from measures.parzen import SIGMAS, parzen_log_likelihood
from measures.reference import load_reference
from measures.samples import device_of, is_conditional, watched_generator


class Watch:
    """Samples after each epoch, from the same noise each time: a grid, a Parzen log-likelihood, and signs of failure.

    sampler: the latent model that is the result, with `noise` and `decode`. If it is conditional, each z is decoded as
        every class in turn.
    validation_images: uint8 [M, 1, 28, 28]; the first 1,000 are scored. seed: of the noise.
    digits: whether the images show digits, which the reference classifier can read.
    """

    def __init__(self, sampler: Any, validation_images: Tensor, seed: int, digits: bool):
        self.sampler, self.validation_images = sampler, validation_images[:1000] / 255
        self.classes = sampler.classes if is_conditional(sampler) else 0
        device, each = device_of(sampler), max(1, self.classes)
        n = max(10, -(-10_000 // each))
        z = sampler.noise(n, watched_generator(seed), "cpu").to(device)
        self.z = z.repeat_interleave(each, dim=0)
        self.labels = torch.arange(each, device=device).repeat(n)
        self.reference = load_reference(device) if digits else None

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """The first n samples, [n, 1, 28, 28]."""
        return self.sampler.decode(self.z[:n], *([self.labels[:n]] if self.classes else []))

    def validate(self) -> dict[str, float]:
        if not len(self.validation_images):
            return {}
        samples = self.sample(10_000)
        densities = parzen_log_likelihood(samples, self.validation_images.to(samples.device), SIGMAS)
        return {"val_log_likelihood": densities.mean(1).max().item()}

    def grid(self) -> Tensor:
        """100 samples in rows of ten; for a conditional generator, a row for each class, up to 100."""
        if not self.classes:
            return self.sample(100)
        return self.sample(10 * self.classes).unflatten(0, (10, self.classes)).transpose(0, 1)[:100].flatten(0, 1)

    def warn(self, row: dict[str, float]) -> None:
        """Print the signs of failure. row: an epoch's metrics."""
        digits = self.reference.read(self.sample(1000))[1] if self.reference else None
        asked = self.labels[:1000].cpu() if self.classes else None
        for sign in failure_signs(row, digits, asked):
            print(f"warning: {sign}")


def failure_signs(row: dict[str, float], digits: Tensor | None = None, asked: Tensor | None = None) -> Iterator[str]:
    """Yield a sentence for each sign that a generator's training fails.

    row: an epoch's metrics. digits: what the reference classifier predicts for samples, [N]. asked: what they should
    show, [N].
    """
    if 0 <= row.get("loss_d", 1) < 0.02:  # below 0, it is a Wasserstein loss or the like
        yield f"D's loss is near zero ({row['loss_d']:.4f}): D detects every fake, so G learns nothing; raise --r1"
    if digits is None:
        return
    remedy = "if this lasts, raise --r1"
    fraction, digit = digits.bincount(minlength=10).div(len(digits)).max(0)
    if fraction > 0.5:
        yield f"{fraction:.0%} of the samples are classified as the digit {digit}; {remedy}"
    if asked is not None and (right := (digits == asked).float().mean()) < 0.5:
        yield f"only {right:.0%} of the samples are classified as the digit asked for; {remedy}"
