"""Flags: those that every training script shares, and recipes, which are named sets of defaults."""

import argparse
import difflib
import math
import os
import re
import sys
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine.checkpoint import has_checkpoint, load_checkpoint
from engine.device import pick_device, seed_all
from engine.distributed import warn_of_other_tasks
from engine.errors import UserError, command, shell
from engine.provenance import ROOT
from engine.run import DEFAULTS, WHERE

Recipes = dict[str, dict[str, Any]]
Variants = dict[tuple[str, str], dict[str, Any]]  # (recipe; model, networks or dataset) -> what the recipe sets then

# A resumed run may differ in these. Any other change would make it another run.
WHERE_TO_COMPUTE = {"data_dir", "device", "threads", "products", "cuda_graph", "compile"}
FREE_ON_RESUME = {*WHERE, *WHERE_TO_COMPUTE, "epochs", "log_interval", "save_interval"}

# A flag -> the option that it depends on, the values of that option with which it has an effect, and the remedy.
NEEDS = {
    "momentum": ("optimizer", ("sgd",), "--optimizer sgd"),
    "betas": ("optimizer", ("adam", "adamw"), "--optimizer adam"),
    "eps": ("optimizer", ("adam", "adamw"), "--optimizer adam"),
    "elastic": ("augment", (True,), "--augment"),
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse with groups by title, defaults in the help, and usage errors on one line.

    doc: the script's docstring: its first line describes the script, the others are examples.
    """

    def __init__(self, prog: str, doc: str | None):
        super().__init__(prog=prog, formatter_class=HelpFormatter, allow_abbrev=False)
        self.describe(doc)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)  # argparse's knows no -5e-1
        self.datasets: Sequence[str] = ()  # names that are not folders
        self.groups: dict[str, Any] = {}

    def describe(self, doc: str | None) -> None:
        self.description, _, examples = (doc or "").partition("\n")  # None: python -OO
        self.epilog = examples.strip("\n")

    def group(self, title: str) -> Callable[..., argparse.Action]:
        """The `add_argument` of the group with this title."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title].add_argument

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            wrong, flags = (re.findall(r"--[\w-]+", text) for text in (message, self.format_usage()))
            nearest = [flag for word in wrong for flag in difflib.get_close_matches(word, flags, 1)]
            remedy = f"; did you mean {nearest[0]}?" if nearest else ""
            message += "; use torchrun, not torch.distributed.launch" if "--local-rank" in wrong else remedy
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return f"{action.help}{'' if hidden else ' (default: %(default)s)'}"


def number(kind: type, smallest: float, largest: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a `kind` from `smallest` to `largest`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value <= largest or value == math.inf:
            bounds = f"of at least {smallest}" if largest == math.inf else f"from {smallest} to {largest}"
            raise argparse.ArgumentTypeError(f"must be {'a whole' if kind is int else 'a'} number {bounds}, not {text}")
        return value

    return parse


def path(text: str) -> str:
    """An argparse type: the path of a file or a folder; ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return os.path.expanduser(text)


def run_folder(text: str) -> str:
    """An argparse type: the path of a run folder, or of a file in it, such as its checkpoint.pt."""
    found = Path(path(text))
    return str(found.parent if found.is_file() else found)


def device_name(text: str) -> str:
    """An argparse type: the name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:1, ... or mps, not {text}")
    return text


def training_parser(
    kind: str, script: str, doc: str | None, recipes: Recipes, datasets: Sequence[str]
) -> ArgumentParser:
    """A parser with the flags of every training script. kind: of its runs, a key of models.KINDS."""
    parser = ArgumentParser(Path(script).name, doc)
    # classes: the names of the dataset's classes; datasets.split sets them
    parser.set_defaults(kind=kind, script=Path(script).name, classes=list("0123456789"), **DEFAULTS)
    parser.datasets = datasets
    add = parser.group("what to train")
    add("--recipe", choices=list(recipes), default="lecture", help="named set of defaults")
    what = "initial weights: those of this run or, for classifiers and the VAE, of this file of weights/"
    add("--start-from", metavar="RUN", type=path, help=what)
    add = parser.group("on what")
    add("--dataset", metavar="NAME", type=path, default="mnist", help=f"{', '.join(datasets)}, or a folder of images")
    add("--data-dir", type=path, default="data", help="folder of the datasets; missing files are downloaded")
    add("--val-size", type=number(int, 0), default=5000, help="number of last training images held out for validation")
    add = parser.group("how to train")
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--batch-size", type=number(int, 1, 2**31), help="images per step")
    add("--lr", type=number(float, 0), default=2e-4, help="learning rate")
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="adam", help="optimizer")
    add("--betas", type=number(float, 0, 0.999999), nargs=2, default=[0.9, 0.999], help="Adam's decay rates")
    add("--eps", type=number(float, 1e-30), default=1e-8, help="Adam's constant against division by 0")
    add("--momentum", type=number(float, 0, 1), default=0.0, help="SGD's momentum")
    add("--weight-decay", type=number(float, 0), default=0.0, help="weight decay")
    add("--ema", type=number(float, 0, 1), help="decay of an EMA of the weights; the averaged weights are the result")
    add("--seed", type=number(int, 0, 2**31 - 1), help="random seed of initial weights, image order, noise")
    add = parser.group("where to compute")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1, ... or mps")
    add("--threads", type=number(int, 1, 1024), help="CPU threads (default: as many as are fastest in the first steps)")
    add("--products", choices=["torch", "onednn"], help="library of matrix products on a CPU (default: the faster one)")
    add("--cuda-graph", action=BooleanOptionalAction, help="on CUDA, replay the step as one graph")
    add("--compile", action=BooleanOptionalAction, help="compile the whole step (needs a C++ compiler; Triton on CUDA)")
    add("--amp", action="store_true", help="mixed precision (bfloat16)")
    add = parser.group("where to save")
    add("--output-dir", metavar="RUN", type=path, help="new run folder (default: the next free runs/<model>-<dataset>)")
    add("--resume", metavar="RUN", type=run_folder, help="resume this run with its own options")
    add("--auto-resume", action="store_true", help="resume the run in --output-dir, or start it if there is none")
    add("--log-interval", type=number(int, 1), help="steps between two reports")
    add("--save-interval", type=number(float, 0), help="seconds between checkpoints")
    add("--dry-run", action="store_true", help="train for a few steps, validate, and write every file of a run")
    return parser


def start(
    parser: ArgumentParser, recipes: Recipes, variants: Variants | None = None, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, torch.device]:
    """Start a training script: parse its flags, pick the device, seed the random numbers. Raises UserError."""
    args = parse_args(parser, recipes, variants, argv)
    warn_of_other_tasks()
    device = pick_device(args.device, args.amp)
    seed_all(args.seed)
    return args, device


def parse_args(
    parser: ArgumentParser, recipes: Recipes, variants: Variants | None = None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parsed flags. They override the recipe or, with --resume, the run's own options. Raises UserError."""
    known = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = parser.parse_known_args(known)[0]
    if resume := run_to_resume(given):
        options = options_of(resume, parser)
        if given.auto_resume and options["dry_run"] and not given.dry_run:
            raise UserError(f"{resume} is a dry run; delete it, or name another --output-dir")
        parser.set_defaults(**options, resume=resume)
    else:
        parser.set_defaults(**recipes[given.recipe])
        choose_variants(parser, variants or {}, known)
    args = parser.parse_args(argv)
    changed = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    if resume:
        refuse_changes(parser, args, changed)
    refuse_idle(args, changed)
    changed.pop("recipe", None)
    print(f"recipe {args.recipe}", *(f"{name}={value}" for name, value in changed.items()))
    return args


def options_of(run: str, parser: ArgumentParser) -> dict[str, Any]:
    """The options in a run's checkpoint. Raises UserError for another script's run, or an option of a wrong type."""
    options = load_checkpoint(run, warn=False)["options"]
    kind, script = (options.get(name, parser.get_default(name)) for name in ("kind", "script"))
    is_other = script != parser.get_default("script") and (ROOT / script).is_file()  # a renamed script is the same one
    if is_other or kind != parser.get_default("kind"):
        found = f"{run} is a run of {script or 'another script'}, of the kind {kind}"
        raise UserError(f"{found}; resume it with: {command(script, '--resume', Path(run))}")
    for name, value in options.items():
        default = parser.get_default(name)
        if default is not None and kind_of(value) != kind_of(default):
            raise UserError(f"{run} has {name}={value!r}, which {parser.prog} does not take; train again")
    return options


def kind_of(value: Any) -> type:
    """Its type; 60 may stand for 60.0, and a list for a tuple."""
    return {int: float, tuple: list}.get(type(value), type(value))


def run_to_resume(args: argparse.Namespace) -> str | None:
    """The folder of the run to resume, None for a new run. Raises UserError."""
    if args.resume and (args.auto_resume or args.output_dir):
        raise UserError("--resume names the run folder; omit --output-dir and --auto-resume")
    if args.auto_resume and not args.output_dir:
        raise UserError("--auto-resume needs --output-dir, the folder of the run to resume or to start")
    return args.output_dir if args.auto_resume and has_checkpoint(args.output_dir) else args.resume


def choose_variants(parser: ArgumentParser, variants: Variants, argv: Sequence[str]) -> None:
    """Make what the recipe sets for this model, networks and dataset the parser's defaults."""
    args = parser.parse_known_args(argv)[0]  # the recipe may have set the model
    dataset = args.dataset if args.dataset in parser.datasets else "folder"
    for name in (getattr(args, "model", ""), getattr(args, "networks", ""), dataset):
        parser.set_defaults(**variants.get((args.recipe, name), {}))


def refuse_idle(args: argparse.Namespace, changed: dict[str, Any]) -> None:
    """Raise UserError if a flag would have no effect."""
    for name in changed.keys() & NEEDS.keys():
        option, values, remedy = NEEDS[name]
        if changed[name] and getattr(args, option) not in values:
            raise UserError(f"--{name} has no effect without {remedy}; add it, or omit --{name}")


def refuse_changes(parser: ArgumentParser, args: argparse.Namespace, changed: dict[str, Any]) -> None:
    """Raise UserError if a flag would make the resumed run another one."""
    if args.schedule == "cosine" and "epochs" in changed:
        remedy = f"to train longer, start a new run with {shell('--start-from', Path(args.resume))}"
        raise UserError(f"--epochs {args.epochs}: this run's schedule ends with its last epoch; {remedy}")
    for name in changed.keys() - FREE_ON_RESUME:
        value, flag = changed[name], name.replace("_", "-")
        values = value if isinstance(value, list) else [value]
        flag = f"--no-{flag}" if value is False else f"--{flag}" if value is True else shell(f"--{flag}", *values)
        raise UserError(f"{flag}: {args.resume} was trained with {name}={parser.get_default(name)}; omit {flag}")
