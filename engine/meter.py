"""Means of the metrics."""

from collections.abc import Callable
from typing import Any, SupportsFloat

import torch

from engine.distributed import all_gather, rank, world_size
from engine.errors import UserError

Metrics = dict[str, float]  # a row of metrics, by name
Totals = dict[str, tuple[float, float]]  # metric -> its sum over images, and their number


class Meter:
    """Means of metrics. The sums stay on the device until `report`, because reading them waits for the device.

    Each metric is averaged over the images it was returned for, so an eager step may omit it now and then.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}  # since the last report, on this rank
        self.counts: dict[str, torch.Tensor] = {}  # of images
        self.epoch: Totals = {}  # since the epoch began, up to the last report, over all ranks

    def add(self, metrics: dict[str, torch.Tensor | float], images: int) -> None:
        """Add metrics, each the mean over `images` images. Part of the captured step. Raises UserError."""
        check_metrics("train_step", metrics)
        for name, value in metrics.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else float(value)
            if name not in self.sums:  # later steps add to these very tensors, as a graph must
                self.sums[name], self.counts[name] = (torch.zeros((), device=self.device) for _ in range(2))
            self.sums[name].add_(value, alpha=images)
            self.counts[name].add_(images)

    def report(self) -> Metrics:
        """Return the means over all ranks since the last report, and add these images to the epoch's."""
        totals = add_up(all_gather(self.totals()))
        self.epoch = add_up([self.epoch, totals])
        for value in (*self.sums.values(), *self.counts.values()):
            value.zero_()
        return means_of(totals)

    def epoch_means(self) -> Metrics:
        """Return the means over the epoch, up to the last report, and start a new one."""
        totals, self.epoch = self.epoch, {}
        return means_of(totals)

    def totals(self) -> Totals:
        """The sums since the last report, on this rank."""
        values = torch.stack([*self.sums.values(), *self.counts.values()]).tolist() if self.sums else []
        return dict(zip(self.sums, zip(values, values[len(self.sums) :])))

    def state_dict(self) -> dict[str, Totals]:
        return {"since_report": self.totals(), "epoch": self.epoch}

    def load(self, ranks: list[dict[str, Totals]]) -> None:
        """Continue from this rank's state. If the number of ranks has changed, rank 0 continues from all of them."""
        self.epoch = ranks[0]["epoch"]
        since = [state["since_report"] for state in ranks]
        if len(ranks) != world_size():
            since = [add_up(since), *[{}] * (world_size() - 1)]
        for name, pair in since[rank()].items():
            self.sums[name], self.counts[name] = (torch.tensor(value, device=self.device) for value in pair)


def validated(validate: Callable[[], Any]) -> Metrics:
    """What `validate` returns, as numbers. Raises UserError unless these are metrics named val_..."""
    metrics = validate()
    check_metrics("validate", metrics)
    return {name: float(value) for name, value in metrics.items()}


def check_metrics(function: str, metrics: Any) -> None:
    """Raise UserError unless what `function` returned is a dict of scalars whose names only it uses."""
    if not isinstance(metrics, dict):
        what = "nothing" if metrics is None else f"a {type(metrics).__name__}"
        raise UserError(f'{function} returns {what}; return a dict of metrics, such as {{"loss": loss.detach()}}')
    for name, value in metrics.items():
        check_name(function, name)
        if tuple(getattr(value, "shape", ())):
            raise UserError(f"{function} returns {name} with shape {list(value.shape)}; return its mean")
        if not isinstance(value, SupportsFloat):
            raise UserError(f"{function} returns {name} as a {type(value).__name__}; return a number")


def check_name(function: str, name: Any) -> None:
    rule = "begin it with val_" if function == "validate" else "val_... is for validate, epoch for the loop"
    plain = isinstance(name, str) and name != "epoch" and "$" not in name
    if not plain or name.startswith("val_") != (function == "validate"):
        raise UserError(f"{function} returns a metric named {name!r}; use another name, without $: {rule}")


def add_up(parts: list[Totals]) -> Totals:
    totals: Totals = {}
    for part in parts:
        for name, (value, count) in part.items():
            before, images = totals.get(name, (0.0, 0.0))
            totals[name] = (before + value, images + count)
    return totals


def means_of(totals: Totals) -> Metrics:
    return {name: value / count for name, (value, count) in totals.items() if count}
