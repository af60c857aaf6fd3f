"""Measure a finished or half-finished run on the test set, and draw what a teacher would show.

python evaluate.py runs/cnn-mnist                              # numbers and pictures in runs/cnn-mnist/evaluation
python evaluate.py runs/cnn-mnist --image mine.jpg other.png   # read digits of your own
python evaluate.py runs/gan-mnist                              # a generator: FID, Parzen log-likelihood, coverage, ...
python evaluate.py runs/cgan-mnist --samples 100 --digit 7     # draw from it
"""

import io
import json
import math
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

import utils
from datasets import SHOW_DIGITS, Batches, load, read_photo
from models import GANS, build_classifier
from models.cgan import ConditionalGenerator
from models.gan import draw_noise
from models.judge import load_judge
from models.parzen import SIGMAS, parzen_log_likelihood


def get_args_parser():
    number = utils.number
    parser = utils.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, or one checkpoint file")
    add("--data-dir", help="folder of the data sets (None: the one the run was trained from)")
    add("--batch-size", type=number(int, 1), default=1000, help="images at a time")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--image", metavar="FILE", nargs="+", help="classify these pictures instead of the test set")
    add("--samples", metavar="N", type=number(int, 1, 100_000), help="only draw N samples, as a picture and as .npz")
    add("--digit", type=number(int, 0, 9), help="draw this digit alone (conditional generators)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the noise that samples are drawn from")
    return parser


NETWORKS = {  # script -> the network that its runs stand for, and its name among the saved
    "train_classifier.py": (lambda o: build_classifier(o["model"], o["activation"], o["batch_norm"]), "model"),
    "train_gan.py": (lambda o: GANS[o["networks"]][0](), "generator"),
    "train_cgan.py": (lambda o: ConditionalGenerator(), "generator"),
}


def load_network(run, device):
    """The network that the run stands for (best.pt, averaged weights, where there are such) and its checkpoint."""
    path = Path(run)
    best = path / "best.pt"
    checkpoint = utils.load_checkpoint(best if best.is_file() else path)
    options, state = checkpoint["options"], checkpoint["state"]
    build, name = NETWORKS[options["script"]]
    try:
        network = build(options)
        network.load_state_dict(state["average"]["model"] if "average" in state else state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise utils.UserError(
            f"{run} does not fit models/, which has changed since: {' '.join(str(error).split())}"
        ) from error
    return network.eval().to(device), checkpoint


# Classifiers ----------------------------------------------------------------------------------------------------------


def measure(logits, labels):
    """What metrics.json holds of logits [N, 10] and labels [N], both on the CPU."""
    from sklearn.metrics import classification_report, confusion_matrix

    guesses = logits.argmax(1)
    digits = list(range(10))
    report = classification_report(labels, guesses, labels=digits, output_dict=True, zero_division=0)
    return {
        "test_images": len(labels),
        "test_accuracy": (guesses == labels).double().mean().item(),
        "test_errors": (guesses != labels).sum().item(),
        "test_loss": F.cross_entropy(logits.double(), labels).item(),
        "per_class": {str(digit): report[str(digit)] for digit in digits},
        "confusion_matrix": confusion_matrix(labels, guesses, labels=digits).tolist(),  # rows: true, columns: predicted
    }


def print_report(metrics):
    print("digit  precision  recall      f1  images")
    for digit, row in metrics["per_class"].items():
        print(
            f"{digit:>5}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1-score']:6.4f}  {row['support']:6.0f}"
        )
    print(
        f"test accuracy {metrics['test_accuracy']:.2%}: {metrics['test_errors']} errors in {metrics['test_images']} "
        f"images, cross-entropy {metrics['test_loss']:.4f}"
    )


def save_figure(figure, path):
    utils.save_figure(figure, path)
    print(f"wrote {path}")


def draw_confusion(matrix, folder):
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(6, 6), layout="constrained")
    counts = torch.tensor(matrix).float()
    axis = figure.add_subplot()
    # The colours saturate at the most frequent mistake: the diagonal would drown all others.
    worst = max(1.0, (counts - torch.diag(counts.diag())).max().item())
    display = ConfusionMatrixDisplay(torch.tensor(matrix).numpy())
    display.plot(ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 2 * worst})
    axis.set(xlabel="predicted digit", ylabel="true digit")
    save_figure(figure, folder / "confusion_matrix.png")


def draw_mistakes(images, logits, labels, folder):
    """The 30 wrongly read images that the network was surest of, the surest first."""
    from matplotlib.figure import Figure

    probabilities, guesses = logits.softmax(1).max(1)
    wrong = (guesses != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True)][:30].tolist()
    rows = max(1, -(-len(worst) // 10))
    figure = Figure(figsize=(10, 0.3 + 1.5 * rows), layout="constrained")
    figure.suptitle(f"the {len(worst)} surest of {len(wrong)} mistakes: predicted (probability), true")
    for place, index in enumerate(worst):
        axis = figure.add_subplot(rows, 10, place + 1)
        axis.imshow(images[index, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{guesses[index]} ({probabilities[index]:.0%})\ntrue {labels[index]}", fontsize=9)
        axis.axis("off")
    save_figure(figure, folder / "mistakes.png")


def draw_filters(model, folder):
    """Weights into the first layer's first 64 units: 3x3 kernels of a CNN, 28x28 images of what an MLP looks for.

    Draws nothing for a network whose first layer has no such picture.
    """
    from matplotlib.figure import Figure

    weight = next(p for p in model.parameters() if p.dim() > 1).detach().cpu()[:64]
    if weight.dim() == 4:
        filters = weight[:, 0]
    elif weight.shape[1:] == (28 * 28,):
        filters = weight.view(-1, 28, 28)
    else:
        return
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    figure.suptitle(f"first layer: weights of {len(filters)} linear units, blue negative, red positive")
    for place, kernel in enumerate(filters):
        axis = figure.add_subplot(8, 8, place + 1)
        limit = kernel.abs().max().item()
        axis.imshow(kernel.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
        axis.axis("off")
    save_figure(figure, folder / "filters.png")


def classify_photos(model, paths, device, black):
    """Print the probability of each digit for pictures of the user's own; returns how many could not be read."""
    unread = 0
    for path in paths:
        try:
            image = read_photo(path)
        except OSError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            unread += 1
            continue
        images, _ = next(Batches(image, torch.zeros(1), 1, device, low=black, shuffle=False).epoch(0))
        with torch.no_grad():
            probabilities = model(images).softmax(1)[0]
        print(f"{path}: {probabilities.argmax()}")
        print("  " + "  ".join(f"{digit}: {value:.1%}" for digit, value in enumerate(probabilities.tolist())))
    return unread


def evaluate_classifier(model, options, args, device, folder):
    images, labels = load(options["dataset"], args.data_dir or options["data_dir"], train=False)
    batches = Batches(images, labels, args.batch_size, device, low=options["black"], shuffle=False)
    logits, _ = utils.predict(model, batches)
    logits = logits.cpu()
    metrics = measure(logits, labels)
    print_report(metrics)
    draw_confusion(metrics["confusion_matrix"], folder)
    draw_mistakes(images, logits, labels, folder)
    draw_filters(model, folder)
    return {"model": options["model"], **metrics}


# Generators -----------------------------------------------------------------------------------------------------------


def draw(generator, z, labels):
    """Images [N, 1, 28, 28] from noise z [N, 100] and, unless None, labels [N]; all on the CPU."""
    device = next(generator.parameters()).device
    parts = zip(z.split(1000), labels.split(1000)) if labels is not None else zip(z.split(1000))
    with torch.no_grad():
        return torch.cat([generator(*(tensor.to(device) for tensor in part)).cpu() for part in parts])


def save_grid(images, path, columns):
    utils.save_grid(images, path, columns)
    print(f"wrote {path}")


def suffix(args):
    """Of the names of pictures, so that one request does not overwrite what another has drawn."""
    return f"{'' if args.digit is None else f'-digit{args.digit}'}-seed{args.seed}"


def write_samples(generator, options, args, folder):
    """--samples: a grid of them, and their raw values, noise and labels as .npz."""
    import numpy as np

    n, conditional = args.samples, options["script"] == "train_cgan.py"
    z = draw_noise(n, options["noise"], "cpu", torch.Generator().manual_seed(args.seed))
    labels = None
    if conditional:
        labels = torch.arange(n) * 10 // n if args.digit is None else torch.full((n,), args.digit)
    images = draw(generator, z, labels)
    path = folder / f"samples-{n}{suffix(args)}.png"
    shown = images[:: -(-n // 2500)]
    save_grid(shown, path, columns=math.ceil(len(shown) ** 0.5))
    arrays = {"images": images[:, 0].numpy(), "z": z.numpy()}
    if conditional:
        arrays["labels"] = labels.numpy()
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    utils.write_whole(path.with_suffix(".npz"), packed.getvalue())
    print(f"wrote {path.with_suffix('.npz')}: images {list(arrays['images'].shape)}, pixels from 0 to 1")


def draw_walks(generator, options, args, folder):
    """Images along straight lines through the noise and, of a conditional generator, one noise under all ten labels."""
    conditional, random = options["script"] == "train_cgan.py", torch.Generator().manual_seed(args.seed)
    starts, ends = draw_noise(20, options["noise"], "cpu", random).chunk(2)
    steps = torch.linspace(0, 1, 10).view(1, 10, 1)
    z = starts[:, None].lerp(ends[:, None], steps).flatten(0, 1)  # ten lines of ten places each
    digits = torch.arange(10)
    rows = digits.repeat_interleave(10) if args.digit is None else torch.full((100,), args.digit)
    save_grid(draw(generator, z, rows if conditional else None), folder / f"interpolation{suffix(args)}.png", 10)
    if conditional and args.digit is None:
        images = draw(generator, starts.repeat_interleave(10, dim=0), digits.repeat(10))
        save_grid(images, folder / f"same_noise{suffix(args)}.png", columns=10)


def draw_neighbours(samples, train_images, folder):
    """Twenty samples above the training images nearest to them, so that memorising is seen."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train_images.flatten(1).numpy() / 255)
    rows = nearest.kneighbors(samples.flatten(1).numpy(), return_distance=False)[:, 0]
    save_grid(torch.cat([samples, train_images[rows] / 255]), folder / "nearest_training_images.png", len(samples))


def parzen_measures(samples, validation_images, test_images):
    """The protocol of Goodfellow et al. 2014: sigma is chosen on validation images, the test images are scored."""
    samples = samples.double()
    best = parzen_log_likelihood(samples, validation_images.double(), SIGMAS).mean(1).argmax()
    scores = parzen_log_likelihood(samples, test_images.double(), SIGMAS[best : best + 1])[0]
    return {
        "parzen_log_likelihood": scores.mean().item(),
        "parzen_standard_error": (scores.std() / len(scores) ** 0.5).item(),
        "parzen_sigma": SIGMAS[best],
    }


def feature_distances(features, real_features):
    """FID and KID between features [N, d] and [M, d]."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
    identity = torch.nn.Identity()
    identity.num_features = features.shape[1]
    fid = FrechetInceptionDistance(feature=identity)
    kid = KernelInceptionDistance(feature=identity, subset_size=min(1000, len(features), len(real_features)))
    torch.manual_seed(0)  # of KID's subsets
    for metric in (fid, kid):
        metric.update(real_features.double(), real=True)
        metric.update(features.double(), real=False)
    return {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}


def neighbour_measures(features, real_features, k=5):
    """Do the samples lie among the real images (precision, density), and do they reach all of them (recall, coverage)?

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), Naeem et al. 2020 (arXiv 2002.09797): an image's ball reaches to its
    k-th nearest neighbour in its own set.
    """
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    fake, real = features.numpy(), real_features.numpy()
    fake_radius, real_radius = (
        NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors()[0][:, -1] for points in (fake, real)
    )
    around = torch.zeros(len(fake))  # in how many real balls each sample lies
    covered, recalled = [], []
    for distances in pairwise_distances_chunked(real, fake, working_memory=200):  # blocks of rows of [M, N], in order
        radius = real_radius[len(covered) : len(covered) + len(distances), None]
        around += torch.from_numpy((distances < radius).sum(0))
        covered.extend((distances < radius).any(1))
        recalled.extend((distances < fake_radius).any(1))
    return {
        "precision": (around > 0).float().mean().item(),
        "recall": sum(recalled) / len(recalled),
        "density": (around.mean() / k).item(),
        "coverage": sum(covered) / len(covered),
    }


def class_measures(digits):
    """How often the judge reads each digit, and the Kullback-Leibler divergence of that from equal shares, in nats."""
    shares = digits.bincount(minlength=10) / len(digits)
    return {"class_histogram": shares.tolist(), "class_kl": (math.log(10) + shares.xlogy(shares).sum()).item()}


def measure_images(images, labels, judge, reference):
    """What metrics.json holds of generated or real `images` with pixels in [0, 1], [N, 1, 28, 28].

    labels: the digits they should show, or None. reference: validation images, test images, and test labels.
    """
    validation_images, test_images, test_labels = reference
    features, digits = judge.look(images)
    test_features, _ = judge.look(test_images)
    measures = {
        "images": len(images),
        **parzen_measures(images, validation_images, test_images),
        **feature_distances(features, test_features),
        **neighbour_measures(features, test_features),
        **class_measures(digits),
    }
    if labels is not None:
        measures["conditional_accuracy"] = (digits == labels).double().mean().item()
        measures["class_coverage"] = [
            neighbour_measures(features[labels == digit], test_features[test_labels == digit])["coverage"]
            for digit in range(10)
        ]
    return measures


def print_measures(ours, real):
    print(f"{'':24}{'samples':>10}{'real':>10}   ({ours['images']} samples, {real['images']} real training images)")
    for name, value in ours.items():
        if isinstance(value, float):
            print(f"{name:24}{value:10.4g}{real[name]:10.4g}")
        elif isinstance(value, list):
            for digit in range(10):
                print(f"{f'{name} of {digit}':24}{value[digit]:10.4g}{real[name][digit]:10.4g}")


def evaluate_generator(generator, options, args, device, folder):
    dataset, conditional = options["dataset"], options["script"] == "train_cgan.py"
    train_images, train_labels = load(dataset, args.data_dir or options["data_dir"], train=True)
    test_images, test_labels = load(dataset, args.data_dir or options["data_dir"], train=False)
    z = draw_noise(10_000, options["noise"], "cpu", torch.Generator().manual_seed(args.seed))
    labels = torch.arange(10_000) % 10 if conditional else None
    samples = draw(generator, z, labels)
    draw_walks(generator, options, args, folder)
    draw_neighbours(samples[:20], train_images, folder)

    cut = len(train_images) * 5 // 6  # the paper's validation images are the last 10,000 of MNIST's 60,000
    reference = train_images[cut:][:1000] / 255, test_images / 255, test_labels
    judge = load_judge(device)
    real_images, real_labels = train_images[:cut][:10_000] / 255, train_labels[:cut][:10_000]
    metrics = {
        **measure_images(samples, labels, judge, reference),
        "real": measure_images(real_images, real_labels if conditional else None, judge, reference),
    }
    print_measures(metrics, metrics["real"])
    if dataset not in SHOW_DIGITS:
        print(f"warning: the judge has learnt MNIST's digits; what it says of {dataset} has little meaning")
    return metrics


def main(argv=None):
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.digit is not None and args.samples is None:
        parser.error("--digit needs --samples N")
    device = utils.pick_device(args.device)
    network, checkpoint = load_network(args.run, device)
    options = checkpoint["options"]
    script = options["script"]
    if args.samples is not None and script == "train_classifier.py":
        raise utils.UserError(f"{args.run} is a classifier, which draws nothing; --samples needs a run of a generator")
    if args.digit is not None and script != "train_cgan.py":
        raise utils.UserError(f"{args.run} was not told digits; --digit needs a run of train_cgan.py")
    if args.image and script != "train_classifier.py":
        raise utils.UserError(f"{args.run} is a generator; --image needs a run of train_classifier.py")
    if args.image:
        sys.exit(1 if classify_photos(network, args.image, device, options["black"]) else 0)

    run = Path(args.run)
    folder = (run if run.is_dir() else run.parent) / "evaluation"
    utils.make_folder(folder, exist_ok=True)
    if args.samples is not None:
        write_samples(network, options, args, folder)
        draw_walks(network, options, args, folder)
        return
    evaluate = evaluate_classifier if script == "train_classifier.py" else evaluate_generator
    metrics = {
        "dataset": options["dataset"],
        "epochs": checkpoint["epoch"],
        **evaluate(network, options, args, device, folder),
    }
    utils.write_whole(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(f"wrote {folder / 'metrics.json'}")


if __name__ == "__main__":
    utils.run_script(main)
