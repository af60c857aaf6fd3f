"""A run: its options, its position in the training, and what its checkpoints hold."""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from engine.checkpoint import POSITION, TABLES, load_checkpoint, load_result, require, seal, write_atomically
from engine.device import random_state, set_random_state
from engine.distributed import all_gather, broadcast, rank, sum_gradients, world_size
from engine.errors import UserError
from engine.folder import lock, new_folder, read_config
from engine.meter import Meter, Metrics
from engine.optim import EMA
from engine.provenance import code_fingerprint, environment, warn_if_code_changed
from engine.recorder import tensors_of
from engine.state import VALUES, check_optimizers, restored, saved, weights_of
from engine.table import Table

WHERE = dict(resume=None, output_dir=None, auto_resume=False)  # options that are not saved
# The options that the loop reads, and their defaults. engine/flags.py has a flag for each.
DEFAULTS: dict[str, Any] = dict(
    epochs=1, batch_size=32, seed=0, cuda_graph=True, compile=False, amp=False, log_interval=100, save_interval=60,
    start_from=None, dry_run=False, threads=None, products=None, **WHERE,
)  # fmt: skip


class Run:
    """A run folder, the position in the training, and everything a checkpoint holds. Raises UserError.

    args: all options of the run, which its checkpoints store; those of DEFAULTS may be missing.
    state: name -> what a resumed run needs: networks, optimizers, schedules, an EMA, tensors, generators, plain values.
        The loop adds state["step"], the number of steps made so far, an int64 tensor [] on the device.
    name: the folder is runs/`name` (runs/dry-run-`name` with --dry-run), or the next free runs/`name`-2, ..., unless
        --output-dir or --resume names one.
    """

    def __init__(self, args: argparse.Namespace, state: dict[str, Any], name: str = "run"):
        self.args, self.state = argparse.Namespace(**{**DEFAULTS, **vars(args)}), state
        self.options = plain({name: value for name, value in vars(self.args).items() if name not in WHERE})
        if "step" in state:
            raise UserError('state["step"] is the loop\'s, the number of steps made; use another name')
        if "ema" in state and not isinstance(state["ema"], EMA):
            raise UserError('state["ema"] is what evaluate.py measures, an engine.optim.EMA; use another name')
        self.content()  # raises what the first save would
        check_optimizers(state)
        self.script = self.options.get("script", "")
        self.code = code_fingerprint(self.script)  # an edit that follows is not what is trained
        rules = "script, kind, dataset and data_dir are strings, classes is a list of names, and black at most 0"
        with matching(f"a run with these options could not be read again ({rules})"):
            require({"options": self.options, "code": self.code, "state": {}, "epoch": 0}, set())
        self.epochs = 1 if self.args.dry_run else self.args.epochs
        if self.args.batch_size < world_size():
            raise UserError(f"--batch-size {self.args.batch_size} is less than the {world_size()} processes; raise it")
        self.epoch, self.batch = 0, 0  # done: whole epochs, and batches of the current one
        self.history = Table()  # a row per epoch
        self.curve = Table()  # a row per report
        self.times = Table()  # a row per finished epoch: its seconds
        self.seconds = [0.0]  # of training, per epoch
        self.counted = self.saved = time.monotonic()  # when these seconds were last updated; of the last save
        state["step"] = torch.zeros((), dtype=torch.int64, device=self.device())
        self.updated: dict[Optimizer, bool] = {}  # whether its weights had a gradient at its first step
        self.begun = False  # whether the first step has been made, by the code as it is now
        self.meter = Meter(self.device())  # sums of the current epoch's metrics
        self.fraction = 1.0  # fraction of the batch that this rank computes
        sum_gradients(weights_of(state), lambda: self.fraction)
        if self.args.start_from and not self.args.resume:
            self.start_from(self.args.start_from)
        self.built, self.learning = self.structure(), self.weights_that_learn()
        name = f"dry-run-{name}" if self.args.dry_run else name  # a later command is not to find it
        self.folder = Path(self.args.resume or broadcast(lambda: str(new_folder(self.args.output_dir, name))))
        self.lock = lock(self.folder)
        print(f"run folder: {self.folder}")

    def optimizers(self) -> list[Optimizer]:
        return [item for item in self.state.values() if isinstance(item, Optimizer)]

    def networks(self) -> dict[str, torch.nn.Module]:
        return {name: item for name, item in self.state.items() if isinstance(item, torch.nn.Module)}

    def device(self) -> torch.device:
        tensors = tensors_of([[network.state_dict() for network in self.networks().values()], [*self.state.values()]])
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def buffers(self) -> dict[str, torch.Tensor]:
        """What each rank may have of its own, such as an RBM's chains, by name."""
        tensors = {name: item for name, item in self.state.items() if isinstance(item, torch.Tensor) and name != "step"}
        buffers = [(name, network.named_buffers()) for name, network in self.networks().items()]
        return {**tensors, **{f"{name}.{key}": buffer for name, own in buffers for key, buffer in own}}

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds of `state`; the step number follows from epoch and batch."""
        return {name: saved(name, item) for name, item in self.state.items() if name != "step"}

    def types(self) -> dict[str, str]:
        """The class of each object in `state`; a value may become one of another type."""
        return {name: type(item).__name__ for name, item in self.state.items() if not isinstance(item, VALUES)}

    def weights_that_learn(self) -> dict[str, bool]:
        return {name: weight.requires_grad for weight, name in weights_of(self.state).items()}

    def require_as_built(self, maker: str) -> None:
        """Raise UserError if `maker` has made an object of `state` one that a resumed run would not build."""
        now = self.structure()
        if changed := [name for name in {**self.built, **now} if now.get(name) != self.built.get(name)]:
            remedy = "build it whole before the first step; what is to learn later, freeze with requires_grad_(False)"
            what = f"the structure of {changed[0]}, or a size or type in it"
            raise UserError(f"{maker} changes {what}, which a resumed run would not; {remedy}")

    def structure(self) -> dict[str, Any]:
        """The class of each object in `state`, with a network's shapes and types, and an optimizer's group sizes."""
        optimizers = {name: item for name, item in self.state.items() if isinstance(item, Optimizer)}
        groups = {name: [len(group["params"]) for group in item.param_groups] for name, item in optimizers.items()}
        fixed = lambda key, value: None if key.endswith("_extra_state") else (value.shape, value.dtype)  # noqa: E731
        own = {name: network.state_dict().items() for name, network in self.networks().items()}
        shapes = {name: {key: fixed(key, value) for key, value in items} for name, items in own.items()}
        return {name: (kind, groups.get(name), shapes.get(name)) for name, kind in self.types().items()}

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write everything that resuming needs. Raises UserError instead if a metric or a weight is not finite."""
        meter = self.meter.state_dict()
        self.require_finite({name: total for name, (total, _) in meter["since_report"].items()})
        # On the CPU: another rank would put them on the GPU that they come from.
        own = {name: buffer.cpu() for name, buffer in self.buffers().items()} if world_size() > 1 else {}
        ranks = all_gather({"random": random_state(), "meter": meter, "buffers": own})
        if rank() == 0:
            self.count_seconds()
            state = self.content()
            learning = self.weights_that_learn().items()
            switched = {name: learns for name, learns in learning if learns != self.learning.get(name)}
            self.require_finite({key: largest(value) for key, value in state.items()})
            checkpoint = {
                "options": self.options, "types": self.types(), "code": self.code, "state": state,
                "switched": switched, "ranks": ranks, "seconds": torch.tensor(self.seconds, dtype=torch.float64),
                **{key: getattr(self, key) for key in POSITION}, **{key: getattr(self, key).pack() for key in TABLES},
            }  # fmt: skip
            write_atomically(self.folder / name, seal(checkpoint))
        self.saved = time.monotonic()

    def require_finite(self, values: Metrics) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                at = f"step {self.batch} of epoch {self.epoch + 1}" if self.batch else f"the end of epoch {self.epoch}"
                when, remedy = f"at or shortly before {at}", "start a new run with a lower --lr, or without --amp"
                if self.epoch == self.batch == 0:
                    when, remedy = "before the first step", "make a mask bool, or a buffer with persistent=False"
                raise UserError(f"{name} is not finite {when}; {remedy}")

    def restore(self) -> None:
        """Continue from the checkpoint of --resume, and write config.json. Raises UserError.

        Nothing may draw random numbers between this and the first step.
        """
        ranks: list[dict[str, Any]] = []
        if self.args.resume:
            checkpoint = load_checkpoint(self.folder)
            changed = warn_if_code_changed(checkpoint, self.folder)
            remedy = "undo the edit, or train again"
            with matching(f"{self.folder} does not match the code, which has changed since; {remedy}"):
                self.load_state(checkpoint)
                self.load_position(checkpoint)
                ranks = checkpoint["ranks"]
                if len(ranks) == world_size() > 1:
                    for name, buffer in self.buffers().items():
                        own = restored(buffer, ranks[rank()].get("buffers", {}).get(name, buffer), self.device())
                        if name in self.state:  # a tensor, which may have another size in each process
                            self.state[name] = own
            lazy = any(isinstance(item, torch.amp.GradScaler) for item in self.state.values())  # makes its tensors then
            self.begun = self.epoch + self.batch > 0 and not changed and not lazy
            for weight, name in weights_of(self.state).items():  # after_epoch may have unfrozen a layer
                weight.requires_grad_(checkpoint.get("switched", {}).get(name, weight.requires_grad))
        self.choose_as(checkpoint["options"] if self.args.resume else {})
        if self.args.resume or world_size() > 1:  # each rank draws its own random numbers
            random = ranks[rank()]["random"] if len(ranks) == world_size() else {}
            with matching(f"{self.folder} has no random state that can be restored; train again"):
                set_random_state(random, self.args.seed + 1_000_003 * (1 + rank()) + self.epoch + self.batch)
        if self.epoch > self.epochs:
            done = f"{self.folder} has trained {self.epoch}; omit --epochs, or name more"
            raise UserError(f"--epochs {self.epochs}: {done}")
        self.write_config()
        if self.epoch:
            self.write_metrics()  # a run that was killed may have added a row too many, or half of one
        self.counted = self.saved = time.monotonic()

    def choose_as(self, options: dict[str, Any]) -> None:
        """Compute with the threads and the library of products that the first steps chose, if `options` has them."""
        for name in ("threads", "products"):
            if getattr(self.args, name) is None and world_size() == 1:
                self.options[name] = options.get(name)
                setattr(self.args, name, self.options[name])
        if self.args.threads:
            torch.set_num_threads(self.args.threads)

    def start_from(self, path: str) -> None:
        """Load the networks' weights from another run, of a network with an EMA the EMA's. Raises UserError.

        Tensors that fit are loaded; the others keep their new values, and are named.
        """
        state = load_result(path)["state"]
        for name, network in self.networks().items():
            own = network.state_dict()
            with matching(f"--start-from {path}: its {name} is another network"):
                given = state.get(name, {}).items()
                taken = {key: value for key, value in given if key in own and own[key].shape == value.shape}
                network.load_state_dict(taken, strict=False)
            if not taken:
                remedy = "name a run folder of this script and model"
                raise UserError(f"--start-from {path}: it has no weights that fit the {name}; {remedy}")
            if fresh := own.keys() - taken:
                new = f"newly initialised: {', '.join(sorted(fresh))}"
                print(f"--start-from: loaded {len(taken)} tensors into {name}; {new}")
        for item in self.state.values():
            if isinstance(item, EMA):
                item.model.load_state_dict(item.source.state_dict())

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        values = {kind.__name__ for kind in VALUES}  # which older checkpoints name too
        for name, then in checkpoint["types"].items():
            now = self.types().get(name, "none")
            if now != then and then not in values and not isinstance(self.state.get(name), torch.nn.Module):
                remedy = "undo the edit, or start a new run"
                raise UserError(f"{name}: {self.folder} was trained with {then}, the code now has {now}; {remedy}")
        for name in {**self.state, **checkpoint["state"]}:  # a step may have added a value
            if name != "step":
                self.state[name] = restored(self.state.get(name), checkpoint["state"][name], self.device())

    def load_position(self, checkpoint: dict[str, Any]) -> None:
        """Restore epoch, batch and tables. Fails in many ways if the checkpoint lacks one."""
        for key in POSITION:
            setattr(self, key, int(checkpoint[key]))
        for key in TABLES:
            setattr(self, key, Table(checkpoint[key]))
        self.seconds = torch.as_tensor(checkpoint["seconds"]).tolist()
        for epoch, row in enumerate(self.history, 1):
            row["epoch"] = epoch  # a whole number again
        epochs = {self.epoch, len(self.history), len(self.seconds) - 1}
        if len(epochs) > 1 or not all("epoch" in row for row in self.curve):
            raise ValueError("its tables have other epochs")
        self.meter.load([part["meter"] for part in checkpoint["ranks"]])

    def best_epoch(self, score: str) -> int:
        """The first epoch with the highest `score`, a metric. Raises UserError if no epoch has it."""
        rows = [row for row in self.history if score in row]
        if not rows:
            raise UserError(f"no epoch has the metric {score}, which chooses the best one; validate() must return it")
        return int(max(rows, key=lambda row: row[score])["epoch"])

    def count_seconds(self) -> None:
        """Add the time since the last call to the current epoch's seconds, which a resumed run continues."""
        now = time.monotonic()
        self.seconds[-1] += now - self.counted
        self.counted = now

    def write_metrics(self) -> None:
        """metrics.csv and seconds.csv, a row per epoch, and curve.csv, a row per report."""
        for i in range(len(self.times), self.epoch):
            self.times.append({"epoch": i + 1, "seconds": round(self.seconds[i], 2)})
        tables = {"metrics.csv": self.history, "curve.csv": self.curve, "seconds.csv": self.times}
        for name, table in tables.items() if rank() == 0 else ():
            table.write(self.folder / name)

    def write_config(self) -> None:
        """config.json: the options, and what is needed to trace a result to its code and machine."""
        config = {"options": self.options, "types": self.types(), "device": str(self.device()), **environment()}
        before = read_config(self.folder).get("commit")
        if self.args.resume and before and config["commit"]:  # every commit that trained this run
            known = config["commit"] in before.split(", then ")
            config["commit"] = before if known else f"{before}, then {config['commit']}"
        write_atomically(self.folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options as config.json and checkpoints hold them: a tuple becomes a list. Raises UserError."""
    try:
        return json.loads(json.dumps(options))
    except (TypeError, ValueError) as error:
        raise UserError(f"the options of a run must be numbers, strings, lists and dicts of them: {error}") from error


@contextmanager
def matching(what: str) -> Iterator[None]:
    """Within this, any error becomes a UserError: loading what does not match fails in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def largest(state: Any) -> float:
    """The largest magnitude in nested dicts and lists of tensors; NaN if any of them is."""
    tensors = [leaf for leaf in tensors_of(state) if leaf.is_floating_point() and leaf.numel()]
    return torch.nn.utils.get_total_norm(tensors, math.inf).item() if tensors else 0.0
