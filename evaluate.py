"""Measure a run on the test set, and plot what it gets right and wrong.

python evaluate.py runs/cnn-mnist                              # numbers and plots in runs/cnn-mnist/evaluation
python evaluate.py weights/cnn.pt --image mine.jpg other.png   # classify your own digits
python evaluate.py weights/cnn.pt --dataset mine               # score it on mine/3/a.jpg, mine/7/b.jpg, ...
python evaluate.py runs/gan-mnist                              # a generator: FID, Parzen log-likelihood, coverage, ...
python evaluate.py weights/cgan.pt --samples 100 --digit 7     # sample from it
"""

import engine  # noqa: F401, I001 (before torch, so that Ctrl-C during its import prints one line)
import argparse
import io
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import utils
from datasets import DATASETS, SHOW_DIGITS, Batches, binarise, class_names, digest, load, load_test
from datasets import require_folder, short_name
from datasets.binarise import TEST_SEED
from datasets.folder import pictures, read_image
from engine import flags
from engine.checkpoint import write_atomically
from engine.device import pick_device
from engine.errors import DataError, UserError, run_script
from engine.folder import lock, make_folder
from engine.plots import save_figure, save_grid
from measures import classifier, trained
from measures.generator import beside_real_images, nearest_images, print_measures, require_enough
from measures.likelihood import likelihood_measures, print_likelihood
from measures.reference import load_reference
from measures.samples import NOISE_SEED, is_conditional, sample_images, spread, walks
from measures.trained import class_numbers, load_model, load_network, sample
from photos import Reading, read

__all__ = ["classify", "load_model", "main", "sample"]  # from evaluate import classify, load_model, sample

SAMPLES = 10_000  # by which a generator is measured
Plots = dict[str, Any]  # file name -> matplotlib's figure, or the arguments of save_grid, or text


def get_args_parser() -> flags.ArgumentParser:
    parser = flags.ArgumentParser("evaluate.py", __doc__)
    add, number = parser.add_argument, flags.number
    add("run", metavar="RUN", type=flags.path, help="run folder, or one checkpoint file")
    add("--data-dir", type=flags.path, help="folder of the datasets (default: the run's own)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--dataset", metavar="NAME", type=flags.path, help="classify this dataset or folder instead of the run's own")
    add("--batch-size", type=number(int, 1, 2**31), default=1000, help="batch size")
    add("--device", type=flags.device_name, default="auto", help="auto, cpu, cuda, cuda:1, ... or mps")
    one("--image", metavar="FILE", nargs="+", type=flags.path, help="classify these image files, or those of a folder")
    one("--samples", metavar="N", type=number(int, 1, 100_000), help="only generate N samples, as an image and as .npz")
    add("--separate", action="store_true", help="also write each sample to its own image file")
    add("--digit", metavar="CLASS", nargs="+", help="classes to sample, by name or number (conditional generators)")
    add("--columns", type=number(int, 1), help="columns of the grid of samples (default: about as many as rows)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="random seed of the noise")
    return parser


def read_whole(model: Any, picture: Any) -> torch.Tensor:
    """The whole image. The built-in datasets are light on black, so a network of them sees a light picture inverted."""
    images = read_image(picture)
    return 255 - images if model.options["dataset"] in DATASETS and images[..., 0].float().mean() > 127 else images


def read_picture(model: Any, picture: Any) -> Reading:
    """What the network sees in a file or PIL image: each digit or character, with the probabilities of the classes.

    A network trained on a folder or on clothes sees the whole image.
    """
    if model.options["dataset"] == "fashion-mnist" or model.options["dataset"] not in DATASETS:
        reading = Reading(read_whole(model, picture), torch.empty(0))
    elif model.options["classes"] == list("0123456789"):
        return read(picture, partial(trained.classify, model))
    else:
        reading = read(picture)
    return reading._replace(probabilities=trained.classify(model, reading.images / 255), sure=True)


def read_one(model: Any, path: str) -> torch.Tensor:
    """`read_picture` for an image of a labelled folder: the whole image, if not one digit is found in it."""
    with suppress(DataError):
        if len(images := read_picture(model, path).images) == 1:
            return images
    return read_whole(model, path)


def classify(model: Any, images: Any) -> torch.Tensor:
    """measures.trained.classify, which also takes a picture: its path, or a PIL image."""
    is_picture = isinstance(images, str | Path) or hasattr(images, "convert")
    return trained.classify(model, read_picture(model, images).images / 255 if is_picture else images)


def save(plots: Plots, folder: Path, *others: str) -> None:
    """Write each plot to `folder`, and print the names of all files that were written there."""
    for name, plot in plots.items():
        if isinstance(plot, str):
            write_atomically(folder / name, plot.encode(errors="backslashreplace"))
        elif isinstance(plot, tuple):
            save_grid(plot[0], folder / name, *plot[1:])
        else:
            save_figure(plot, folder / name)
    print(f"wrote to {folder}: {', '.join([*plots, *others])}")


def read_number(model: Any, reading: Reading) -> tuple[torch.Tensor, str]:
    """The network's probabilities for each image of a reading, and the number, with "(unsure)" if it is."""
    names, (numbers, sure) = model.options["classes"], reading.answer()
    between = "" if max(map(len, names)) == 1 else " "
    number = between.join(names[number] for number in numbers) + ("" if sure else " (unsure)")
    return classify(model, reading.images / 255), number


def classify_photos(model: Any, paths: Sequence[str], folder: Path) -> None:
    """Print the digits in each image file, and plot what the network saw. Exit status 1 if one could not be read."""
    seen, captions, names = [], [], model.options["classes"]
    paths, failed = [*paths], False
    for i, path in enumerate(paths):
        try:
            if os.path.isdir(path):
                paths[i + 1 : i + 1] = pictures(path)
                continue
            reading = read_picture(model, path)
        except DataError as error:
            print(f"evaluate.py: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            failed = True
            continue
        probabilities, number = read_number(model, reading)
        print(f"{path}: {number}")
        for row in probabilities.tolist():
            print("  " + "  ".join(f"{name}: {value:.2%}" for name, value in zip(names, row)))
        seen.append(reading.images)
        captions += [Path(path).name[-13:]] * len(reading.images)
    if seen:
        make_folder(folder)
        save({"seen.png": (torch.cat(seen) / 255, 10, 3, captions)}, folder)
    if failed:
        sys.exit(1)


def evaluate_classifier(model: Any, args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Plots]:
    """Measures of the test set, and plots."""
    options = model.options
    read, names = partial(read_one, model) if args.dataset else None, options["classes"]
    images, labels, files = load_test(args.dataset or options["dataset"], args.data_dir, names, read)
    if not args.dataset and options["dataset"] not in DATASETS:
        with suppress(DataError), redirect_stdout(io.StringIO()):  # its training images may be gone
            warn_of_other_images(args.run, options, load(options["dataset"], args.data_dir))
    batches = Batches(images, labels, args.batch_size, device, black=options["black"], shuffle=False)
    logits = utils.predict(model, batches)[0].cpu()
    metrics = classifier.classification_measures(logits, labels, names)
    classifier.print_report(logits, labels, metrics, names)
    plots = {
        "confusion_matrix.png": classifier.plot_confusion(metrics["confusion_matrix"], names),
        "mistakes.png": classifier.plot_mistakes(images, logits, labels, names),
        "filters.png": classifier.plot_filters(model),
        "predictions.csv": classifier.predictions_table(logits, labels, names, files),
    }
    return {"model": options["model"], **metrics}, {name: plot for name, plot in plots.items() if plot}


def warn_of_other_images(run: str, options: dict[str, Any], train_set: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Warn if a folder's training images have changed since: a renamed file may now be in the other part."""
    if options.get("dataset_digest") not in (None, digest(*train_set)):
        reason = f"{options['dataset']} has other training images than {run} was trained on"
        print(f"warning: {reason}; some of those may be test images now", file=sys.stderr)


def walk_plots(network: Any, args: argparse.Namespace, suffix: str) -> Plots:
    grids = walks(network, args.seed, args.digit).items()
    return {f"{name}{suffix}.png": (images.flatten(0, 1), images.shape[1]) for name, images in grids}


def write_samples(network: Any, args: argparse.Namespace, folder: Path) -> None:
    """--samples: a grid of them, and their raw values, with noise and labels if they have any, as .npz."""
    import numpy as np

    names = network.options["classes"]
    images, labels, z = sample_images(network, spread(args.samples, args.digit or range(len(names))), args.seed)
    arrays: dict[str, Any] = {"images": images[:, 0], "z": z, "labels": labels}
    suffix = f"{asked(args.digit, names)}-seed{args.seed}"
    packed, name = io.BytesIO(), f"samples-{args.samples}{suffix}"
    np.savez_compressed(packed, **{key: array.numpy() for key, array in arrays.items() if array is not None})
    write_atomically(folder / f"{name}.npz", packed.getvalue())
    if args.separate:
        for i, image in enumerate(images):
            save_grid(image[None], folder / name / f"{i:05}.png", columns=1, scale=1)
    shown = images[:: -(-len(images) // 2500)]  # at most 2,500
    grids = {f"{name}.png": (shown, args.columns or math.ceil(len(shown) ** 0.5)), **walk_plots(network, args, suffix)}
    save(grids, folder, f"{name}.npz", *[f"{name}/"] * args.separate)


def asked(digits: list[int] | None, names: list[str]) -> str:
    """The classes that --digit asks for, as a part of a file's name."""
    plain = all(re.fullmatch(r"[\w.]+", name) for name in names)  # else two requests could have one file name
    return f"-digit{'-'.join(names[digit] if plain else str(digit) for digit in digits)}" if digits else ""


def evaluate_generator(network: Any, args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Plots]:
    """Measures of SAMPLES images beside those of real images, the log-likelihood if the model has one, and plots."""
    dataset, plots = network.options["dataset"], walk_plots(network, args, f"-seed{args.seed}")
    classes = class_names(dataset, args.data_dir, network.options["classes"])
    train_set, test_set = (load(dataset, args.data_dir, train=part) for part in (True, False))
    if dataset not in DATASETS:
        warn_of_other_images(args.run, network.options, train_set)
    require_enough(train_set[0], test_set[0])
    metrics: dict[str, Any] = dict(noise_seed=args.seed, parameters=sum(map(torch.numel, network.parameters())))
    if hasattr(network, "log_likelihood"):
        images = (binarise(test_set[0], TEST_SEED) / 255).to(device)
        metrics.update(likelihood_measures(network, images))
        print_likelihood(metrics)
        if hasattr(network, "images_of"):
            tens = images[: len(images) // 10 * 10 or None]  # whole rows
            grids = network.images_of(tens, torch.Generator(device).manual_seed(NOISE_SEED + args.seed))
            plots.update({f"{name}.png": (grid.cpu(), 10) for name, grid in grids.items()})
    columns = len(classes) if is_conditional(network) else 10
    started = time.monotonic()
    samples, labels, _ = sample_images(network, torch.arange(SAMPLES) % columns, args.seed)
    metrics["sampling_seconds"] = time.monotonic() - started
    pairs = torch.cat([samples[:20], nearest_images(samples[:20], train_set[0])])
    plots.update({"samples.png": (samples[: 10 * columns], columns), "real_images.png": (test_set[0][:100] / 255, 10)})
    plots["nearest_training_images.png"] = pairs, 20
    digits = classes == list("0123456789")
    metrics.update(beside_real_images(samples, labels, train_set, test_set, load_reference(device), digits))
    print_measures(metrics)
    if dataset not in SHOW_DIGITS:
        print(f"warning: the reference classifier knows only MNIST's digits; its features of {dataset} mean little")
    return metrics, plots


def is_own(folder: str, data_dir: str, options: dict[str, Any]) -> bool:
    """Whether `folder` is the one that a run was trained on, to which images may have been added, or a copy of it."""
    if {folder, options["dataset"]} & {*DATASETS}:
        return False
    with suppress(DataError):  # the run's own may be gone
        if require_folder(folder, data_dir).samefile(require_folder(options["dataset"], data_dir)):
            return True
    with suppress(DataError), redirect_stdout(io.StringIO()):  # it may have no training part
        return digest(*load(folder, data_dir)) == options.get("dataset_digest")
    return False


def refuse_impossible(network: Any, args: argparse.Namespace) -> None:
    generates = hasattr(network, "sample")
    if args.samples is not None and not generates:
        raise UserError(f"{args.run} is a classifier; --samples needs a run of a generator")
    if args.digit and not is_conditional(network):
        raise UserError(f"{args.run} was trained without labels; --digit needs a run of a conditional generator")
    if (args.image or args.dataset) and generates:
        flag = "--image" if args.image else "--dataset"
        raise UserError(f"{args.run} is a generator; {flag} needs a run of a classifier")


def warn_if_unfinished(run: str, checkpoint: dict[str, Any]) -> None:
    if checkpoint["options"].get("dry_run"):
        print(f"warning: {run} is a dry run of a few steps; its results mean nothing", file=sys.stderr)
    folder, batch = evaluation_folder(Path(run)).parent, checkpoint.get("batch", 0)
    where = f"epoch {checkpoint['epoch']}" + f" and {batch} batches of the next" * bool(batch)
    if batch:
        print(f"warning: {run} was saved within an epoch; these are the results of {where}", file=sys.stderr)
    try:
        if (folder / ".lock").is_file():
            lock(folder).release()
    except UserError:
        print(f"warning: {run} is still training; these are the results of {where}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    for name in ("digit", "columns", "separate"):
        if getattr(args, name) not in (None, False) and args.samples is None:
            parser.error(f"--{name} needs --samples N")
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")  # TF32, as in training, would round a log-likelihood
    network, checkpoint = load_network(args.run, device)
    refuse_impossible(network, args)
    args.data_dir = args.data_dir or network.options.get("data_dir", "data")
    args.digit = args.digit and class_numbers(args.digit, network.options["classes"])
    if args.dataset and is_own(args.dataset, args.data_dir, network.options):
        network.options["dataset"], args.dataset = args.dataset, None  # only its test part was not trained on
    folder = evaluation_folder(Path(args.run)) / (results_name(args.dataset) if args.dataset else "")
    warn_if_unfinished(args.run, checkpoint)
    if args.image:
        classify_photos(network, args.image, folder)
        return None
    make_folder(folder)
    if args.samples is not None:
        write_samples(network, args, folder)
        return None
    measure = evaluate_generator if hasattr(network, "sample") else evaluate_classifier
    measured, plots = measure(network, args, device)
    position = {"epochs": checkpoint["epoch"], **({"batch": batch} if (batch := checkpoint.get("batch")) else {})}
    metrics = {"dataset": args.dataset or network.options["dataset"], **position, **measured}
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    save(plots, folder, "metrics.json")
    return metrics


def evaluation_folder(run: Path) -> Path:
    """RUN/evaluation; for a file outside a run, such as those of weights/, runs/<its name>-weights/evaluation."""
    if run.is_dir() or (run.parent / "config.json").is_file():
        return (run if run.is_dir() else run.parent) / "evaluation"
    return Path("runs") / f"{run.stem}-weights" / "evaluation"


def results_name(dataset: str) -> str:
    """Of the results' folder: the dataset's name, with a checksum if it is a folder elsewhere: two may share a name."""
    name = short_name(dataset)
    if dataset in DATASETS or (os.path.normpath(dataset) == name and name not in DATASETS):
        return name
    return f"{name}-{zlib.crc32(os.fsencode(os.path.abspath(dataset))):08x}"


if __name__ == "__main__":
    run_script(main)
