"""The training loop. A script defines the training step; the loop runs it.

From a batch to a number on the screen:

    rows         which images: row numbers, shuffled by the seed and the epoch        batches.rows
    take         their pixels and labels, on the device                               batches.take
    train_step   forward pass, backward pass, update; returns metrics                 the script's
    Meter        sums the metrics, on the device                                      below
    report       reads their means every --log-interval steps, for the progress bar   below

An epoch ends when every image has been seen once. Then the network is validated, samples are saved, and a row of
metrics and a checkpoint are written. `--resume RUN` continues with the batch after the last save: everything in
`run.state` (networks, optimizers, schedules, EMA), the random numbers, the metrics and the position are restored.

Edit a train_step as you like: its losses, updates and metrics. The loop advances the schedules and the EMA.
On a GPU, and with --compile, the step is captured: recorded once and replayed without Python, so it must stay on the
device and do the same in every step: no `.item()`, no `if` on a tensor, no Python number that changes.
engine/captured.py runs the step a few times first; it detects and names what cannot be captured. With
`--no-cuda-graph` and without `--compile`, the step runs eagerly.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from engine.captured import capture
from engine.distributed import all_gather, broadcast, rank, shard, sync_flags, world_size
from engine.errors import Stopped, UserError, caught_signals
from engine.optim import EMA
from engine.plots import plot_curves, save_gif, save_grid
from engine.run import Metrics, Run

TrainStep = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor | float]]
Totals = dict[str, tuple[float, int]]  # metric -> its sum over images, and their number
DRY_RUN_STEPS = 8  # enough to capture the step and to replay it


def train(
    run: Run,
    train_step: TrainStep,
    batches: Any,
    validate: Callable[[], Metrics] | None = None,
    score: str | None = None,
    sample: Callable[[], torch.Tensor] | None = None,
    after_epoch: Callable[[Metrics], None] | None = None,
    should_stop: Callable[[Metrics], bool] = lambda row: False,
) -> dict[str, Any]:
    """Run `train_step(images, labels) -> {name: mean over the images}` over `batches` for --epochs epochs.

    batches: has a length; `rows(epoch, start)` yields the row numbers of each batch of `epoch` from number `start` on,
        and `take(rows)` returns their images and labels on the device. datasets.Batches is one.
    validate: returns metrics named val_..., or {}. sample: returns samples [N, 1, H, W] for samples/ and samples.gif.
        after_epoch gets the epoch's row of metrics. All three are called after each epoch, on rank 0.
    score: the metric to maximise; the first epoch with its highest value is saved as best.pt.
    should_stop: gets the last row, on every rank; training ends once it returns True.

    Saves checkpoint.pt before the first step, every --save-interval seconds, after each epoch, and on SIGINT or
    SIGTERM, after which it raises Stopped. Raises UserError if a metric or a weight is not finite. Returns the run
    folder and the metrics of the last epoch.
    """
    epochs = 1 if run.loop.dry_run else run.loop.epochs
    steps = min(len(batches), DRY_RUN_STEPS) if run.loop.dry_run else len(batches)

    def finished() -> bool:
        return run.epoch >= epochs or bool(run.history and should_stop(run.history[-1]))

    run.meter = Meter(run.device())
    run.restore()
    step = make_step(run, train_step, batches)
    schedules = [item for item in run.state.values() if isinstance(item, LRScheduler)]
    if finished():
        print(f"run already finished at epoch {run.epoch}")
    try:
        with caught_signals() as signals:
            if run.epoch == run.batch == 0:
                run.save()
            while not finished():
                for rows in progress(run, batches, steps):
                    step(rows)
                    for schedule in schedules:
                        schedule.step()
                    run.batch += 1
                    if run.batch % run.loop.log_interval == 0 or run.batch == steps:
                        report(run, steps)
                    save(run, signals, due=run.save_due())
                end_epoch(run, validate, score, sample)
                print(f"epoch {run.epoch}/{epochs}  {listed(run.history[-1])}  {run.seconds[-2]:.1f} s", flush=True)
                if after_epoch and rank() == 0:
                    after_epoch(run.history[-1])
                run.write_metrics()
                save(run, [] if finished() else signals, due=True)
        save_plots(run)
        if run.kind:
            print(f"now evaluate it: python evaluate.py {run.folder}")
    finally:
        if run.lock:  # rank 0 holds it
            run.lock.release()
    return {"folder": str(run.folder), **run.history[-1]}


def progress(run: Run, batches: Any, steps: int) -> Iterator[torch.Tensor]:
    """Yield the row numbers of the epoch's remaining batches, of `steps` in all.

    Shows each report in a progress bar or, without a terminal, on a line.
    """
    hidden = rank() > 0 or not sys.stderr.isatty()
    with tqdm(total=steps, initial=run.batch, desc=f"epoch {run.epoch + 1}", leave=False, disable=hidden) as bar:
        for rows in itertools.islice(batches.rows(run.epoch, run.batch), steps - run.batch):
            reports = len(run.curve)
            yield rows
            if len(run.curve) > reports:
                means = {name: value for name, value in run.curve[-1].items() if name != "epoch"}
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()}, refresh=False)
                bar.update(run.batch - bar.n)
                if hidden and run.batch < steps:
                    print(f"epoch {run.epoch + 1} step {run.batch}/{steps}  {listed(means)}", flush=True)


def make_step(run: Run, train_step: TrainStep, batches: Any) -> Callable[[torch.Tensor], None]:
    """Return a function that runs one step, from row numbers to sums of metrics.

    The step is compiled with --compile, and is a CUDA graph on a GPU; otherwise it runs eagerly. Reading the images is
    part of it, unless `batches.on_device` is False.
    """
    device, meter = run.device(), run.meter
    emas = [item for item in run.state.values() if isinstance(item, EMA)]

    def step_on(images: torch.Tensor, labels: torch.Tensor) -> tuple[str, ...]:
        # Without autocast's cache, which would return stale weights after an update within the step.
        with torch.autocast(device.type, torch.bfloat16, enabled=run.loop.amp, cache_enabled=False):
            metrics = train_step(images, labels)
        for ema in emas:
            ema.update()
        return meter.add(metrics, len(images))

    if getattr(batches, "on_device", True):
        step = capture(lambda rows: step_on(*batches.take(rows)), run)
    else:
        captured = capture(step_on, run)
        step = lambda rows: captured(*batches.take(rows))  # noqa: E731

    def run_step(rows: torch.Tensor) -> None:
        if len(rows) < world_size():
            return  # a last batch with fewer images than processes
        part = shard(rows)  # all rows, unless torchrun started several processes
        run.share = len(part) / len(rows)
        meter.count(step(part), len(part))

    return run_step


class Meter:
    """Means of metrics. The sums stay on the device until `report`, because reading them waits for it.

    Each metric is averaged over the images it was returned for, so an eager step may omit it now and then.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}  # since the last report, on this rank
        self.counts: dict[str, int] = {}  # of images
        self.epoch: Totals = {}  # since the epoch began, up to the last report, over all ranks

    def add(self, metrics: dict[str, torch.Tensor | float], images: int) -> tuple[str, ...]:
        """Add means over so many images; return their names. Part of the captured step."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                if value.dim():
                    raise UserError(f"train_step returns {name} with shape {list(value.shape)}; return its mean")
                value = value.detach().float()
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.device)
            self.sums[name].add_(value, alpha=images)
        return tuple(metrics)

    def count(self, names: tuple[str, ...], images: int) -> None:
        """Count the images behind what `add` has summed. Not part of the step: a graph cannot count in Python."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + images

    def report(self) -> Metrics:
        """Return the means over all ranks since the last report, and add these images to the epoch's."""
        totals = add_up(all_gather(self.totals()))
        self.epoch = add_up([self.epoch, totals])
        for value in self.sums.values():
            value.zero_()  # in place: a graph adds to this very tensor
        self.counts = {}
        return means_of(totals)

    def end_epoch(self) -> Metrics:
        """Return the means over the epoch, up to the last report, and start a new one."""
        totals, self.epoch = self.epoch, {}
        return means_of(totals)

    def totals(self) -> Totals:
        """Sums and counts since the last report, on this rank."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        return {name: (value, self.counts.get(name, 0)) for name, value in zip(self.sums, sums)}

    def state_dict(self) -> dict[str, Totals]:
        return {"since_report": self.totals(), "epoch": self.epoch}

    def load(self, ranks: list[dict[str, Totals]]) -> None:
        """Continue from the state of this rank; if their number has changed, rank 0 continues from all of them."""
        if len(ranks) != world_size():
            since = [state["since_report"] for state in ranks] if rank() == 0 else []
            ranks = [{**ranks[0], "since_report": add_up(since)}] * world_size() if ranks else []
        for state in ranks[rank() : rank() + 1]:
            self.epoch = state["epoch"]
            for name, (value, count) in state["since_report"].items():
                self.sums[name], self.counts[name] = torch.tensor(value, device=self.device), count


def add_up(parts: list[Totals]) -> Totals:
    totals: Totals = {}
    for part in parts:
        for name, (value, count) in part.items():
            before, images = totals.get(name, (0.0, 0))
            totals[name] = (before + value, images + count)
    return totals


def means_of(totals: Totals) -> Metrics:
    return {name: value / count for name, (value, count) in totals.items() if count}


def report(run: Run, steps: int) -> None:
    """Append the means since the last report to the curve. Raises UserError if one is not finite."""
    means = run.meter.report()
    run.require_finite(means)
    if means:  # none if the only batch since the last report was skipped
        run.curve.append({"epoch": run.epoch + run.batch / steps, **means})


def end_epoch(run: Run, validate: Callable | None, score: str | None, sample: Callable | None) -> None:
    """Validate, append a row to the history, save samples, and save best.pt if this is the best epoch."""
    row = run.end_epoch({**run.meter.end_epoch(), **(broadcast(validate) if validate else {})})
    if sample and rank() == 0:
        save_grid(sample(), run.folder / "samples" / f"epoch-{row['epoch']:04d}.png", columns=10)
    if score in row and run.best_epoch(score) == run.epoch:
        run.save("best.pt")


def save(run: Run, signals: list[int], due: bool) -> None:
    """Save if it is due on any rank. After a signal on any rank, save and raise Stopped."""
    signal, due = sync_flags(signals, due)
    if signal or due:
        run.save()
    if signal:
        save_plots(run)
        command = "the same command" if run.loop.auto_resume else f"python {run.script} --resume {run.folder}"
        raise Stopped(signal, f"stopped and saved; resume with: {command}" if rank() == 0 else "")


def listed(metrics: Metrics) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "epoch")


def save_plots(run: Run) -> None:
    if rank() == 0:
        plot_curves(run.history, run.curve, run.folder / "curves.png")
        save_gif(run.folder)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, without gradients; restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predict(model: nn.Module, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of `model` in eval mode for every image of `batches`, and the labels, in order."""
    with evaluating(model):
        parts = [(model(images), labels) for images, labels in map(batches.take, batches.rows(0))]
    outputs, labels = zip(*parts)
    return torch.cat(outputs), torch.cat(labels)
