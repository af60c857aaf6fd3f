"""Mini-batches of a data set that lives on the device."""

import torch


class Batches:
    """A whole data set as a uint8 tensor on the device, drawn in batches and normalised one batch at a time.

    images: uint8 [N, 1, 28, 28]; labels: int64 [N]. Batches are float32 images [B, 1, 28, 28] with black at
    `low` and white at 1, and labels [B]; the last batch of an epoch may be shorter.
    """

    def __init__(self, images, labels, batch_size, device, low=-1.0, shuffle=True, seed=0):
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.low = low
        self.shuffle = shuffle
        self.seed = seed

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch, start=0):
        """Yield the batches of `epoch` from number `start` on, in an order that (seed, epoch) alone decides."""
        for (rows,) in self.rows(epoch, start):
            yield self.take(rows)

    def rows(self, epoch, start=0):
        """Yield (row numbers,) of the same batches, int64 [B], for `take`."""
        for rows in self.order(epoch).split(self.batch_size)[start:]:
            yield (rows,)

    def take(self, rows):
        """The images and labels of these rows."""
        scale = (1 - self.low) / 255
        return self.images[rows].float().mul_(scale).add_(self.low), self.labels[rows]

    def order(self, epoch):
        if not self.shuffle:
            return torch.arange(len(self.images), device=self.images.device)
        # Drawn on the CPU, so that every device sees the same order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.images), generator=generator).to(self.images.device)
