"""Mini-batches of a dataset that lives on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.errors import DataError


class Batches:
    """A whole dataset as a uint8 tensor on the device, shuffled, and normalised one batch at a time.

    images: uint8 [N, C, H, W]; labels: int64 [N]. Raises DataError if they are something else. Batches are float32
    images [B, C, H, W], in which a black pixel is `black` and a white one is 1, and labels [B]. The last batch of an
    epoch may be smaller.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        device: torch.device | str,
        black: float = -1.0,
        shuffle: bool = True,
        seed: int = 0,
    ):
        require_images(images, labels)
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.black, self.shuffle, self.seed = batch_size, black, shuffle, seed

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)  # rounded up

    def rows(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """The batches of `epoch` from number `start` on, as row numbers, int64 [B].

        Their order depends on (seed, epoch) alone. It is drawn on the CPU, so that every device sees the same one.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        n = len(self.images)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        return iter(order.to(self.images.device).split(self.batch_size)[start:])

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels of these rows."""
        scale = (1 - self.black) / 255
        return self.images[rows].float().mul_(scale).add_(self.black), self.labels[rows]

    def pixel_means(self) -> Tensor:
        """The mean of each pixel over all images, [C, H, W] in [0, 1], without a float copy of them."""
        return self.images.sum(0).div(255 * len(self.images))


def require_images(images: Tensor, labels: Tensor) -> None:
    """Raise DataError unless these are images and labels as `Batches` takes them."""
    if images.dtype != torch.uint8:
        remedy = "convert them: (255 * images).round().to(torch.uint8) if they lie in [0, 1]"
        raise DataError(f"images must be uint8 with pixels from 0 to 255, not {images.dtype}; {remedy}")
    if images.dim() != 4 or len(images) != len(labels):
        shapes = f"images {list(images.shape)} and labels {list(labels.shape)}"
        raise DataError(f"a dataset must be images [N, C, H, W] and labels [N], not {shapes}; reshape them")
    if labels.is_floating_point():
        raise DataError(f"labels must be whole numbers, not {labels.dtype}; convert them: labels.long()")
