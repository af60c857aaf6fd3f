"""Measure a run on the test set, and draw what it gets right and wrong.

python evaluate.py runs/cnn-mnist                              # numbers and pictures in runs/cnn-mnist/evaluation
python evaluate.py runs/cnn-mnist --image mine.jpg other.png   # read your own digits
python evaluate.py runs/gan-mnist                              # a generator: FID, Parzen log-likelihood, coverage, ...
python evaluate.py runs/cgan-mnist --samples 100 --digit 7     # draw from it
"""

import io
import json
import math
import sys
import time
from pathlib import Path

import torch

import utils
from datasets import SHOW_DIGITS, Batches, binarise, load, read_photo
from datasets.binarise import TEST_SEED
from engine import flags, pictures
from engine.checkpoint import load_checkpoint, write_atomically
from engine.device import pick_device
from engine.errors import UserError, run_script
from engine.folder import make_folder
from engine.provenance import warn_if_code_changed
from measures.classifier import classification_measures, draw_confusion, draw_filters, draw_mistakes, print_report
from measures.generator import measure_images, nearest_images, print_measures
from measures.judge import load_judge
from measures.likelihood import draw_pictures, draw_states, likelihood_measures, print_likelihood
from measures.samples import NOISE_SEED, draw_samples, draw_walks
from models import GANS, build_classifier, build_likelihood_model
from models.cgan import ConditionalGenerator


def get_args_parser():
    parser = flags.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add, number = parser.add_argument, flags.number
    add("run", metavar="RUN", help="run folder, or one checkpoint file")
    add("--data-dir", help="folder of the data sets (None: the one the run was trained from)")
    add("--batch-size", type=number(int, 1), default=1000, help="images at a time")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--image", metavar="FILE", nargs="+", help="classify these pictures instead of the test set")
    add("--samples", metavar="N", type=number(int, 1, 100_000), help="only draw N samples, as a picture and as .npz")
    add("--digit", type=number(int, 0, 9), help="draw only this digit (conditional generators)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the noise that samples are drawn from")
    return parser


NETWORKS = {  # script -> the network that is the result of its runs, and its name in the checkpoint
    "train_classifier.py": (lambda o: build_classifier(o["model"], o["activation"], o["batch_norm"]), "model"),
    "train_gan.py": (lambda o: GANS[o["networks"]][0](), "generator"),
    "train_cgan.py": (lambda o: ConditionalGenerator(), "generator"),
    "train_likelihood.py": (build_likelihood_model, "model"),
}


def load_network(run, device):
    """The network that is the run's result (of best.pt and the EMA, if there are any), and its checkpoint."""
    best = Path(run) / "best.pt"
    checkpoint = load_checkpoint(best if best.is_file() else run)
    warn_if_code_changed(checkpoint, run)
    options, state = checkpoint["options"], checkpoint["state"]
    build, name = NETWORKS[options["script"]]
    try:
        network = build(options)
        network.load_state_dict(state["ema"]["model"] if "ema" in state else state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{run} does not match models/, which has changed since: {reason}") from error
    return network.eval().to(device), checkpoint


# Classifiers ----------------------------------------------------------------------------------------------------------


def classify_photos(model, paths, device, black):
    """Print the probability of each digit for the user's own pictures; returns how many could not be read."""
    unread = 0
    for path in paths:
        try:
            image = read_photo(path)
        except OSError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            unread += 1
            continue
        photo = Batches(image, torch.zeros(1, dtype=torch.int64), 1, device, black=black, shuffle=False)
        probabilities = utils.predict(model, photo)[0].softmax(1)[0]
        print(f"{path}: {probabilities.argmax()}")
        print("  " + "  ".join(f"{digit}: {value:.1%}" for digit, value in enumerate(probabilities.tolist())))
    return unread


def evaluate_classifier(model, options, args, device, folder):
    images, labels = load(options["dataset"], args.data_dir or options["data_dir"], train=False)
    batches = Batches(images, labels, args.batch_size, device, black=options["black"], shuffle=False)
    logits = utils.predict(model, batches)[0].cpu()
    metrics = classification_measures(logits, labels)
    print_report(metrics)
    save_figure(draw_confusion(metrics["confusion_matrix"]), folder / "confusion_matrix.png")
    save_figure(draw_mistakes(images, logits, labels), folder / "mistakes.png")
    if filters := draw_filters(model):
        save_figure(filters, folder / "filters.png")
    return {"model": options["model"], **metrics}


def save_figure(figure, path):
    pictures.save_figure(figure, path)
    print(f"wrote {path}")


# Generators -----------------------------------------------------------------------------------------------------------


def save_grid(images, path, columns):
    pictures.save_grid(images, path, columns)
    print(f"wrote {path}")


def suffix(args):
    """Of file names, so that one request does not overwrite the pictures of another."""
    return f"{'' if args.digit is None else f'-digit{args.digit}'}-seed{args.seed}"


def write_samples(network, options, args, folder):
    """--samples: a grid of them, and their raw values, with noise and labels if they have any, as .npz."""
    import numpy as np

    n = args.samples
    labels = torch.arange(n) * 10 // n if args.digit is None else torch.full((n,), args.digit)
    images, labels, z = draw_samples(network, labels, options, args.seed)
    path = folder / f"samples-{n}{suffix(args)}.png"
    shown = images[:: -(-len(images) // 2500)]
    save_grid(shown, path, columns=math.ceil(len(shown) ** 0.5))
    arrays = {"images": images[:, 0], "z": z, "labels": labels}
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: array.numpy() for name, array in arrays.items() if array is not None})
    write_atomically(path.with_suffix(".npz"), packed.getvalue())
    print(f"wrote {path.with_suffix('.npz')}: images {list(images[:, 0].shape)}, pixels from 0 to 1")


def save_walks(network, options, args, folder):
    for name, images in draw_walks(network, options, args.seed, args.digit).items():
        save_grid(images, folder / f"{name}{suffix(args)}.png", columns=10)


def evaluate_generator(network, options, args, device, folder):
    dataset, likelihood = options["dataset"], {}
    train_images, train_labels = load(dataset, args.data_dir or options["data_dir"], train=True)
    test_images, test_labels = load(dataset, args.data_dir or options["data_dir"], train=False)
    if options["script"] == "train_likelihood.py":
        likelihood = evaluate_likelihood(network, test_images, args, device, folder)
    save_walks(network, options, args, folder)
    started = time.monotonic()
    samples, labels, _ = draw_samples(network, torch.arange(10_000) % 10, options, args.seed)
    sampling_seconds = time.monotonic() - started
    save_grid(samples[:100], folder / "samples.png", columns=10)
    save_grid(test_images[:100] / 255, folder / "real_images.png", columns=10)
    pairs = torch.cat([samples[:20], nearest_images(samples[:20], train_images)])
    save_grid(pairs, folder / "nearest_training_images.png", columns=20)

    cut = len(train_images) * 5 // 6  # the paper's validation images are the last 10,000 of MNIST's 60,000
    reference = train_images[cut:][:1000] / 255, test_images / 255, test_labels
    judge = load_judge(device)
    real_images, real_labels = train_images[:cut][:10_000] / 255, train_labels[:cut][:10_000]
    metrics = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "sampling_seconds": sampling_seconds,
        **likelihood,
        **measure_images(samples, labels, judge, reference),
        "real": measure_images(real_images, None if labels is None else real_labels, judge, reference),
    }
    print_measures(metrics, metrics["real"])
    if dataset not in SHOW_DIGITS:
        print(f"warning: the judge knows only MNIST's digits; what it reads in {dataset} means little")
    return metrics


def evaluate_likelihood(model, test_images, args, device, folder):
    """Nats of the binarised test images, and the pictures that show what the model is."""
    images = (binarise(test_images, TEST_SEED) / 255).to(device)
    measures = likelihood_measures(model, images)
    print_likelihood(measures)
    generator = torch.Generator(device).manual_seed(NOISE_SEED + args.seed)
    for name, picture in draw_pictures(model, images, generator).items():
        save_grid(picture.cpu(), folder / f"{name}.png", columns=10)
    if hasattr(model, "viterbi"):
        save_figure(draw_states(model, images[:1000]), folder / "states.png")
    return measures


def main(argv=None):
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.digit is not None and args.samples is None:
        parser.error("--digit needs --samples N")
    device = pick_device(args.device)
    network, checkpoint = load_network(args.run, device)
    options = checkpoint["options"]
    script = options["script"]
    if args.samples is not None and script == "train_classifier.py":
        raise UserError(f"{args.run} is a classifier and draws nothing; --samples needs a run of a generator")
    if args.digit is not None and script != "train_cgan.py":
        raise UserError(f"{args.run} was trained without labels; --digit needs a run of train_cgan.py")
    if args.image and script != "train_classifier.py":
        raise UserError(f"{args.run} is a generator; --image needs a run of train_classifier.py")
    if args.image:
        sys.exit(1 if classify_photos(network, args.image, device, options["black"]) else 0)

    run = Path(args.run)
    folder = (run if run.is_dir() else run.parent) / "evaluation"
    make_folder(folder, exist_ok=True)
    if args.samples is not None:
        write_samples(network, options, args, folder)
        save_walks(network, options, args, folder)
        return
    evaluate = evaluate_classifier if script == "train_classifier.py" else evaluate_generator
    metrics = {
        "dataset": options["dataset"],
        "epochs": checkpoint["epoch"],
        **evaluate(network, options, args, device, folder),
    }
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(f"wrote {folder / 'metrics.json'}")


if __name__ == "__main__":
    run_script(main)
