"""Optimizers by name, learning rate schedules, and the EMA of the weights."""

import copy
import math
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from engine.errors import UserError


def build_optimizer(args: Namespace, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that --optimizer names, fused: one pass over the weights instead of many."""
    if args.optimizer == "sgd":
        decay = args.weight_decay
        optimizer = torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=decay, fused=True)
        for group in optimizer.param_groups if args.momentum else ():
            for weight in group["params"]:  # the fused update needs one for each weight, frozen or not
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return optimizer
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, args.lr, betas=args.betas, eps=args.eps, weight_decay=args.weight_decay, fused=True)


def build_schedule(
    args: Namespace, optimizer: Optimizer, epoch_length: int, decay: float = 1.000004, final_momentum: float = 0.7
) -> LRScheduler | None:
    """The schedule that --schedule names, None for a constant learning rate. Raises UserError.

    epoch_length: steps per epoch. decay, final_momentum: of MaxoutSchedule.
    """
    if args.schedule == "maxout" and args.optimizer != "sgd":
        raise UserError("--schedule maxout sets SGD's momentum; add --optimizer sgd")
    if args.schedule == "maxout":
        return MaxoutSchedule(optimizer, decay, epoch_length, final_momentum)
    steps = args.epochs * epoch_length
    warmup = steps // 10

    def cosine(step: int) -> float:  # linear warm-up over the first tenth, then half a cosine down to 0
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup) / (steps - warmup)))

    return LambdaLR(optimizer, cosine) if args.schedule == "cosine" else None


def schedules(state: dict[str, Any], per_epoch: bool) -> dict[str, LRScheduler]:
    """The schedules in `state` that the loop advances after each step, or those that it advances after each epoch.

    per_epoch: those whose name begins with `epoch_`, and ReduceLROnPlateau.
    """
    named = {name: item for name, item in state.items() if isinstance(item, LRScheduler)}
    of_epochs = {name for name in named if name.startswith("epoch_") or isinstance(named[name], ReduceLROnPlateau)}
    return {name: item for name, item in named.items() if (name in of_epochs) == per_epoch}


def step_schedules(state: dict[str, Any], row: dict[str, float], score: str | None) -> None:
    """Advance schedules that count epochs. ReduceLROnPlateau gets `score` with mode="max", else val_loss or loss."""
    for name, schedule in schedules(state, per_epoch=True).items():
        if not isinstance(schedule, ReduceLROnPlateau):
            schedule.step()
            continue
        metric = score if schedule.mode == "max" else "val_loss" if "val_loss" in row else "loss"
        if metric is None:
            raise UserError(f'{name} has mode="max"; name its metric with train(..., score="val_accuracy")')
        if metric not in row:
            remedy = "return it from train_step or validate, which may need --val-size N"
            raise UserError(f"{name} needs the metric {metric}; {remedy}")
        schedule.step(row[metric])


def check_schedules(state: dict[str, Any], epochs: int, epoch_length: int) -> None:
    """Warn about a schedule that is advanced after each step and whose own numbers look like epochs.

    Raises UserError if a OneCycleLR, which cannot go past its end, is too short.
    """
    steps = epochs * epoch_length
    for name, schedule in schedules(state, per_epoch=False).items():
        advice = f'if it should count epochs, put it into `state` as "epoch_{name}"'
        if isinstance(schedule, OneCycleLR) and schedule.total_steps < steps:
            remedy = f"give it total_steps={steps}; {advice}; to train a run longer, start a new one with --start-from"
            raise UserError(f"{name} ends after {schedule.total_steps} of {steps} steps; {remedy}")
        numbers = [getattr(schedule, key, 0) for key in ("T_max", "T_0", "total_iters", "step_size")]
        end = max(*numbers, *getattr(schedule, "milestones", ()))
        if 1 < end <= epochs < steps:
            print(f"warning: {name} is advanced after each step, so its {end} counts steps, of {steps}; {advice}")


class MaxoutSchedule(LRScheduler):
    """The schedule of Goodfellow et al. 2013 and 2014: the learning rate is divided by `decay` after every step, down
    to 1e-6. SGD's momentum rises linearly, once per epoch of `epoch_length` steps, to `final_momentum` in the 250th.
    """

    def __init__(self, optimizer: Optimizer, decay: float, epoch_length: int, final_momentum: float = 0.7):
        self.decay, self.epoch_length, self.final_momentum = decay, epoch_length, final_momentum
        self.momentum = optimizer.param_groups[0]["momentum"]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        epoch = self.last_epoch // self.epoch_length  # last_epoch counts steps
        for group in self.optimizer.param_groups:
            group["momentum"] = self.momentum + min(1, epoch / 249) * (self.final_momentum - self.momentum)
        return [max(1e-6, base / self.decay**self.last_epoch) for base in self.base_lrs]


class EMA:
    """Exponential moving average of a network's weights and of batch norm's statistics, as the network `self.model`.

    average = d * average + (1 - d) * weights, where d rises from 0.1 to `decay` as (1 + updates) / (10 + updates).
    Not torch's AveragedModel, which waits for the device at each update. Raises UserError if `model` cannot be copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        try:
            device = next(model.parameters()).device
            # .to puts a GRU's weights into one piece of memory, which cuDNN asks for
            self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
            for average in self.model.state_dict().values():
                average.isfinite()  # which a layer without a size, such as LazyLinear, does not allow
        except (RuntimeError, ValueError) as error:
            remedy = "omit --ema, give each layer its size, or use torch.nn.utils.parametrizations"
            raise UserError(f"--ema cannot copy the network: {str(error).splitlines()[0]}; {remedy}") from error
        self.decay = decay
        self.updates = torch.zeros((), device=device)
        self.source, averages = model, self.model.state_dict()
        tied = {(own.data_ptr(), own.shape): name for name, own in averages.items()}  # each weight once
        self.averages = {name: averages[name] for name in tied.values() if averages[name].is_floating_point()}
        self.counts = {name: averages[name] for name in tied.values() if name not in self.averages}  # of batch norm

    @torch.no_grad()
    def update(self) -> None:
        keep = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)  # stays on the device
        self.updates += 1
        self.follow(1 - keep)

    def follow(self, share: torch.Tensor) -> None:
        """Move the averages by `share` of the way to the weights, as they are now: a step may have replaced them."""
        own = self.source.state_dict(keep_vars=True)
        weights = [own[name] for name in self.averages]
        torch._foreach_lerp_([*self.averages.values()], weights, [share] * len(weights))
        for name, count in self.counts.items():
            count.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates.copy_(state["updates"])


def training_state(args: Namespace, model: nn.Module, optimizer: Optimizer, epoch_length: int) -> dict[str, Any]:
    """The `state` of training one network: the network, its optimizer, and a schedule and an EMA if asked for."""
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if schedule := build_schedule(args, optimizer, epoch_length):
        state["schedule"] = schedule
    if args.ema is not None:
        state["ema"] = EMA(model, args.ema)
    return state


def adversarial_state(
    args: Namespace, generator: nn.Module, discriminator: nn.Module, epoch_length: int, decay: float
) -> dict[str, Any]:
    """The same for a generator and its discriminator; the EMA is the generator's.

    decay: of --schedule maxout; 1.000004 in the GAN paper's configuration, 1.00004 in Mirza & Osindero, section 4.1.
    """
    state: dict[str, Any] = {"generator": generator, "discriminator": discriminator}
    for letter, network in (("g", generator), ("d", discriminator)):
        state[f"optimizer_{letter}"] = build_optimizer(args, network.parameters())
        if schedule := build_schedule(args, state[f"optimizer_{letter}"], epoch_length, decay):
            state[f"schedule_{letter}"] = schedule
    if args.ema is not None:
        state["ema"] = EMA(generator, args.ema)
    return state
