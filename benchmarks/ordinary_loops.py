"""The loops that most people write: that of pytorch/examples for classifiers, that of PyTorch-GAN for generators."""

import gzip
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST

from datasets.mnist import find_idx, part_stems


def make_loader(data_dir, folder, transform, batch_size, steps, workers, device):
    """So many batches of torchvision's MNIST (None: all), unpacked below `folder`, in a DataLoader."""
    for stem in part_stems("MNIST", "train") + part_stems("MNIST", "t10k"):
        source, target = find_idx(Path(data_dir), stem), Path(folder) / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
    data = MNIST(folder, train=True, transform=transform)
    if steps:
        data = Subset(data, range(batch_size * steps))
    return DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, pin_memory=device == "cuda", persistent_workers=workers > 0
    )


def make_test_loader(folder, transform):
    """The test images that `make_loader` has unpacked there."""
    return DataLoader(MNIST(folder, train=False, transform=transform), batch_size=1000)


def train_classifier(model, optimizer, loader, device):
    losses, accuracies = [], []
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accuracies.append((logits.argmax(1) == labels).float().mean().item())
    return {"loss": statistics.mean(losses), "accuracy": statistics.mean(accuracies)}


def train_gan(generator, discriminator, optimizer_g, optimizer_d, loader, device, conditional):
    losses_d, losses_g = [], []
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        given = [labels] if conditional else []
        fakes = generator(torch.rand(len(images), 100, device=device), *given)
        real = discriminator(images, *given).sigmoid()
        fake = discriminator(fakes.detach(), *given).sigmoid()
        loss_d = F.binary_cross_entropy(real, torch.ones_like(real))
        loss_d = loss_d + F.binary_cross_entropy(fake, torch.zeros_like(fake))
        optimizer_d.zero_grad()
        (loss_d / 2).backward()
        optimizer_d.step()
        again = discriminator(fakes, *given).sigmoid()
        loss_g = F.binary_cross_entropy(again, torch.ones_like(again))
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        losses_d.append(loss_d.item())
        losses_g.append(loss_g.item())
    return {"loss_d": statistics.mean(losses_d), "loss_g": statistics.mean(losses_g)}
