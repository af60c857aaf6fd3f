"""The training loop. A script defines the training step; the loop runs it.

From a batch to a number on the screen:

    rows         which images: row numbers, shuffled by the seed and the epoch           batches.rows
    take         their pixels and labels, on the device                                  batches.take
    train_step   forward path, backward path, update; returns metrics                    the script's
    Meter.add    accumulates the metrics, on the device                                  below
    report       reads their means, every --log-interval steps, for the progress bar     below

An epoch ends when every image has been seen once. Then `end_epoch` validates the network, adds a row of metrics and
draws samples. `--resume RUN` continues with the batch after the last save: everything in `run.state` (networks,
optimizers, schedules, EMA), the random numbers, the sums of the metrics and the position are restored.

Edit a train_step as you like: its losses, updates and metrics. The loop advances the schedules and the EMA.
On a GPU, and with --compile, the step is frozen: recorded once and repeated without Python, so it must stay on the
device and do the same in every step: no `.item()`, no `if` on a tensor, no Python number that changes.
engine/frozen.py rehearses the step first, and notices and names what cannot be frozen. With
`--no-cuda-graph` and without `--compile`, it runs eagerly.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from engine.capture import is_capturable
from engine.distributed import all_gather, broadcast, rank, shard, sync_flags, world_size
from engine.errors import Stopped, UserError, caught_signals
from engine.frozen import FrozenStep
from engine.optim import EMA
from engine.pictures import draw_curves, save_gif, save_grid
from engine.run import Run

Metrics = dict[str, torch.Tensor | float]  # name -> mean over the images of the batch
DRY_RUN_STEPS = 8  # enough to freeze the step and to repeat it
ESTIMATE_STEPS = 200  # after which the time for the rest is estimated
TrainStep = Callable[[torch.Tensor, torch.Tensor], Metrics]


def train(
    run: Run,
    train_step: TrainStep,
    batches: Any,
    validate: Callable[[], dict[str, float]] | None = None,
    score: str | None = None,
    draw: Callable[[], torch.Tensor] | None = None,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
    should_stop: Callable[[dict[str, float]], bool] | None = None,
) -> dict[str, Any]:
    """Run `train_step(images, labels) -> {name: mean over the images}` over `batches` for --epochs epochs.

    batches: has a length, and `epoch(e, start)` yields the (images, labels) of epoch `e` from batch `start` on. If it
        also has `rows(e, start)`, which yields (row numbers,), and `take(rows) -> (images, labels)`, as
        datasets.Batches has, then the step also takes the images.
    validate: returns metrics named val_..., or {}; called after each epoch, on rank 0.
    score: the metric to maximise; the first epoch with its highest value is saved as best.pt.
    draw: returns samples [N, 1, H, W]; called after each epoch, on rank 0, for samples/ and samples.gif.
    after_epoch: called with the epoch's row of metrics, on rank 0.
    should_stop: called with the last row, on every rank; ends the training.

    Saves checkpoint.pt before the first step, every --save-interval seconds, after each epoch, and on SIGINT or
    SIGTERM, after which it raises Stopped. Raises UserError if a metric or a weight is not finite. Returns the run
    folder and the metrics of the last epoch.
    """
    epochs = 1 if run.args.dry_run else run.args.epochs

    def finished():
        return run.epoch >= epochs or bool(should_stop and run.history and should_stop(run.history[-1]))

    run.meter = Meter()
    run.restore()
    step = make_step(run, train_step, batches)
    if finished():
        print(f"run already finished at epoch {run.epoch}")
    try:
        with caught_signals() as signals:
            if run.epoch == run.batch == 0:
                run.save()
            while not finished():
                train_epoch(run, step, batches, signals)
                end_epoch(run, validate, score, draw)
                print_row(run.history[-1], epochs, run.seconds[-2])
                if after_epoch and rank() == 0:
                    after_epoch(run.history[-1])
                signal, _ = sync_flags(signals, due=True)
                run.save()
                run.write_metrics()
                if signal and not finished():
                    stop(run, signal)
        draw_pictures(run)
        if run.args.script.startswith("train_"):  # evaluate.py knows no others
            print(f"now evaluate it: python evaluate.py {run.folder}")
    finally:
        if run.lock:
            run.lock.release()
    return {"folder": str(run.folder), **run.history[-1]}


def train_epoch(run: Run, step: Callable, batches: Any, signals: list[int]) -> None:
    """Run the rest of the current epoch, from batch number `run.batch` on."""
    args = run.args
    schedules = [item for item in run.state.values() if isinstance(item, LRScheduler)]
    steps = min(len(batches), DRY_RUN_STEPS) if args.dry_run else len(batches)
    rows = (lambda *at: zip(batches.rows(*at))) if hasattr(batches, "take") else batches.epoch
    saved, first, started = time.monotonic(), run.batch, None
    with progress_bar(run, steps) as bar:
        for batch in itertools.islice(rows(run.epoch, run.batch), steps - run.batch):
            part = shard(batch)  # all of the batch, unless torchrun started several processes
            if len(batch[0]) >= world_size():  # else skip a last batch with fewer images than processes
                run.share = len(part[0]) / len(batch[0])
                names = step(*part)
                run.meter.count(names, len(part[0]))
            for schedule in schedules:
                schedule.step()
            run.batch += 1
            if run.batch % args.log_interval == 0 or run.batch == steps:
                report(run, steps, bar)
            done = run.batch - first
            if done == 2:  # the first steps compile and allocate
                started = time.monotonic()
            elif started and not run.estimated and (done == ESTIMATE_STEPS or run.batch == steps):
                print_estimate(run, (time.monotonic() - started) / (done - 2), len(batches))
            signal, due = sync_flags(signals, due=time.monotonic() - saved >= args.save_interval)
            if signal or due:
                run.save()
                saved = time.monotonic()
            if signal:
                stop(run, signal)


def make_step(run: Run, train_step: TrainStep, batches: Any) -> Callable[..., tuple[str, ...]]:
    """Return a function that runs one step, from row numbers to sums of metrics, and returns the metrics' names.

    The whole step is compiled with --compile, and is a CUDA graph on a GPU. It runs eagerly, operation by operation, if
    it is neither, with several processes, and if an optimizer cannot be captured.
    """
    args, device, optimizers = run.args, run.device(), run.optimizers()
    emas = [item for item in run.state.values() if isinstance(item, EMA)]
    take = getattr(batches, "take", lambda *batch: batch)

    def eager_step(*batch):
        images, labels = take(*batch)
        # Without autocast's cache, which would return stale weights after an update within the step.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
            metrics = train_step(images, labels)
        for ema in emas:
            ema.update()
        return run.meter.add(metrics, images)

    graph = device.type == "cuda" and args.cuda_graph
    if not (args.compile or graph):
        return eager_step
    if world_size() > 1:
        print("every step runs eagerly: there are several processes")
        return eager_step
    for optimizer in optimizers:
        if not is_capturable(optimizer):
            print(f"every step runs eagerly: {type(optimizer).__name__} keeps its state on the CPU")
            return eager_step
    return FrozenStep(
        eager_step, optimizers, args.batch_size, device, compiled=args.compile, graph=graph, begun=run.begun
    )


class Meter:
    """Means of metrics over an epoch. Sums stay on the device, because reading them waits for it.

    Each metric is averaged over the images it was returned for, so an eager step may omit it now and then.
    """

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}  # this rank's, since the epoch began
        self.counts: dict[str, int] = {}  # of images
        self.reported: dict[str, tuple[float, int]] = {}  # sum and count over all ranks at the last report

    def add(self, metrics: Metrics, images: torch.Tensor) -> tuple[str, ...]:
        """Add metrics, means over `images`, to the sums; return their names. Part of the step."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                if value.dim():
                    raise UserError(f"train_step returns {name} with shape {list(value.shape)}; return its mean")
                value = value.detach().float()
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=images.device)
            self.sums[name].add_(value, alpha=len(images))
        return tuple(metrics)

    def count(self, names: tuple[str, ...], images: int) -> None:
        """Count the images behind what `add` has summed. Not part of the step: a graph cannot count in Python."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + images

    def totals(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each metric over all ranks."""
        ranks = all_gather(self.state_dict())
        names = dict.fromkeys(name for part in ranks for name in part["sums"])
        totals = {}
        for name in names:
            total = sum(part["sums"].get(name, 0) for part in ranks)
            totals[name] = (total, sum(part["counts"].get(name, 0) for part in ranks))
        return totals

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.totals().items() if count}

    def means_since_report(self) -> dict[str, float]:
        """Means over the images since this was last called in this epoch."""
        before, self.reported = self.reported, self.totals()
        means = {}
        for name, (total, count) in self.reported.items():
            total_before, count_before = before.get(name, (0, 0))
            if count > count_before:
                means[name] = (total - total_before) / (count - count_before)
        return means

    def reset(self) -> None:
        for total in self.sums.values():
            total.zero_()  # in place: a graph adds to this very tensor
        self.counts, self.reported = {}, {}

    def state_dict(self) -> dict[str, dict]:
        """This rank's sums, counts and last report as plain values."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        return {"sums": dict(zip(self.sums, sums)), "counts": dict(self.counts), "reported": dict(self.reported)}

    def load(self, states: list[dict[str, dict]], device: torch.device) -> None:
        """Add saved states, of one rank or of several."""
        for state in states:
            for name, value in state["sums"].items():
                self.sums[name] = self.sums.get(name, torch.zeros((), device=device)) + value
            for name, value in state["counts"].items():
                self.counts[name] = self.counts.get(name, 0) + value
            self.reported = self.reported or {name: tuple(pair) for name, pair in state["reported"].items()}


def report(run: Run, steps: int, bar: tqdm) -> None:
    """Show the means since the last report in the progress bar, and append them to the curve."""
    means = run.meter.means_since_report()
    run.require_finite(means)
    if means:  # none if the only batch since the last report was skipped
        run.curve.append({"epoch": run.epoch + run.batch / steps, **means})
    bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()}, refresh=False)
    bar.update(run.batch - bar.n)
    if bar.disable and run.batch < steps:  # no terminal: a line instead of a bar
        print(f"epoch {run.epoch + 1} step {run.batch}/{steps}  {listed(means)}", flush=True)


def end_epoch(run: Run, validate: Callable | None, score: str | None, draw: Callable | None) -> None:
    """Validate, append a row to the history, draw samples, and save best.pt if this is the best epoch."""
    means = run.meter.means()
    validation = broadcast(validate) if validate else {}
    row = run.end_epoch({**means, **validation})
    run.meter.reset()
    if draw and rank() == 0:
        save_grid(draw(), run.folder / "samples" / f"epoch-{row['epoch']:04d}.png", columns=10)
    if score in row and run.best_epoch(score) == run.epoch:
        run.save("best.pt")


def stop(run: Run, signal: int) -> None:
    draw_pictures(run)
    command = "the same command" if run.args.auto_resume else f"python {run.args.script} --resume {run.folder}"
    message = f"stopped and saved; resume with: {command}"
    raise Stopped(signal, message if rank() == 0 else "")


def progress_bar(run: Run, steps: int) -> tqdm:
    hidden = rank() > 0 or not sys.stderr.isatty()
    return tqdm(total=steps, initial=run.batch, desc=f"epoch {run.epoch + 1}", leave=False, disable=hidden)


def print_row(row: dict[str, float], epochs: int, seconds: float) -> None:
    print(f"epoch {row['epoch']}/{epochs}  {listed(row)}  {seconds:.1f} s", flush=True)


def listed(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "epoch")


def print_estimate(run: Run, seconds_per_step: float, epoch_length: int) -> None:
    """Say, once per process, how long the rest of the training will take at this pace, without validation."""
    run.estimated = True
    steps = (run.args.epochs - run.epoch) * epoch_length - run.batch
    if steps == 0:
        return
    left = steps * seconds_per_step
    time_left = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
    print(f"about {time_left} left: {steps:,} steps of {1000 * seconds_per_step:.1f} ms", flush=True)


def draw_pictures(run: Run) -> None:
    if rank() == 0:
        draw_curves(run.history, run.curve, run.folder / "curves.png")
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
        outputs, labels = zip(*[(model(images), labels) for images, labels in map(batches.take, batches.rows(0))])
    return torch.cat(outputs), torch.cat(labels)
