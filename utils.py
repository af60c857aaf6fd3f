"""The training loop. A script defines the training step; the loop runs it.

    rows         which images: row numbers, shuffled by the seed and the epoch        batches.rows
    take         their pixels and labels, on the device                               batches.take
    train_step   forward pass, backward pass, update; returns metrics                 the script's
    Meter        sums the metrics, on the device                                      below
    report       reads their means every --log-interval steps, for the progress bar   below

An epoch ends when every image has been seen once. Then the network is validated, samples are saved, and a row of
metrics and a checkpoint are written. `--resume RUN` continues with the batch after the last save.

Edit a train_step as you like. On a GPU, and with --compile, the step is captured: recorded once and replayed without
Python, so it must stay on the device and do the same in every step: no `.item()`, no `if` on a tensor, no Python number
that changes. engine/captured.py runs it a few times first; it detects and names what cannot be captured. With
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
Totals = dict[str, tuple[float, float]]  # metric -> its sum over images, and their number
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
    steps = min(len(batches), DRY_RUN_STEPS) if run.loop.dry_run else len(batches)
    run.meter = Meter(run.device())
    run.restore()
    step = make_step(run, train_step, batches)
    if finished(run, should_stop):
        print(f"run already finished at epoch {run.epoch}")
    try:
        with caught_signals() as signals:
            if run.epoch == run.batch == 0:
                run.save()
            while not finished(run, should_stop):
                for rows in progress(run, batches, steps):
                    step(rows)
                    run.batch += 1
                    report(run, steps)
                    save(run, signals, due=run.save_due())
                end_epoch(run, validate, score, sample, after_epoch)
                save(run, [] if finished(run, should_stop) else signals, due=True)
        save_plots(run)
        print(f"now evaluate it: python evaluate.py {run.folder}")
    finally:
        run.lock.release()
    return {"folder": str(run.folder), **run.history[-1]}


def finished(run: Run, should_stop: Callable[[Metrics], bool]) -> bool:
    return run.epoch >= run.epochs or bool(run.history and should_stop(run.history[-1]))


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
                bar.set_postfix_str(listed(run.curve[-1]), refresh=False)
                bar.update(run.batch - bar.n)
                if hidden and run.batch < steps:
                    print(f"epoch {run.epoch + 1} step {run.batch}/{steps}  {listed(run.curve[-1])}", flush=True)


def make_step(run: Run, train_step: TrainStep, batches: Any) -> Callable[[torch.Tensor], None]:
    """Return a function that runs one step, from row numbers to sums of metrics.

    It also advances every EMA and schedule in `run.state`. The step is compiled with --compile, and is a CUDA graph on
    a GPU; otherwise it runs eagerly. Reading the images is part of it, unless `batches.on_device` is False.
    """
    device = run.device()
    emas = [item for item in run.state.values() if isinstance(item, EMA)]
    schedules = [item for item in run.state.values() if isinstance(item, LRScheduler)]

    def step_on(images: torch.Tensor, labels: torch.Tensor) -> None:
        # Without autocast's cache, which would return stale weights after an update within the step.
        with torch.autocast(device.type, torch.bfloat16, enabled=run.loop.amp, cache_enabled=False):
            metrics = train_step(images, labels)
        for ema in emas:
            ema.update()
        run.meter.add(metrics, len(images))

    if getattr(batches, "on_device", True):
        step = capture(lambda rows: step_on(*batches.take(rows)), run)
    else:
        captured = capture(step_on, run)
        step = lambda rows: captured(*batches.take(rows))  # noqa: E731

    def run_step(rows: torch.Tensor) -> None:
        if len(rows) >= world_size():  # else a last batch with fewer images than processes is skipped
            part = shard(rows)  # all rows, unless torchrun started several processes
            run.share = len(part) / len(rows)
            step(part)
        for schedule in schedules:
            schedule.step()

    return run_step


class Meter:
    """Means of metrics. The sums stay on the device until `report`, because reading them waits for it.

    Each metric is averaged over the images it was returned for, so an eager step may omit it now and then.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}  # since the last report, on this rank
        self.counts: dict[str, torch.Tensor] = {}  # of images
        self.epoch: Totals = {}  # since the epoch began, up to the last report, over all ranks

    def add(self, metrics: dict[str, torch.Tensor | float], images: int) -> None:
        """Add means over so many images. Part of the captured step, so it writes to the same tensors each time."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                if value.dim():
                    raise UserError(f"train_step returns {name} with shape {list(value.shape)}; return its mean")
                value = value.detach().float()
            if name not in self.sums:
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

    def end_epoch(self) -> Metrics:
        """Return the means over the epoch, up to the last report, and start a new one."""
        totals, self.epoch = self.epoch, {}
        return means_of(totals)

    def totals(self) -> Totals:
        """Sums and counts since the last report, on this rank."""
        values = torch.stack([*self.sums.values(), *self.counts.values()]).tolist() if self.sums else []
        return dict(zip(self.sums, zip(values, values[len(self.sums) :])))

    def state_dict(self) -> dict[str, Totals]:
        return {"since_report": self.totals(), "epoch": self.epoch}

    def load(self, ranks: list[dict[str, Totals]]) -> None:
        """Continue from the state of this rank; if their number has changed, rank 0 continues from all of them."""
        if len(ranks) != world_size():
            since = [state["since_report"] for state in ranks] if rank() == 0 else []
            ranks = [{**ranks[0], "since_report": add_up(since)}] * world_size() if ranks else []
        for state in ranks[rank() : rank() + 1]:
            self.epoch = state["epoch"]
            for name, pair in state["since_report"].items():
                self.sums[name], self.counts[name] = (torch.tensor(value, device=self.device) for value in pair)


def add_up(parts: list[Totals]) -> Totals:
    totals: Totals = {}
    for part in parts:
        for name, (value, count) in part.items():
            before, images = totals.get(name, (0.0, 0.0))
            totals[name] = (before + value, images + count)
    return totals


def means_of(totals: Totals) -> Metrics:
    return {name: value / count for name, (value, count) in totals.items() if count}


def report(run: Run, steps: int) -> None:
    """Every --log-interval steps, and at the end of the epoch: append the means since the last report to the curve."""
    if run.batch % run.loop.log_interval == 0 or run.batch == steps:
        means = run.meter.report()
        run.require_finite(means)
        if means:  # none if the only batch since the last report was skipped
            run.curve.append({"epoch": run.epoch + run.batch / steps, **means})


def end_epoch(
    run: Run, validate: Callable | None, score: str | None, sample: Callable | None, after_epoch: Callable | None
) -> None:
    """Validate, print a row of metrics and append it to the history, save samples, and best.pt if it is the best."""
    row = run.end_epoch({**run.meter.end_epoch(), **(broadcast(validate) if validate else {})})
    if sample and rank() == 0:
        save_grid(sample(), run.folder / "samples" / f"epoch-{row['epoch']:04d}.png", columns=10)
    if score in row and run.best_epoch(score) == run.epoch:
        run.save("best.pt")
    print(f"epoch {run.epoch}/{run.epochs}  {listed(row)}  {run.seconds[-2]:.1f} s", flush=True)
    if after_epoch and rank() == 0:
        after_epoch(row)
    run.write_metrics()


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
