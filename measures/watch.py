"""What a training script watches while a generator trains."""

from collections.abc import Callable, Iterator

import torch

from engine.errors import UserError
from measures.judge import load_judge
from measures.parzen import SIGMAS, parzen_log_likelihood


class Watch:
    """Samples after each epoch: their picture, their Parzen log-likelihood, and signs of failure.

    draw(n): samples from the same n noise vectors in every call, [n, 1, 28, 28] with pixels in [0, 1].
    validation_images: uint8 [M, 1, 28, 28]; the first 1,000 are scored. judge: whether MNIST's judge can read the data.
    labels: the classes that the samples should show, all of them in order for each z, or None. Raises UserError if the
    images do not fit.
    """

    def __init__(
        self,
        draw: Callable[[int], torch.Tensor],
        validation_images: torch.Tensor,
        judge: bool,
        labels: torch.Tensor | None = None,
    ):
        self.draw, self.labels = draw, labels
        self.validation_images = validation_images[:1000] / 255
        first = draw(2)
        if first.shape != (2, 1, 28, 28) or first.min() < 0 or first.max() > 1:
            found = f"{list(first.shape)} with pixels from {first.min():.3g} to {first.max():.3g}"
            raise UserError(f"the generator draws {found}; it must draw [N, 1, 28, 28] with pixels in [0, 1]")
        self.judge = load_judge(first.device) if judge else None

    def validate(self) -> dict[str, float]:
        if not len(self.validation_images):
            return {}
        samples = self.draw(10_000)
        densities = parzen_log_likelihood(samples, self.validation_images.to(samples.device), SIGMAS)
        return {"val_log_likelihood": densities.mean(1).max().item()}

    def grid(self) -> torch.Tensor:
        """100 samples in rows of ten; with labels, a row for each class and a column for each of ten z."""
        if self.labels is None:
            return self.draw(100)
        classes = int(self.labels.max()) + 1
        return self.draw(10 * classes).unflatten(0, (10, classes)).transpose(0, 1).flatten(0, 1)

    def warn(self, row: dict[str, float]) -> None:
        """Print the signs of failure. row: an epoch's metrics."""
        digits = self.judge.read(self.draw(1000))[1] if self.judge else None
        asked = self.labels[:1000].cpu() if self.labels is not None else None
        for sign in failure_signs(row, digits, asked):
            print(f"warning: {sign}")


def failure_signs(
    row: dict[str, float], digits: torch.Tensor | None = None, asked: torch.Tensor | None = None
) -> Iterator[str]:
    """Yield a sentence for each sign that a generator's training fails.

    row: an epoch's metrics. digits: what the judge reads in samples, [N]. asked: what they should show, [N].
    """
    if row.get("loss_d", 1) < 0.02:
        yield f"D's loss is near zero ({row['loss_d']:.4f}): it detects every fake, so G learns nothing; try --r1 0.5"
    if digits is None:
        return
    remedy = "if this lasts, try a larger --r1; --recipe best sets one"
    share, digit = digits.bincount(minlength=10).div(len(digits)).max(0)
    if share > 0.5:
        yield f"{share:.0%} of the samples are read as the digit {digit}; {remedy}"
    if asked is not None and (right := (digits == asked).float().mean()) < 0.5:
        yield f"only {right:.0%} of the samples are read as the digit asked for; {remedy}"
