"""Measure a run on the test set, and draw what it gets right and wrong.

python evaluate.py runs/cnn-mnist                              # numbers and pictures in runs/cnn-mnist/evaluation
python evaluate.py weights/cnn.pt --image mine.jpg other.png   # read your own digits
python evaluate.py runs/gan-mnist                              # a generator: FID, Parzen log-likelihood, coverage, ...
python evaluate.py weights/cgan.pt --samples 100 --digit 7     # draw from it

From Python:
    from evaluate import classify, load_model, sample
    classify(load_model("weights/cnn.pt"), images)        # probabilities [N, 10]
    sample(load_model("weights/cgan.pt"), 16, digit=7)    # images [16, 1, 28, 28]
"""

import io
import json
import math
import sys
import time
from pathlib import Path

import torch

import utils
from datasets import DATASETS, SHOW_DIGITS, Batches, binarise, class_names, load, read_image
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
from photos import read_photo, to_pixels

ROOT = Path(__file__).resolve().parent


def get_args_parser():
    parser = flags.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add, number = parser.add_argument, flags.number
    add("run", metavar="RUN", help="run folder, or one checkpoint file")
    add("--data-dir", help="folder of the data sets (None: the one the run was trained from)")
    add("--batch-size", type=number(int, 1), default=1000, help="images at a time")
    add(
        "--device", type=flags.device_name, default="auto", help="where to compute: auto, cpu, cuda, cuda:1, ... or mps"
    )
    add("--image", metavar="FILE", nargs="+", help="classify these pictures instead of the test set")
    add("--samples", metavar="N", type=number(int, 1, 100_000), help="only draw N samples, as a picture and as .npz")
    add("--digit", metavar="CLASS", nargs="+", help="draw only these (conditional generators): names, or numbers")
    add("--columns", type=number(int, 1), help="columns of the picture of samples (None: about as many as rows)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of the noise of --samples")
    return parser


NETWORKS = {  # script -> the network that is the result of its runs, and its name in the checkpoint
    "train_classifier.py": (
        lambda o: build_classifier(o["model"], o["activation"], o["batch_norm"], len(o["classes"])),
        "model",
    ),
    "train_gan.py": (lambda o: GANS[o["networks"]][0](), "generator"),
    "train_cgan.py": (lambda o: ConditionalGenerator(classes=len(o["classes"])), "generator"),
    "train_likelihood.py": (build_likelihood_model, "model"),
}


def load_network(run, device):
    """The network that is the run's result (of best.pt and the EMA, if there are any), and its checkpoint.

    run: a run folder, a checkpoint, or a file of weights/, also from another working directory.
    """
    if not Path(run).exists() and (ROOT / run).exists():
        run = ROOT / run
    best = Path(run) / "best.pt"
    checkpoint = load_checkpoint(best if best.is_file() else run)
    warn_if_code_changed(checkpoint, run)
    options, state = checkpoint["options"], checkpoint["state"]
    if "classes" not in options:  # an older file, which is of a data set with a name
        options["classes"] = class_names(options["dataset"], "")
    if options["script"] not in NETWORKS:
        raise UserError(f"{run} is a run of {options['script']}; evaluate.py knows {', '.join(NETWORKS)}")
    build, name = NETWORKS[options["script"]]
    try:
        with torch.random.fork_rng([]):  # the first weights, soon replaced, take none of the caller's random numbers
            network = build(options)
        network.load_state_dict(state["ema"]["model"] if "ema" in state else state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{run} does not match models/, which has changed since: {reason}") from error
    network.options = options
    return network.eval().to(device), checkpoint


# From Python ----------------------------------------------------------------------------------------------------------


def load_model(run, device="cpu"):
    """The network of a run folder, a checkpoint or a file of weights/, in eval mode; its `options` are the run's.

    A classifier takes images [N, 1, 28, 28] scaled as in training and returns logits; `classify` scales any images.
    Raises UserError.
    """
    return load_network(run, torch.device(device))[0]


@torch.no_grad()
def classify(model, images):
    """The probability of each class, [N, classes], for images as `photos.to_pixels` takes them.

    Raises DataError, and UserError if the model is not a classifier.
    """
    if model.options["script"] != "train_classifier.py":
        raise UserError("a generator reads no images; load a classifier, such as weights/cnn.pt")
    device = next(model.parameters()).device
    black = model.options["black"]
    return model((to_pixels(images) * (1 - black) + black).to(device)).softmax(1).cpu()


def sample(model, n, digit=None, seed=0):
    """Draw n images [n, 1, 28, 28] with pixels in [0, 1]. digit: which one a conditional generator draws; None: all.

    Raises UserError if the model draws nothing, or not what it is asked for.
    """
    script = model.options["script"]
    if script == "train_classifier.py":
        raise UserError("a classifier draws nothing; load a generator, such as weights/cgan.pt")
    if digit is not None and script != "train_cgan.py":
        raise UserError("this generator was trained without labels; omit digit, or load a run of train_cgan.py")
    classes = model.options["classes"]
    numbers = class_numbers([] if digit is None else [digit], classes)
    return draw_samples(model, spread(n, numbers), model.options, seed)[0]


def class_numbers(asked, classes):
    """The numbers of the classes that are asked for by name or number; those of all if none is. Raises UserError."""
    numbers = [str(number) for number in range(len(classes))]
    for name in map(str, asked):
        if name not in classes and name not in numbers:
            raise UserError(f"--digit {name}: there is no such class; choose from {', '.join(classes)}")
    return [(classes if str(name) in classes else numbers).index(str(name)) for name in asked or classes]


def spread(n, numbers):
    """n labels, equally many of each number, in order."""
    return torch.tensor(numbers)[torch.arange(n) * len(numbers) // n]


# Classifiers ----------------------------------------------------------------------------------------------------------


def classify_photos(model, paths, folder):
    """Print the digits that each picture shows, and draw what the network saw. Returns how many could not be read.

    A network that was trained on a folder reads a picture as it read those.
    """
    seen, names = [], model.options["classes"]
    read = read_photo if model.options["dataset"] in DATASETS else read_image
    between = "" if max(map(len, names)) == 1 else " "
    for path in paths:
        try:
            images = read(path)
        except OSError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            continue
        probabilities = classify(model, images)
        print(f"{path}: {between.join(names[number] for number in probabilities.argmax(1).tolist())}")
        for row in probabilities.tolist():
            print("  " + "  ".join(f"{name}: {value:.2%}" for name, value in zip(names, row)))
        seen.append(images)
    if seen:
        save_grid(torch.cat(seen) / 255, folder / "seen.png", columns=10)
    return len(paths) - len(seen)


def evaluate_classifier(model, options, args, device, folder):
    data_dir = args.data_dir or options.get("data_dir", "data")
    names = class_names(options["dataset"], data_dir, options["classes"])
    images, labels = load(options["dataset"], data_dir, train=False)
    batches = Batches(images, labels, args.batch_size, device, black=options["black"], shuffle=False)
    logits = utils.predict(model, batches)[0].cpu()
    metrics = classification_measures(logits, labels, names)
    print_report(metrics)
    save_figure(draw_confusion(metrics["confusion_matrix"], names), folder / "confusion_matrix.png")
    save_figure(draw_mistakes(images, logits, labels, names), folder / "mistakes.png")
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
    digits = "-".join(map(str, args.digit or []))
    return f"{digits and f'-digit{digits}'}-seed{args.seed}"


def write_samples(network, options, args, folder):
    """--samples: a grid of them, and their raw values, with noise and labels if they have any, as .npz."""
    import numpy as np

    n = args.samples
    labels = spread(n, args.digit or range(len(options["classes"])))
    images, labels, z = draw_samples(network, labels, options, args.seed)
    path = folder / f"samples-{n}{suffix(args)}.png"
    shown = images[:: -(-len(images) // 2500)]
    save_grid(shown, path, args.columns or columns_of(len(shown)))
    arrays = {"images": images[:, 0], "z": z, "labels": labels}
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: array.numpy() for name, array in arrays.items() if array is not None})
    write_atomically(path.with_suffix(".npz"), packed.getvalue())
    print(f"wrote {path.with_suffix('.npz')}: images {list(images[:, 0].shape)}, pixels from 0 to 1")


def columns_of(n):
    """The number of columns of a grid without empty cells that is as square as n allows, but at most twice too wide."""
    root = math.ceil(n**0.5)
    return next((columns for columns in range(root, 2 * root) if n % columns == 0), root)


def save_walks(network, options, args, folder):
    for name, images in draw_walks(network, options, args.seed, args.digit).items():
        save_grid(images.flatten(0, 1), folder / f"{name}{suffix(args)}.png", columns=images.shape[1])


def evaluate_generator(network, options, args, device, folder):
    dataset, data_dir, likelihood = options["dataset"], args.data_dir or options.get("data_dir", "data"), {}
    classes = len(class_names(dataset, data_dir, options["classes"]))
    columns = classes if options["script"] == "train_cgan.py" else 10
    train_images, train_labels = load(dataset, data_dir, train=True)
    test_images, test_labels = load(dataset, data_dir, train=False)
    if options["script"] == "train_likelihood.py":
        likelihood = evaluate_likelihood(network, test_images, args, device, folder)
    save_walks(network, options, args, folder)
    started = time.monotonic()
    samples, labels, _ = draw_samples(network, torch.arange(10_000) % columns, options, args.seed)
    sampling_seconds = time.monotonic() - started
    save_grid(samples[: 10 * columns], folder / "samples.png", columns=columns)
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
        **measure_images(samples, labels, judge, reference, classes),
        "real": measure_images(real_images, None if labels is None else real_labels, judge, reference, classes),
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
    if args.digit:
        args.digit = class_numbers(args.digit, options["classes"])
    if args.image and script != "train_classifier.py":
        raise UserError(f"{args.run} is a generator; --image needs a run of train_classifier.py")
    folder = evaluation_folder(Path(args.run))
    make_folder(folder, exist_ok=True)
    if args.image:
        if classify_photos(network, args.image, folder):
            sys.exit(1)
        return None
    if args.samples is not None:
        write_samples(network, options, args, folder)
        save_walks(network, options, args, folder)
        return None
    evaluate = evaluate_classifier if script == "train_classifier.py" else evaluate_generator
    metrics = {
        "dataset": options["dataset"],
        "epochs": checkpoint["epoch"],
        **evaluate(network, options, args, device, folder),
    }
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(f"wrote {folder / 'metrics.json'}")
    return metrics


def evaluation_folder(run):
    """RUN/evaluation; for a file that lies in no run, as those of weights/, runs/<its name>-weights/evaluation."""
    folder = run if run.is_dir() else run.parent
    return (
        folder if (folder / "config.json").is_file() or run.is_dir() else Path("runs") / f"{run.stem}-weights"
    ) / "evaluation"


if __name__ == "__main__":
    run_script(main)
