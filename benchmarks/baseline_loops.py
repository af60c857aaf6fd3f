"""The loops that most people write: that of pytorch/examples for classifiers, that of PyTorch-GAN for generators.

`python benchmarks/baseline_loops.py DATA_DIR DEVICE SEED` trains the recipe of pytorch/examples (two convolutions,
dropout, Adadelta with lr 1 times .7 an epoch, batch 64) until the first epoch with 99.0 % of the test images correct.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from datasets.mnist import part_stems, read_idx


def make_loader(data_dir, folder, transform, batch_size, steps, workers, device):
    """So many batches of torchvision's MNIST (None: all), unpacked below `folder`, in a DataLoader."""
    for stem in part_stems("MNIST", "train") + part_stems("MNIST", "t10k"):
        path = Path(folder) / stem
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_idx(Path(data_dir), stem).numpy())
    data = MNIST(folder, train=True, transform=transform)
    if steps:
        data = Subset(data, range(batch_size * steps))
    several = dict(num_workers=workers, pin_memory=device == "cuda", persistent_workers=workers > 0)
    return DataLoader(data, batch_size, shuffle=True, **several)


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
    losses_d, losses_g, bce = [], [], F.binary_cross_entropy
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        given = [labels] if conditional else []
        fakes = generator(torch.rand(len(images), 100, device=device), *given)
        real = discriminator(images, *given).sigmoid()
        fake = discriminator(fakes.detach(), *given).sigmoid()
        loss_d = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
        optimizer_d.zero_grad()
        (loss_d / 2).backward()
        optimizer_d.step()
        fake = discriminator(fakes, *given).sigmoid()
        loss_g = bce(fake, torch.ones_like(fake))
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        losses_d.append(loss_d.item())
        losses_g.append(loss_g.item())
    return {"loss_d": statistics.mean(losses_d), "loss_g": statistics.mean(losses_g)}


def race(data_dir, device, seed):
    """Train until 99.0 % and print the epochs and the test accuracy, [0, 1]."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    with tempfile.TemporaryDirectory() as folder:
        loader = make_loader(data_dir, folder, transform, 64, None, 0, device)
        test_loader = DataLoader(MNIST(folder, train=False, transform=transform), batch_size=1000)
        epochs, accuracy = 0, 0.0
        while accuracy < 0.99 and epochs < 14:
            train_classifier(model.train(), optimizer, loader, device)
            schedule.step()
            epochs += 1
            model.eval()
            with torch.no_grad():
                correct = [(model(x.to(device)).argmax(1).cpu() == y).float().mean().item() for x, y in test_loader]
            accuracy = statistics.mean(correct)
    print(json.dumps({"epochs": epochs, "test_accuracy": accuracy}))


if __name__ == "__main__":
    race(sys.argv[1], sys.argv[2], int(sys.argv[3]))
