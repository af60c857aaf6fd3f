"""Flags: what every training script shares, and recipes, which are named sets of defaults."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.checkpoint import has_checkpoint, load_checkpoint
from engine.errors import UserError

Recipes = dict[str, dict[str, Any]]


class ArgumentParser(argparse.ArgumentParser):
    """argparse with every default in the help and usage errors on one line."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind: type, smallest: float, largest: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a `kind` from `smallest` to `largest`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value <= largest or value == math.inf:
            bounds = f"of at least {smallest}" if largest == math.inf else f"from {smallest} to {largest}"
            raise argparse.ArgumentTypeError(f"must be {'a whole' if kind is int else 'a'} number {bounds}, not {text}")
        return value

    return parse


def device_name(text: str) -> str:
    """An argparse type: the name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:1, ... or mps, not {text}")
    return text


def shared_args_parser(script: str, description: str, recipes: Recipes, datasets: Sequence[str]) -> ArgumentParser:
    """The flags of every training script. script: its file name. datasets: names that are not folders."""
    parser = ArgumentParser(prog=script, description=description)
    parser.set_defaults(script=script, classes=list("0123456789"))  # the names of the classes: the data set's, in main
    parser.datasets = datasets
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--recipe", choices=list(recipes), default="lecture", help="named set of defaults")
    add("--dataset", metavar="NAME", default="mnist", help=f"{', '.join(datasets)}, or a folder of images")
    add("--data-dir", default="data", help="folder of the data sets; missing files are downloaded")
    add("--epochs", type=number(int, 1), default=1, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 2**31), default=32, help="images per step")
    add("--lr", type=number(float, 0), default=2e-4, help="learning rate")
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="adam", help="update rule")
    add("--betas", type=number(float, 0, 0.999999), nargs=2, default=[0.9, 0.999], help="Adam's decay rates")
    add("--eps", type=number(float, 0), default=1e-8, help="Adam's constant against division by 0")
    add("--momentum", type=number(float, 0, 1), default=0.0, help="SGD's momentum")
    add("--weight-decay", type=number(float, 0), default=0.0, help="pull of the weights towards 0")
    add("--ema", type=number(float, 0, 1), help="decay per step of the weights' moving average, which is the result")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="random seed of weights, order and noise")
    add("--device", type=device_name, default="auto", help="where to train: auto, cpu, cuda, cuda:1, ... or mps")
    add("--cuda-graph", action=on_off, default=True, help="on CUDA, replay the step as one graph")
    add("--compile", action=on_off, default=False, help="compile the whole step (needs a C++ compiler; Triton on CUDA)")
    add("--amp", action="store_true", help="mixed precision (bfloat16)")
    add("--val-size", type=number(int, 0), default=5000, help="last training images held out for validation")
    add("--log-interval", type=number(int, 1), default=100, help="steps between two progress reports")
    add("--save-interval", type=number(float, 0), default=60, help="seconds between checkpoints within an epoch")
    add("--output-dir", metavar="RUN", help="new run folder (None: the next free runs/<model>-<dataset>)")
    add("--resume", metavar="RUN", help="resume this run with its own options")
    add(
        "--start-from", metavar="RUN", help="start from the weights of RUN, or (classifiers, VAE) of a file of weights/"
    )
    add("--auto-resume", action="store_true", help="resume the run in --output-dir, or start it if there is none")
    add("--dry-run", action="store_true", help="a few steps and one evaluation; writes everything")
    return parser


def adversarial_args_parser(*args) -> ArgumentParser:
    """The flags that train_gan.py and train_cgan.py share. args: as for `shared_args_parser`."""
    parser = shared_args_parser(*args)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--generator-loss", choices=["non-saturating", "saturating"], default="non-saturating", help="what G minimises")
    add("--noise", choices=["unit", "centred"], default="unit", help="z uniform on [0, 1), or with mean 0, variance 1")
    add("--init", choices=["torch", "he", "paper"], default="torch", help="initial weights")
    add("--r1", type=number(float, 0), default=0.0, help="weight of the penalty on D's gradient at real images (R1)")
    add("--simultaneous", action=on_off, default=False, help="update G before D changes")
    add("--schedule", choices=["constant", "maxout"], default="constant", help="learning rate over time")
    return parser


# A resumed run may differ in these. Anything else would make it another run.
FREE_ON_RESUME = {
    "resume", "output_dir", "auto_resume", "data_dir", "device", "cuda_graph", "compile", "epochs", "log_interval",
    "save_interval",
}  # fmt: skip


def parse_args(
    parser: ArgumentParser,
    recipes: Recipes,
    variants: dict[tuple[str, str], dict[str, Any]] | None = None,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parsed flags. An explicit flag overrides the recipe. With --resume, the run's own options replace the recipe.

    recipes: name -> defaults. variants: (recipe, model, networks or data set) -> what the recipe sets differently then.
    Raises UserError if flags contradict each other or the resumed run.
    """
    argv = sys.argv[1:] if argv is None else argv
    without_help = [word for word in argv if word not in ("-h", "--help")]
    first, _ = parser.parse_known_args(without_help)
    if first.resume and (first.auto_resume or first.output_dir):
        raise UserError("--resume names the run folder; omit --output-dir and --auto-resume")
    if first.auto_resume and not first.output_dir:
        raise UserError("--auto-resume needs --output-dir, the folder of the run to resume or to start")
    if first.auto_resume and has_checkpoint(first.output_dir):
        first.resume = first.output_dir
    if first.resume:
        if not Path(first.resume).is_dir():
            raise UserError(f"--resume {first.resume}: there is no such run folder")
        defaults = load_checkpoint(first.resume, warn=False)["options"]
        if defaults["script"] != parser.prog:
            raise UserError(f"{first.resume} is a run of {defaults['script']}, not of {parser.prog}")
        parser.set_defaults(**defaults, resume=first.resume)
    else:
        defaults = dict(recipes[first.recipe])
        parser.set_defaults(**defaults)
        first, _ = parser.parse_known_args(without_help)
        dataset = first.dataset if first.dataset in parser.datasets else "folder"
        for name in (getattr(first, "model", None), getattr(first, "networks", None), dataset):
            defaults.update((variants or {}).get((first.recipe, name), {}))
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    changed = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.resume:
        refuse_changes(args, changed, defaults)
    if args.schedule == "maxout" and args.optimizer != "sgd":
        raise UserError("--schedule maxout sets SGD's momentum; add --optimizer sgd")
    print(f"recipe {args.recipe}", *(f"{name}={value}" for name, value in changed.items() if name != "recipe"))
    return args


def refuse_changes(args: argparse.Namespace, changed: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise UserError if a flag would make the resumed run another run."""
    if args.schedule in ("cosine", "burda") and "epochs" in changed:
        raise UserError(f"--epochs {args.epochs}: this run's learning rate ends with its last epoch; omit the flag")
    for name in changed.keys() - FREE_ON_RESUME:
        value, flag = changed[name], name.replace("_", "-")
        flag = f"--no-{flag}" if value is False else f"--{flag}" if value is True else f"--{flag} {value}"
        raise UserError(f"{flag}: {args.resume} was trained with {name}={options.get(name)}; omit {flag}")
