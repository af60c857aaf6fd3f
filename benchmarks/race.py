"""Seconds from the start of the process to 99.0 % of the test images: `--recipe fast --amp` against the ordinary way.

python benchmarks/race.py --data-dir data --seeds 5

The ordinary way is the recipe of pytorch/examples (two convolutions, dropout, Adadelta with lr 1 times .7 an epoch,
batch 64) in the loop that a student would write, stopped after the first epoch that reaches 99.0 %. Ours is one process
of a fixed length, whose accuracy is measured afterwards. The two take turns.
Writes benchmarks/results/race-DEVICE.json.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def ordinary(data_dir, device, seed):
    """Train until 99.0 % and print the epochs and the test accuracy, [0, 1]."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from torchvision import transforms

    from ordinary_loops import make_loader, make_test_loader

    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    with tempfile.TemporaryDirectory() as folder:
        train_loader = make_loader(data_dir, folder, transform, 64, None, 0, device)
        test_loader = make_test_loader(folder, transform)
        epochs, accuracy = 0, 0.0
        while accuracy < 0.99 and epochs < 14:
            model.train()
            for images, labels in train_loader:
                images, labels = images.to(device), labels.to(device)
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            epochs += 1
            model.eval()
            with torch.no_grad():
                right = [(model(images.to(device)).argmax(1).cpu() == labels).sum() for images, labels in test_loader]
            accuracy = sum(right).item() / len(test_loader.dataset)
    print(json.dumps({"epochs": epochs, "test_accuracy": accuracy}))


def timed(*command):
    """Seconds that a Python process takes, and what it prints."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, done.stdout


def ours(data_dir, device, seed, folder):
    run = Path(folder) / f"run-{seed}"
    flags = ["--data-dir", data_dir, "--device", device]
    recipe = ["--recipe", "fast", "--amp", "--seed", seed]
    seconds, output = timed(ROOT / "train_classifier.py", *recipe, *flags, "--output-dir", run)
    timed(ROOT / "evaluate.py", run, *flags)
    training = sum(float(match) for match in re.findall(r"^epoch .* ([\d.]+) s$", output, re.MULTILINE))
    accuracy = json.loads((run / "evaluation" / "metrics.json").read_text())["test_accuracy"]
    return {"seconds": seconds, "of_training": training, "test_accuracy": accuracy}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST (default: data)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of ours (default: 5)")
    parser.add_argument("--ordinary-seeds", type=int, default=5, help="runs of the ordinary way (default: 5)")
    parser.add_argument("--ordinary", type=int, metavar="SEED", help=argparse.SUPPRESS)  # the process that is timed
    args = parser.parse_args()
    if args.ordinary is not None:
        ordinary(args.data_dir, args.device, args.ordinary)
        return

    rows = {"ours": [], "ordinary": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(max(args.seeds, args.ordinary_seeds)):
            if seed < args.seeds:
                rows["ours"].append(ours(args.data_dir, args.device, seed, folder))
                print("ours", rows["ours"][-1], flush=True)
            if seed < args.ordinary_seeds:
                flags = ["--data-dir", args.data_dir, "--device", args.device, "--ordinary", seed]
                seconds, output = timed(__file__, *flags)
                rows["ordinary"].append({"seconds": seconds, **json.loads(output)})
                print("ordinary", rows["ordinary"][-1], flush=True)

    from engine.provenance import environment

    means = {
        name: {key: statistics.mean(row[key] for row in many) for key in many[0]} for name, many in rows.items() if many
    }
    for name, mean in means.items():
        print(f"{name:9} {mean['seconds']:7.1f} s, test accuracy {mean['test_accuracy']:.2%}, {len(rows[name])} seeds")
    print(f"ratio {means['ordinary']['seconds'] / means['ours']['seconds']:.1f}")
    result = {"means": means, "rows": rows, **environment()}
    (ROOT / "benchmarks" / "results" / f"race-{args.device}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
