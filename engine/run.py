"""A run: its options, its position in the training, and what its checkpoints hold."""

import argparse
import csv
import io
import json
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from engine.checkpoint import POSITION, load_checkpoint, load_result, save_checkpoint, write_atomically
from engine.device import random_state, set_random_state
from engine.distributed import all_gather, broadcast, rank, sum_gradients, world_size
from engine.errors import UserError
from engine.folder import lock, new_folder, read_config
from engine.optim import EMA
from engine.provenance import code_fingerprint, environment, warn_if_code_changed
from engine.recorder import portable_state

Metrics = dict[str, float]  # a row of metrics, by name


@dataclass
class LoopOptions:
    """The options that the loop reads. engine/flags.py has a flag for each, with these defaults."""

    epochs: int = 1
    batch_size: int = 32
    seed: int = 0
    cuda_graph: bool = True
    compile: bool = False
    amp: bool = False
    log_interval: int = 100
    save_interval: float = 60
    output_dir: str | None = None
    resume: str | None = None
    start_from: str | None = None
    auto_resume: bool = False
    dry_run: bool = False


class Run:
    """A run folder, the position in the training, and everything a checkpoint holds.

    args: all options of the run, which its checkpoints store. The loop reads those of `LoopOptions`.
    state: name -> object with `state_dict()`: networks, optimizers, schedules, an EMA.
    name: the folder is runs/`name`, or the next free runs/`name`-2, ..., unless --output-dir or --resume names one.
    Raises UserError if that folder holds something else, or another process trains in it.
    """

    def __init__(self, args: argparse.Namespace, state: dict[str, Any], name: str = "run"):
        given = vars(args)
        self.args, self.state = args, state
        self.loop = LoopOptions(**{key.name: given[key.name] for key in fields(LoopOptions) if key.name in given})
        self.script = given.get("script", "")
        self.epochs = 1 if self.loop.dry_run else self.loop.epochs
        if self.loop.batch_size < world_size():
            raise UserError(f"--batch-size {self.loop.batch_size} is less than the {world_size()} processes; raise it")
        self.epoch, self.batch = 0, 0  # done: whole epochs, and batches of the current one
        self.history: list[Metrics] = []  # a row per epoch
        self.curve: list[Metrics] = []  # a row per report
        self.seconds, self.counted = [0.0], time.monotonic()  # of training, per epoch; time of the last update
        self.saved = time.monotonic()
        self.begun = False  # whether this process continues a run whose first step was made by the same code
        self.meter: Any = None  # sums of the current epoch's metrics; utils.train sets it
        self.fraction = 1.0  # fraction of the batch that this rank computes
        for optimizer in self.optimizers():
            optimizer.register_step_pre_hook(lambda optimizer, *_: sum_gradients(optimizer, self.fraction))
        self.folder = Path(self.loop.resume or broadcast(lambda: str(new_folder(self.loop.output_dir, name))))
        self.lock: Any = None
        broadcast(self.take_lock)
        print(f"run folder: {self.folder}", flush=True)

    def take_lock(self) -> None:
        self.lock = lock(self.folder)

    def optimizers(self) -> list[Optimizer]:
        return [item for item in self.state.values() if isinstance(item, Optimizer)]

    def networks(self) -> dict[str, torch.nn.Module]:
        return {name: item for name, item in self.state.items() if isinstance(item, torch.nn.Module)}

    def device(self) -> torch.device:
        tensors = (tensor for network in self.networks().values() for tensor in network.state_dict().values())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def options(self) -> dict[str, Any]:
        where = ("resume", "output_dir", "auto_resume")
        return {name: value for name, value in vars(self.args).items() if name not in where}

    def types(self) -> dict[str, str]:
        return {name: type(item).__name__ for name, item in self.state.items()}

    def save_due(self) -> bool:
        return time.monotonic() - self.saved >= self.loop.save_interval

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write everything that resuming needs. Raises UserError instead if a metric or a weight is not finite."""
        meter = self.meter.state_dict()
        self.require_finite({name: total for name, (total, _) in meter["since_report"].items()})
        ranks = all_gather({"random": random_state(), "meter": meter})
        if rank() == 0:
            self.count_seconds()
            state = {key: state_of(item) for key, item in self.state.items()}
            self.require_finite({key: largest(value) for key, value in state.items()})
            position = {key: getattr(self, key) for key in POSITION}
            checkpoint = {
                "options": self.options(), "types": self.types(), "code": code_fingerprint(self.script),
                "state": state, "ranks": ranks, "seconds": self.seconds, **position,
            }  # fmt: skip
            save_checkpoint(checkpoint, self.folder / name)
        self.saved = time.monotonic()

    def require_finite(self, values: Metrics) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                within = f"step {self.batch} of epoch {self.epoch + 1}"
                place = within if self.batch else f"the end of epoch {self.epoch}"
                remedy = "start a new run with a lower --lr, or without --amp"
                raise UserError(f"{name} is not finite at or shortly before {place}; {remedy}")

    def restore(self) -> None:
        """Continue from the checkpoint of --resume, and write config.json. Raises UserError.

        Nothing may draw random numbers between this and the first step.
        """
        ranks: list[dict[str, Any]] = []
        if self.loop.resume:
            checkpoint = load_checkpoint(self.folder)
            changed = warn_if_code_changed(checkpoint, self.folder)
            self.load_state(checkpoint)
            for key in POSITION:
                setattr(self, key, checkpoint[key])
            self.begun = self.epoch + self.batch > 0 and not changed
            ranks, self.seconds = checkpoint["ranks"], checkpoint["seconds"]
            self.write_metrics()
        elif self.loop.start_from:
            self.start_from(self.loop.start_from)
        self.meter.load([part["meter"] for part in ranks])
        if self.loop.resume or world_size() > 1:  # each rank draws its own random numbers
            random = ranks[rank()]["random"] if len(ranks) == world_size() else {}
            set_random_state(random, self.loop.seed + 1_000_003 * (1 + rank()) + self.epoch + self.batch)
        self.write_config()
        self.counted = self.saved = time.monotonic()

    def start_from(self, path: str) -> None:
        """Load the networks' weights from another run: of the network that has an EMA, the EMA. Raises UserError."""
        state = load_result(path)["state"]
        main = "model" if "model" in self.state else "generator"
        networks = self.networks()
        if isinstance(self.state.get("ema"), EMA):
            networks["ema"], state["ema"] = self.state["ema"].model, state.get(main)
        for name, network in networks.items():
            if state.get(name) is None:
                remedy = "name a run folder of this script"
                raise UserError(f"--start-from {path}: it has no weights of the {name}; {remedy}")
            try:
                network.load_state_dict(state[name])
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise UserError(f"--start-from {path}: its {name} is another network: {reason}") from error

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        for name, then in checkpoint["types"].items():
            now = self.types().get(name, "gone")
            if now != then and not isinstance(self.state.get(name), torch.nn.Module):
                remedy = "undo the edit, or start a new run"
                raise UserError(f"{name}: {self.folder} was trained with {then}, the code now has {now}; {remedy}")
        try:
            for name, item in self.state.items():
                item.load_state_dict(checkpoint["state"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.folder} does not match the code, which has changed since: {reason}") from error

    def end_epoch(self, row: Metrics) -> Metrics:
        """Close the current epoch: `row`, its metrics, becomes a row of the history, which is returned."""
        self.count_seconds()
        self.seconds.append(0.0)
        self.epoch, self.batch = self.epoch + 1, 0
        self.require_finite(row)
        self.history.append({"epoch": self.epoch, **row})
        return self.history[-1]

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
        """metrics.csv: a row per epoch; curve.csv: a row per report; seconds.csv: the time that each epoch took."""
        seconds = [{"epoch": i + 1, "seconds": f"{self.seconds[i]:.2f}"} for i in range(self.epoch)]
        tables: dict[str, list] = {"metrics.csv": self.history, "curve.csv": self.curve, "seconds.csv": seconds}
        for name, rows in tables.items() if self.history else ():
            text = io.StringIO()
            columns = dict.fromkeys(column for row in rows for column in row)  # a metric may begin or end later
            writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(self.folder / name, text.getvalue().encode())

    def write_config(self) -> None:
        """config.json: the options, and what is needed to trace a result to its code and machine."""
        config = {"options": self.options(), "types": self.types(), "device": str(self.device()), **environment()}
        before = read_config(self.folder).get("commit")
        if self.loop.resume and before and config["commit"]:  # every commit that trained this run
            known = config["commit"] in before.split(", then ")
            config["commit"] = before if known else f"{before}, then {config['commit']}"
        write_atomically(self.folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def state_of(item: Any) -> dict[str, Any]:
    return portable_state(item) if isinstance(item, Optimizer) else item.state_dict()


def largest(state: Any) -> float:
    """The largest magnitude in nested dicts and lists of tensors; NaN if any of them is."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return torch.nn.utils.get_total_norm(tensors, math.inf).item() if tensors else 0.0
