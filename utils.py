"""The one training loop and what it needs: flags, device, run folder, checkpoint, progress, curves.

A script says what one optimisation step is; `train` decides how it is run. It knows no model, no data set, no loss.
"""

import argparse
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import platform
import signal
import struct
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm


class UserError(Exception):
    """A failure that the user can mend; the message is one line that names the thing and the remedy."""


TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # this is one of several processes that train together
RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))  # how often torchrun may start them all anew


class Stopped(Exception):
    """SIGINT or SIGTERM ended the training after a whole step; the run has been saved. Arguments: signal, message."""


def run_script(main):
    """Call `main()`; turn what a user can meet into one line and exit status 1. Bugs keep their traceback."""
    if TORCHRUN and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks for all)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
        leave_processes()
    except Stopped as stopped:
        number, message = stopped.args
        if rank() == 0:
            print(message, file=sys.stderr)
        leave_processes()
        sys.exit(128 + number)
    except KeyboardInterrupt as error:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
    except (UserError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            fail("another process of this job has ended; what it printed says why")
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            fail(f"--compile failed ({str(error).splitlines()[0]}); leave it out, or install what it needs")
        # CUDA and MPS, the CPU on Windows, the CPU elsewhere
        signs = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        fail("out of memory; start a new run with a smaller --batch-size")


def interrupt(number, _):
    """A signal handler: what Ctrl-C does, for any signal, so that nothing half-done is left behind."""
    raise KeyboardInterrupt(number)


def fail(reason):
    sys.exit(f"{Path(sys.argv[0]).name}: error: {reason}")


# Flags ----------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse with every default in the help, and usage errors on one line."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind, low, high=math.inf):
    """An argparse type: a `kind` from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {'a whole' if kind is int else 'a'} number {bounds}, not {text}")
        return value

    return parse


def shared_args_parser(script, description, recipes, datasets):
    """The flags that every training script has, spelled the same everywhere. script: its file name."""
    parser = ArgumentParser(prog=script, description=description)
    parser.set_defaults(script=script)
    add = parser.add_argument
    add("--recipe", choices=list(recipes), default="lecture", help="named set of defaults")
    add("--dataset", choices=datasets, default="mnist", help="what to train on")
    add("--data-dir", default="data", help="folder of the data sets; what is missing is downloaded")
    add("--epochs", type=number(int, 1), default=1, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 2**31), default=32, help="images per step")
    add("--lr", type=number(float, 0), default=2e-4, help="learning rate")
    add("--optimizer", choices=["sgd", "adam", "adamw"], default="adam", help="update rule")
    add("--betas", type=number(float, 0, 0.999999), nargs=2, default=[0.9, 0.999], help="Adam's decay rates")
    add("--momentum", type=number(float, 0, 1), default=0.0, help="SGD's momentum")
    add("--weight-decay", type=number(float, 0), default=0.0, help="pull of the weights towards 0")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order and noise")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to train")
    add("--cuda-graph", action=argparse.BooleanOptionalAction, default=True, help="replay the step as one CUDA graph")
    add(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the networks (needs a C++ compiler, or Triton on CUDA)",
    )  # fmt: skip
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="mixed precision (bfloat16)")
    add("--val-size", type=number(int, 0), default=5000, help="last training images held out for validation")
    add("--log-interval", type=number(int, 1), default=100, help="steps between two progress reports")
    add("--save-interval", type=number(float, 0), default=60, help="seconds between checkpoints within an epoch")
    add("--output-dir", metavar="RUN", help="new run folder (None: the next free runs/<model>-<dataset>)")
    add("--resume", metavar="RUN", help="go on with this run, with its own options")
    add("--dry-run", action="store_true", help="two steps and one evaluation, everything written")
    return parser


def adversarial_args_parser(*args):
    """The flags that the training scripts of generators share; the arguments of `shared_args_parser`."""
    parser = shared_args_parser(*args)
    add = parser.add_argument
    add("--generator-loss", choices=["non-saturating", "saturating"], default="non-saturating", help="what G minimises")
    add("--noise", choices=["unit", "centred"], default="unit", help="z uniform on [0, 1), or with mean 0, variance 1")
    add("--init", choices=["torch", "he", "paper"], default="torch", help="first weights")
    add("--r1", type=number(float, 0), default=0.0, help="weight of the penalty on D's gradient at real images")
    add("--simultaneous", action=argparse.BooleanOptionalAction, default=False, help="update G before D changes")
    add("--schedule", choices=["constant", "maxout"], default="constant", help="learning rate over time")
    add("--average", type=number(float, 0, 1), help="decay per step of G's averaged weights, which draw the samples")
    return parser


# What may differ when a run goes on; everything else would make it another run.
FREE_ON_RESUME = {"resume", "data_dir", "device", "cuda_graph", "compile", "epochs", "log_interval", "save_interval"}


def parse_args(parser, recipes, variants=None, argv=None):
    """Parsed flags.

    recipes: name -> defaults. variants: (recipe, model, networks or data set) -> what the recipe sets differently then.
    A flag given explicitly wins over the recipe; with --resume the run's own options take the recipe's place.
    Raises UserError where a flag contradicts the resumed run.
    """
    argv = sys.argv[1:] if argv is None else argv
    without_help = [word for word in argv if word not in ("-h", "--help")]
    first, _ = parser.parse_known_args(without_help)
    if RESTARTS and not (first.output_dir or first.resume):
        raise UserError("torchrun --max-restarts needs --output-dir, by which a restart finds the run")
    if RESTARTS and first.output_dir and os.environ["TORCHELASTIC_RUN_ID"] == "none":
        reason = "torchrun --max-restarts needs --standalone, or a --rdzv-id by which a restart knows its own run"
        raise UserError(reason)
    if first.output_dir and is_of_this_job(Path(first.output_dir)) and has_checkpoint(Path(first.output_dir)):
        argv = [*argv, "--resume", first.output_dir]
        parser.set_defaults(output_dir=first.output_dir)
        first.resume = first.output_dir
    if first.resume:
        if not Path(first.resume).is_dir():
            raise UserError(f"--resume {first.resume}: there is no such run folder")
        defaults = load_checkpoint(first.resume, warn=False)["options"]
        if defaults["script"] != parser.prog:
            raise UserError(f"{first.resume} is a run of {defaults['script']}, not of {parser.prog}")
        parser.set_defaults(**defaults)
    else:
        defaults = dict(recipes[first.recipe])
        parser.set_defaults(**defaults)
        first, _ = parser.parse_known_args(without_help)
        for name in (getattr(first, "model", None), getattr(first, "networks", None), first.dataset):
            defaults.update((variants or {}).get((first.recipe, name), {}))
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.resume:
        if args.schedule == "cosine" and "epochs" in changed:
            reason = "the learning rate of this run has its end fixed; leave it out"
            raise UserError(f"--epochs {args.epochs}: {reason}")
        for name in set(changed) - FREE_ON_RESUME:
            value, flag = getattr(args, name), name.replace("_", "-")
            flag = f"--no-{flag}" if value is False else f"--{flag}" if value is True else f"--{flag} {value}"
            raise UserError(f"{flag}: {first.resume} was trained with {name}={defaults.get(name)}; leave {flag} out")
    if args.compile and getattr(args, "r1", 0):
        raise UserError("--compile cannot differentiate twice, as --r1 does; leave one out, or --r1 0")
    if args.schedule == "maxout" and args.optimizer != "sgd":
        raise UserError("--schedule maxout needs --optimizer sgd, whose momentum it sets")
    print_options(args, changed)
    return args


def print_options(args, changed):
    marked = set(changed) - {"recipe", "resume", "output_dir"}  # these say where it comes from and goes to
    shown = [f"{name}={value}{'*' * (name in marked)}" for name, value in vars(args).items() if value is not None]
    print(" ".join(shown) + ("  (* set by a flag)" if marked else ""))


# Device ---------------------------------------------------------------------------------------------------------------


def pick_device(name):
    """The torch.device for --device; `auto` takes CUDA, then MPS, then the CPU. Raises UserError.

    A process that torchrun started takes the GPU of its own number, and joins the other processes.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine or this torch has no {name} device; use --device auto")
    torch.set_flush_denormal(True)  # denormal numbers, which long trainings breed, slow a CPU down
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # older numpy remarks on it
    if sys.platform == "linux":
        keep_freed_memory()
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # products of float32 matrices in TF32, as convolutions are anyway
    device = torch.device(name)
    return join_processes(device) if TORCHRUN else device


def keep_freed_memory():
    """Stop the C library from handing memory back after each step only to fault it in again at the next."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # a C library other than glibc
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 512 << 20)


def random_generators():
    """The modules whose random generator a step may draw from, by name."""
    modules = {"cpu": torch}
    if torch.cuda.is_initialized():  # not where one trains on the CPU because the GPU is taken
        modules["cuda"] = torch.cuda
    if torch.backends.mps.is_available():
        modules["mps"] = torch.mps
    return modules


def build_optimizer(args, parameters):
    """The optimiser that --optimizer names, in its fused form: one pass over the weights instead of many."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, args.lr, betas=args.betas, eps=1e-8, weight_decay=args.weight_decay, fused=True)


# Several processes ----------------------------------------------------------------------------------------------------

# torchrun starts them, with the same options. Each computes its part of every batch; before each update their gradients
# are added up, so that all have the same weights; the first one (rank 0) speaks and writes.


def join_processes(device):
    """Join the processes that torchrun started; returns this one's device. Raises UserError."""
    number = int(os.environ["LOCAL_RANK"])  # on this machine
    if device.type == "mps":
        raise UserError("--device mps: there is one such device; start the script without torchrun")
    if device.type == "cuda":
        if number >= torch.cuda.device_count():
            raise UserError(f"--device cuda: {torch.cuda.device_count()} of them; lower --nproc-per-node to that")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":  # it outlives a restart, with addresses of the dead in it
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return device


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(make):
    """What `make()` returns in the process of rank 0, given to all; the others do not call it."""
    made = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(made, device=torch.device("cpu"))
    return made[0]


def from_all(value):
    """The `value` of each process, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def part_of(batch):
    """This process's share of the rows of a batch, a tuple of tensors with as many rows each."""
    return tuple(tensor.tensor_split(world_size())[rank()] for tensor in batch)


def agree(signals, due):
    """What holds for all processes: the signal that reached any of them, or 0; whether any finds a checkpoint due."""
    wishes = [signals[0] if signals else 0, due]
    if world_size() > 1:
        everyone = torch.tensor(wishes)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)
        wishes = everyone.tolist()
    return wishes


# Checkpoints ----------------------------------------------------------------------------------------------------------

# A checkpoint is what torch.save writes, a zip archive, with the SHA-256 of the rest as the archive's comment:
# torch.load reads it as it is, and load_checkpoint notices every changed byte.
DIGEST_SIZE = hashlib.sha256().digest_size


def seal(archive):
    """The zip `archive` (bytes, no comment) with its SHA-256 as comment."""
    body = archive[:-2] + struct.pack("<H", DIGEST_SIZE)
    return body + hashlib.sha256(body).digest()


def is_sealed(content):
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def write_whole(path, content):
    """Write the bytes to `path` wholly or not at all, and onto the disk before the name points at them.

    A sound checkpoint.pt becomes previous.pt first. Of several processes, the first one writes. Raises UserError.
    """
    if rank() > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "checkpoint.pt" and path.exists() and is_sealed(path.read_bytes()):
            os.replace(path, path.with_name("previous.pt"))
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(
                f"{path} could not be written ({error.strerror}); free space there or allow writing; "
                "what was saved before is as it was"
            ) from error
        raise


def load_checkpoint(path, warn=True):
    """Read a run folder's checkpoint.pt (previous.pt where that is damaged, which is said), or one checkpoint file.

    Reads tensors and plain values only: nothing in the file is executed. Raises UserError.
    """
    path = Path(path)
    if not path.is_dir():
        return read_checkpoint(path)
    try:
        return read_checkpoint(path / "checkpoint.pt")
    except UserError as error:
        if not (path / "previous.pt").is_file():
            raise
        if warn:
            print(f"warning: {error}; using {path / 'previous.pt'}", file=sys.stderr)
        return read_checkpoint(path / "previous.pt")


def read_checkpoint(path):
    if not path.is_file():
        raise UserError(f"{path} does not exist: this is no run, or it ended before anything was saved; start it anew")
    content = path.read_bytes()
    if not is_sealed(content):
        raise UserError(f"{path} is damaged or no checkpoint of this repository (its SHA-256 does not fit)")
    foreign = UserError(f"{path} is no checkpoint of this repository: it holds other things, or more than plain values")
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, where it meets no archive of tensors
        raise foreign from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"options", "state", "processes", *Run.POSITION}:
        raise foreign
    return checkpoint


# Run folder -----------------------------------------------------------------------------------------------------------


class Run:
    """A run folder, the position in the training, and everything that a checkpoint holds.

    state: name -> object with `state_dict()` (networks, optimisers, schedules, averaged weights).
    """

    POSITION = ("epoch", "batch", "count", "reported", "history", "curve")

    def __init__(self, args, state, name="run"):
        self.args, self.state = args, state
        self.epoch, self.batch = 0, 0  # done so far: whole epochs, and batches of the epoch begun
        self.count, self.sums = 0, {}  # images of the epoch begun, and this process's metric sums, on the device
        self.reported = {"count": 0}  # count and sums at the last report
        self.history, self.curve = [], []  # a row of means per epoch; a row per report
        self.random = {}  # state of the random generators that the training goes on with
        self.share = 1.0  # of the batch, that is this process's part
        if args.batch_size < world_size():
            raise UserError(f"--batch-size {args.batch_size}: less than the {world_size()} processes; raise it to that")
        for optimizer in self.optimizers():
            optimizer.register_step_pre_hook(self.add_up_gradients)
        self.folder = Path(args.resume or from_first(lambda: str(new_folder(args.output_dir, name))))
        self.lock = None
        from_first(self.take_lock)
        if args.resume:  # read once more: whoever had the lock before may have saved since
            self.restore(load_checkpoint(self.folder))
            self.write_metrics()
        if rank() == 0:
            self.write_config()
        print(f"run folder: {self.folder}", flush=True)

    def take_lock(self):
        self.lock = lock(self.folder)

    def write_config(self):
        config = {"options": self.options(), "device": self.device(), **environment()}
        before = read_config(self.folder).get("commit")
        if self.args.resume and before and config["commit"]:
            config["commit"] = before if config["commit"] in before else f"{before}, then {config['commit']}"
        write_whole(self.folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def device(self):
        networks = [item for item in self.state.values() if isinstance(item, torch.nn.Module)]
        return next((str(weight.device) for network in networks for weight in network.parameters()), None)

    def options(self):
        return {name: value for name, value in vars(self.args).items() if name not in ("resume", "output_dir")}

    def optimizers(self):
        return [item for item in self.state.values() if isinstance(item, torch.optim.Optimizer)]

    def add_up_gradients(self, optimizer, *_):
        """Before an update by several processes: the gradients of the whole batch's mean loss."""
        if world_size() > 1:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            total = torch.cat([gradient.flatten() for gradient in gradients]) * self.share
            dist.all_reduce(total)
            parts = total.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts):  # in place: a fused update needs its weights' memory layout
                gradient.copy_(part.view_as(gradient))

    def save(self, name="checkpoint.pt"):
        """Write the whole state. Raises UserError instead where a metric or a weight is not finite."""
        random = {name: module.get_rng_state() for name, module in random_generators().items()}
        processes = from_all({"random": random, "sums": self.read_sums()})
        if rank() > 0:
            return
        state = {key: item.state_dict() for key, item in self.state.items()}
        for key, value in state.items():
            if not all(tensor.isfinite().all() for tensor in tensors(value)):
                raise self.not_finite(key)
        checkpoint = {
            "options": self.options(),
            "state": state,
            "processes": processes,
            **{name: getattr(self, name) for name in self.POSITION},
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(self.folder / name, seal(buffer.getvalue()))

    def restore(self, checkpoint):
        try:
            for name, item in self.state.items():
                item.load_state_dict(checkpoint["state"][name])
            for optimizer in self.optimizers():
                for group in optimizer.param_groups:
                    group["lr"] = float(group["lr"])  # a tensor, where a CUDA graph needed one
            processes = checkpoint["processes"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.folder} does not fit the code, which has changed since: {reason}") from error
        if len(processes) == world_size():
            self.random = processes[rank()]["random"]
            sums = processes[rank()]["sums"]
        else:  # their number has changed: the first one goes on with the sums of all
            everyone = [process["sums"] for process in processes if rank() == 0]
            sums = {name: sum(sums[name] for sums in everyone) for name in processes[0]["sums"]}
        self.sums = {name: torch.tensor(value, dtype=torch.float32) for name, value in sums.items()}
        for name in self.POSITION:
            setattr(self, name, checkpoint[name])

    def restore_random(self):
        """Go on with the random numbers where the checkpoint was; several processes draw different ones."""
        if not self.random and (world_size() > 1 or self.epoch + self.batch > 0):
            torch.manual_seed(self.args.seed + 1_000_003 * (1 + rank()) + self.epoch + self.batch)
        for name, module in random_generators().items():
            if name in self.random:
                module.set_rng_state(self.random[name])

    def add(self, metrics, count):
        """Add a step's metrics, means over `count` images, to the epoch's sums, in place and without reading them."""
        for name, value in metrics.items():
            value = value.detach().float()  # a sum in bfloat16 would stop growing
            total = self.sums[name].to(value.device) if name in self.sums else torch.zeros_like(value)
            self.sums[name] = total.add_(value, alpha=count)

    def read_sums(self):
        """The epoch's sums as floats: with `save`, what waits for the device. Raises UserError on NaN or infinity."""
        sums = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist())) if self.sums else {}
        for name, value in sums.items():
            if not math.isfinite(value):
                raise self.not_finite(name)
        return sums

    def not_finite(self, name):
        place = f"step {self.batch} of epoch {self.epoch + 1}" if self.batch else f"the end of epoch {self.epoch}"
        remedy = "start a new run with a lower --lr, or without --amp"
        return UserError(f"{name} is not finite at or shortly before {place}; {remedy}")

    def totals(self):
        """Sums over all processes."""
        everyone = from_all(self.read_sums())
        return {name: sum(sums.get(name, 0.0) for sums in everyone) for name in everyone[0]}

    def report(self, epoch_length):
        """Add the means since the last report to the curve, and return them."""
        now = {"count": self.count, **self.totals()}
        count = now["count"] - self.reported["count"]
        if not count:  # a last batch of fewer images than processes, which is left out
            return {}
        means = {name: (now[name] - self.reported.get(name, 0)) / count for name in self.sums}
        self.reported = now
        self.curve.append({"epoch": self.epoch + self.batch / epoch_length, **means})
        return means

    def end_epoch(self, more):
        """Close the epoch begun: its means and the dict `more` become a row of the history, which is returned."""
        means = {name: value / self.count for name, value in self.totals().items()}
        for name, value in more.items():
            if not math.isfinite(value):
                raise self.not_finite(name)
        self.epoch, self.batch = self.epoch + 1, 0
        self.count, self.reported = 0, {"count": 0}
        for total in self.sums.values():
            total.zero_()
        self.history.append({"epoch": self.epoch, **means, **more})
        return self.history[-1]

    def best_epoch(self, score):
        """Number of the first epoch with the highest `score`."""
        return max(self.history, key=lambda row: row[score])["epoch"]

    def write_metrics(self):
        if self.history:
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(self.history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            write_whole(self.folder / "metrics.csv", text.getvalue().encode())


def tensors(value):
    """Every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def new_folder(wanted, name):
    """Make and return the folder `wanted`, or else the next free of runs/`name`, runs/`name`-2, and so on.

    Raises UserError where `wanted` already holds something.
    """
    if wanted:
        folder = Path(wanted)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output-dir {folder} is a file; name a new folder")
        make_folder(folder, exist_ok=True)
        if any(path.name != ".lock" for path in folder.iterdir()) and not is_of_this_job(folder):
            raise UserError(f"--output-dir {folder} is not empty; name a new folder, or go on with --resume {folder}")
        return folder
    for i in itertools.count(1):
        folder = Path("runs") / (name if i == 1 else f"{name}-{i}")
        with suppress(FileExistsError):
            make_folder(folder)
            return folder


def read_config(folder):
    """What config.json holds; nothing, where there is none or it is damaged."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def has_checkpoint(folder):
    """Whether the run in `folder` can be gone on with; best.pt alone, of its first epoch, does not suffice."""
    return any((folder / name).is_file() for name in ("checkpoint.pt", "previous.pt"))


def is_of_this_job(folder):
    """Whether processes of this same torchrun, before it started them anew, have begun the run in `folder`."""
    return RESTARTS > 0 and read_config(folder).get("job") == os.environ["TORCHELASTIC_RUN_ID"]


def make_folder(folder, exist_ok=False):
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        reason = f"{folder} cannot be made ({error.strerror}); allow writing there, or use another folder"
        raise UserError(reason) from error


def lock(folder):
    """Keep other processes from training in `folder`, until the lock is released or this process ends in any way.

    Raises UserError where one trains there already.
    """
    mine = FileLock(folder / ".lock")
    try:
        mine.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{folder} is being trained by another process; wait for it, or stop it first") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    return mine


def environment():
    """Versions, hardware and git commit, so that a figure can be traced."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "status", "--porcelain=v2", "--branch"]
    try:
        lines = subprocess.run([*git, "--", "*.py"], capture_output=True, text=True, check=True).stdout.splitlines()
        changed = any(not line.startswith("#") for line in lines)
        commit = lines[0].removeprefix("# branch.oid ") + "-dirty" * changed
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "commit": commit,  # of every time that the run was gone on with, where it changed
        "job": os.environ.get("TORCHELASTIC_RUN_ID"),
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# The loop -------------------------------------------------------------------------------------------------------------


def train(run, train_step, batches, validate=None, score="val_accuracy", after_epoch=None, enough=None):
    """Run `train_step(images, labels) -> {name: scalar tensor}` over `batches` until the epochs are done.

    batches: has a length, and `epoch(e, start)` yields (images, labels) of epoch `e` from batch `start` on. Where it
    also has `rows(e, start)`, which yields (row numbers,), and `take(rows) -> (images, labels)`, as datasets.Batches
    does, taking the images becomes part of the step.
    validate: () -> {name: float} after each epoch; the epoch with the highest `score` among them is kept as best.pt,
        where there is a `score`.
    after_epoch: called with the epoch's row of metrics before its checkpoint is written.
    enough: stop after an epoch for whose row of metrics `enough(row)` holds.

    Writes checkpoint.pt after each epoch, every --save-interval seconds in between, and on SIGINT or SIGTERM,
    after which it raises Stopped. Raises UserError where a metric is not finite.
    """
    try:
        train_epochs(run, train_step, batches, validate, score, after_epoch, enough)
    finally:
        if run.lock is not None:
            run.lock.release()


def train_epochs(run, train_step, batches, validate, score, after_epoch, enough):
    args = run.args
    epochs = 1 if args.dry_run else args.epochs

    def finished():
        return run.epoch >= epochs or (enough and run.history and enough(run.history[-1]))

    if args.compile:
        compile_networks(run.state)
    step = GraphedStep(run, whole_step(run, train_step, batches))
    run.restore_random()  # as late as this: what the script did since may have drawn random numbers
    if finished():
        print(f"this run is finished at epoch {run.epoch}")
    with caught_signals() as signals:
        while not finished():
            started = time.monotonic()
            train_epoch(run, step, batches, signals)
            row = run.end_epoch(from_first(validate) if validate else {})
            print_row(row, epochs, time.monotonic() - started)
            if after_epoch and rank() == 0:
                after_epoch(row)
            if validate and score and run.best_epoch(score) == run.epoch:
                run.save("best.pt")
            asked, _ = agree(signals, due=True)
            run.save()
            run.write_metrics()
            if asked and not finished():
                stop(run, asked)
    draw_curves(run)


def train_epoch(run, step, batches, signals):
    args = run.args
    schedules = [item for item in run.state.values() if isinstance(item, LRScheduler)]
    steps = min(2, len(batches)) if args.dry_run else len(batches)
    source = batches.rows if hasattr(batches, "take") else batches.epoch
    saved = time.monotonic()
    with tqdm(
        total=steps, initial=run.batch, desc=f"epoch {run.epoch + 1}", leave=False,
        disable=rank() > 0 or not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        for batch in itertools.islice(source(run.epoch, run.batch), steps - run.batch):
            size = len(batch[0])
            if size >= world_size():  # a last batch of fewer images than processes is left out
                part = part_of(batch)
                run.share = len(part[0]) / size
                step(*part)
                run.count += size
            for schedule in schedules:
                schedule.step()
            run.batch += 1
            if run.batch % args.log_interval == 0 or run.batch == steps:
                bar.set_postfix({name: f"{value:.4f}" for name, value in run.report(steps).items()}, refresh=False)
                bar.update(run.batch - bar.n)
            asked, due = agree(signals, time.monotonic() - saved >= args.save_interval)
            if asked or due:
                run.save()
                saved = time.monotonic()
            if asked:
                stop(run, asked)


def compile_networks(state):
    for item in state.values():
        if isinstance(item, torch.nn.Module):
            item.compile()


def whole_step(run, train_step, batches):
    """One step from the row numbers of a batch (from the batch itself, where `batches` has no `take`) to its sums."""
    take = getattr(batches, "take", lambda *batch: batch)

    def step(*batch):
        images, labels = take(*batch)
        # Without the cache: it would serve weights from before an update within the step.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=run.args.amp, cache_enabled=False):
            metrics = train_step(images, labels)
        run.add(metrics, len(images))

    return step


class GraphedStep:
    """`step(*tensors)` as one CUDA graph where that can be had: captured at the fourth call, replayed from then on.

    A replay costs one launch instead of hundreds, and draws new random numbers. The learning rate becomes a tensor, so
    that a schedule reaches it. A short last batch takes the ordinary way; so does everything on other devices, with
    several processes, with --no-cuda-graph, and where a schedule changes more than the learning rate, which is said.
    Raises UserError where the step cannot be captured.
    """

    WARM_UP = 3

    def __init__(self, run, step):
        self.run, self.step = run, step
        self.calls, self.graph, self.inputs, self.settings = 0, None, None, None
        self.wanted = run.args.cuda_graph and world_size() == 1

    def __call__(self, *inputs):
        whole = len(inputs[0]) == self.run.args.batch_size
        if not self.wanted or not whole or inputs[0].device.type != "cuda":
            return self.step(*inputs)
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.make_learning_rates_tensors()
            self.settings = self.baked_in()
        if self.calls == self.WARM_UP:
            self.capture()
        if self.graph is None:
            self.warm_up(inputs)
        else:
            for mine, its in zip(self.inputs, inputs):
                mine.copy_(its)
            self.graph.replay()
        self.calls += 1

    def warm_up(self, inputs):
        """An ordinary step, on a stream of its own, as capturing asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self):
        if self.baked_in() != self.settings:
            self.wanted = False
            print("the step is not replayed as a CUDA graph: the optimiser's settings change from step to step")
            return
        groups = [group for group in self.groups() if "capturable" in group]
        graph = torch.cuda.CUDAGraph()
        try:
            for group in groups:
                group["capturable"] = True
            with torch.cuda.graph(graph):
                self.step(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what the attempt has left behind is not to be gone on with
            reason = str(error).splitlines()[0]
            raise UserError(f"the step cannot be a CUDA graph ({reason}); start again with --no-cuda-graph") from error
        finally:
            for group in groups:
                group["capturable"] = False
        self.graph = graph

    def make_learning_rates_tensors(self):
        for group in self.groups():
            group["lr"] = torch.tensor(float(group["lr"]), device=self.inputs[0].device)

    def baked_in(self):
        """The optimisers' settings that a graph would keep as they are at its capture."""
        changing = {"params", "lr", "initial_lr"}
        return [{name: group[name] for name in group.keys() - changing} for group in self.groups()]

    def groups(self):
        return [group for optimizer in self.run.optimizers() for group in optimizer.param_groups]


@contextmanager
def caught_signals():
    """A list that SIGINT and SIGTERM append to instead of ending the process; the second one ends it at once."""
    caught = []

    def catch(number, frame):
        if caught and not TORCHRUN:  # torchrun passes on what the terminal has already sent
            interrupt(number, frame)
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(run, number):
    draw_curves(run)
    raise Stopped(number, f"stopped and saved; go on with: python {run.args.script} --resume {run.folder}")


def print_row(row, epochs, seconds):
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "epoch")
    print(f"epoch {row['epoch']}/{epochs}  {metrics}  {seconds:.1f} s", flush=True)


def draw_curves(run):
    """Write curves.png: one panel per metric, reports as a line, validation after each epoch as dots."""
    if not run.curve or rank() > 0:
        return
    from matplotlib.figure import Figure  # takes a while to import and is only needed here

    names = [name for name in run.curve[0] if name != "epoch"]
    validated = [name for name in run.history[0] if name.startswith("val_")] if run.history else []
    names += [name for name in validated if name.removeprefix("val_") not in names]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for place, name in enumerate(names):
        axis = figure.add_subplot(rows, columns, place + 1)
        if name in run.curve[0]:
            axis.plot([row["epoch"] for row in run.curve], [row[name] for row in run.curve], label="training", lw=1)
        for key in {name, f"val_{name}"}.intersection(validated):
            epochs = [row["epoch"] for row in run.history]
            axis.plot(epochs, [row[key] for row in run.history], "o-", ms=3, label="validation")
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, run.folder / "curves.png")


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


@contextmanager
def evaluating(model):
    """`model` in eval mode and without gradients; its mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predict(model, batches):
    """Outputs of `model` in eval mode for every image of `batches`, and their labels, in order."""
    with evaluating(model):
        outputs, labels = zip(*[(model(images), labels) for images, labels in batches.epoch(0)])
    return torch.cat(outputs), torch.cat(labels)


def save_grid(images, path, columns):
    """Write images [N, 1, H, W], pixels in [0, 1] shown as they are, row by row in `columns`, as one PNG."""
    from PIL import Image

    n, _, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.zeros(rows * columns, height, width)
    grid[:n] = images[:, 0].float().cpu()
    grid = grid.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    picture = Image.fromarray((grid * 255).round().to(torch.uint8).numpy())
    content = io.BytesIO()
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(content, format="png")
    path.parent.mkdir(exist_ok=True)
    write_whole(path, content.getvalue())


def save_gif(folder, most=40):
    """Write samples.gif from up to `most` of the pictures in samples/, evenly spread and with the last one."""
    from PIL import Image

    paths = sorted((folder / "samples").glob("epoch-*.png"))
    if not paths:
        return
    every = -(-len(paths) // most)
    frames = [Image.open(path) for path in paths[::-every][::-1]]
    content = io.BytesIO()
    frames[0].save(content, format="gif", save_all=True, append_images=frames[1:], duration=200, loop=0)
    write_whole(folder / "samples.gif", content.getvalue())
