"""The training loop. A script defines the training step; the loop runs it.

From a batch to a number on the screen:

    rows         which images: their row numbers, shuffled by the seed and the epoch       batches.rows
    take         their pixels and labels, on the device                                    batches.take
    train_step   forward pass, backward pass, update; returns metrics                      the script's
    meter        sums the metrics, on the device                                           engine/meter.py
    report       every --log-interval steps, adds their means to the curve                 below
    progress     shows the curve's last point in a progress bar, or on a line              below

After each step the loop updates every EMA, adds 1 to `run.state["step"]`, and advances the schedules. An epoch ends
when every image has been seen once: the network is validated, samples and the best checkpoint are saved, and a row of
metrics and a checkpoint are written. `--resume RUN` continues with the batch after the last checkpoint.

Edit a train_step as you like. Keep what must survive a step or a resume in `state`: networks, optimizers, tensors,
generators, plain values. To anneal a number, compute it from the tensor `state["step"]`. On a GPU, or with --compile,
the step is captured, which means recorded once and replayed without Python. So it must stay on the device and do the
same in every step: no `.item()`, no `print` of a tensor, no `images[mask]`, no `if` on a tensor, no Python number that
changes. torch's random numbers, and an `if` on an option, are fine. A step that breaks these rules ends the training at
once, with a message that names the line; with `--no-cuda-graph` and without `--compile`, it runs eagerly, without
limits.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from signal import SIGINT
from typing import Any

import torch
from tqdm import tqdm

from engine import optim
from engine.captured import capture
from engine.checkpoint import has_checkpoint
from engine.distributed import broadcast, rank, sync_flags, world_size
from engine.errors import Stopped, UserError, caught_signals, command
from engine.meter import Metrics, validated
from engine.plots import plot_curves, save_gif, save_grid
from engine.run import Run
from engine.state import evaluating, require_batches_for_norm, untrained, watched_optimizers

TrainStep = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor | float]]
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
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run `train_step(images, labels) -> {name: mean over the images}` over `batches` for --epochs epochs.

    batches: has a length; `rows(epoch, start)` yields the row numbers of each batch of `epoch` from number `start` on,
        and `take(rows)` returns their images and labels on the device. datasets.Batches is one.
    validate: returns metrics named val_..., or {}. sample: returns samples [N, 1, H, W] for samples/ and samples.gif.
        Both run after each epoch, on rank 0. after_epoch gets the epoch's metrics, on every rank, and may unfreeze
        layers or set a learning rate. All run in eval mode and without gradients.
    score: the metric to maximise; best.pt is its best epoch. Without a validation split, the last epoch is the result.
    should_stop: gets each row but the last, on every rank; True ends the training. A resumed run asks it again.
    check: runs on rank 0 in eval mode, before the first step and after the last; see measures.trained.check_rebuilt.

    Saves checkpoint.pt before the first step, every --save-interval seconds, after each epoch, and on a signal,
    after which it raises Stopped; a second Ctrl-C does so at once. Raises UserError if a metric or a weight is not
    finite. Returns the run folder and the metrics of the last epoch.
    """
    try:
        steps = min(len(batches), DRY_RUN_STEPS) if run.args.dry_run else len(batches)
        run.restore()
        run.state["step"].fill_(run.epoch * steps + run.batch)
        run_step = make_step(run, train_step, batches)
        check = evaluating(*run.networks().values())(check)  # in eval mode, without gradients
        optim.check_schedules(run.state, run.args.epochs, len(batches))
        if done := finished(run, should_stop):
            print(f"run already finished at epoch {run.epoch}")
        with caught_signals() as signals, watched_optimizers(run.state, run.updated):
            if run.epoch == run.batch == 0:
                run.save()
                broadcast(check)  # runs on rank 0; the others wait
            while not done:
                for rows in progress(run, batches, steps):
                    run_step(rows)
                    run.batch += 1
                    report(run, steps)
                    save(run, signals, due=time.monotonic() - run.saved >= run.args.save_interval)
                with evaluating(*run.networks().values()):
                    finish_epoch(run, validate, score, sample, after_epoch)
                optim.step_schedules(run.state, run.history[-1], score)
                done = finished(run, should_stop)
                save(run, [] if done else signals, due=True)  # no signal stops a finished run
        broadcast(check)
        save_plots(run)
        print_what_is_next(run)
    except KeyboardInterrupt as error:  # the second Ctrl-C
        if not has_checkpoint(run.folder):
            raise
        raise stopped(run, error.args[0] if error.args else SIGINT, "interrupted") from None
    finally:
        run.lock.release()
    return {"folder": str(run.folder), **run.history[-1]}


def finished(run: Run, should_stop: Callable[[Metrics], bool]) -> bool:
    return run.epoch >= run.epochs or bool(run.history and should_stop(run.history[-1]))


def progress(run: Run, batches: Any, steps: int) -> Iterator[torch.Tensor]:
    """Yield the row numbers of the epoch's remaining batches, of `steps` in all. Raises UserError if there are fewer.

    Shows each report in a progress bar or, without a terminal, on a line.
    """
    hidden = rank() > 0 or not sys.stderr.isatty()
    with tqdm(total=steps, initial=run.batch, desc=f"epoch {run.epoch + 1}", leave=False, disable=hidden) as bar:
        for rows in itertools.islice(batches.rows(run.epoch, run.batch), steps - run.batch):
            reports = len(run.curve)
            yield rows  # train() runs the step, and may report
            if len(run.curve) > reports:
                bar.set_postfix_str(listed(run.curve[-1]), refresh=False)
                bar.update(run.batch - bar.n)
                if hidden and run.batch < steps:
                    print(f"epoch {run.epoch + 1} step {run.batch}/{steps}  {listed(run.curve[-1])}")
    if run.batch < steps:
        raise UserError(f"rows({run.epoch}) yields only {run.batch} of {steps} batches; yield all in every epoch")


def make_step(run: Run, train_step: TrainStep, batches: Any) -> Callable[[torch.Tensor], None]:
    """Return a function that runs one step, from row numbers to sums of metrics.

    It also updates every EMA in `run.state`, and advances the schedules that do not count epochs. The step is compiled
    with --compile, and is a CUDA graph on a GPU; otherwise it runs eagerly. Reading the images is part of the step,
    unless `batches.on_device` is False.
    """
    device = run.device()
    emas = [item for item in run.state.values() if isinstance(item, optim.EMA)]
    schedules = optim.schedules(run.state, per_epoch=False).values()
    sizes = [len(rows) for rows in batches.rows(run.epochs)]  # the same in every epoch
    if len(sizes) != len(batches):
        raise UserError(f"len(batches) is {len(batches)}, but rows() yields {len(sizes)} batches; make them the same")
    trained = [size for size in sizes if size >= world_size()]  # run_step skips the others
    require_batches_for_norm(run.networks(), min(trained, default=0) // world_size())
    warned = set[str]()

    def train_on(images: torch.Tensor, labels: torch.Tensor) -> None:
        # Without autocast's cache, which would return stale weights after an update within the step.
        with torch.autocast(device.type, torch.bfloat16, enabled=run.args.amp, cache_enabled=False):
            metrics = train_step(images, labels)
        for ema in emas:
            ema.update()
        run.state["step"].add_(1)
        run.meter.add(metrics, len(images))

    on_device = getattr(batches, "on_device", True)
    captured = capture((lambda rows: train_on(*batches.take(rows))) if on_device else train_on, run, max(sizes))

    def run_step(rows: torch.Tensor) -> None:
        if len(rows) >= world_size():  # else a last batch with fewer images than processes is skipped
            part = rows.tensor_split(world_size())[rank()]  # all rows, unless torchrun started several processes
            run.fraction = len(part) / len(rows)  # the weight of this rank's gradients in their sum
            inputs = (part,) if on_device else batches.take(part)
            captured(*inputs)
        else:
            run.state["step"].add_(1)
        if run.batch == 0:  # in every epoch: `after_epoch` may have unfrozen a layer
            run.require_as_built("train_step")
            for problem in sorted({*untrained(run.state, run.updated)} - warned):
                warned.add(problem)
                print(f"warning: {problem}")
        for schedule in schedules:
            schedule.step()

    return run_step


def report(run: Run, steps: int) -> None:
    """Every --log-interval steps and at the epoch's end, add the metrics' means since the last report to the curve."""
    if run.batch % run.args.log_interval == 0 or run.batch == steps:
        means = run.meter.report()
        run.require_finite(means)
        if means:  # none if the only batch since the last report was skipped
            run.curve.append({"epoch": run.epoch + run.batch / steps, **means})


def finish_epoch(
    run: Run, validate: Callable | None, score: str | None, sample: Callable | None, after_epoch: Callable | None
) -> None:
    """Validate, append a row of metrics to the history and print it, save samples, and best.pt in the best epoch."""
    metrics = {**run.meter.epoch_means(), **(broadcast(lambda: validated(validate)) if validate else {})}
    run.count_seconds()
    run.seconds.append(0.0)
    run.epoch, run.batch = run.epoch + 1, 0
    run.require_finite(metrics)
    row: Metrics = {"epoch": run.epoch, **metrics}
    run.history.append(row)
    if sample and rank() == 0:
        save_grid(sample(), run.folder / "samples" / f"epoch-{run.epoch:04d}.png", columns=10)
    if score in row and run.best_epoch(score) == run.epoch:
        run.save("best.pt")
    print(f"epoch {run.epoch}/{run.epochs}  {listed(row)}  {run.seconds[run.epoch - 1]:.1f} s")
    if after_epoch:
        run.require_as_built("train_step")
        after_epoch({**row})
        run.require_as_built("after_epoch")
    run.write_metrics()


def save(run: Run, signals: list[int], due: bool) -> None:
    """Save if it is due on any rank. After a signal on any rank, save and raise Stopped."""
    signal, due = sync_flags(signals, due)
    if signal or due:
        run.save()
    if signal:
        save_plots(run)
        raise stopped(run, signal, "stopped and saved")


def stopped(run: Run, signal: int, how: str) -> Stopped:
    """Return the exception to raise, which says how to resume the run."""
    again = command(run.script, "--resume", run.folder) if run.script else f"resume={str(run.folder)!r} in its options"
    again = "the same command" if run.args.auto_resume else again
    return Stopped(signal, f"{how}; resume with: {again}" if rank() == 0 else "")


def listed(metrics: Metrics) -> str:
    return "  ".join(f"{name} {value:#.4g}" for name, value in metrics.items() if name != "epoch")


def print_what_is_next(run: Run) -> None:
    if "kind" in run.args:  # by which evaluate.py rebuilds the network
        done = "dry run of a few steps, whose results mean nothing; to train, omit --dry-run"
        print(done if run.args.dry_run else f"now evaluate it: {command('evaluate.py', run.folder)}")


def save_plots(run: Run) -> None:
    if rank() == 0:
        plot_curves(run.history, run.curve, run.folder / "curves.png")
        save_gif(run.folder)


def predict(model: torch.nn.Module, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of `model` in eval mode for every image of `batches`, and the labels, in order."""
    with evaluating(model):
        parts = [(model(images), labels) for images, labels in map(batches.take, batches.rows(0))]
    outputs, labels = zip(*parts)
    return torch.cat(outputs), torch.cat(labels)


if __name__ == "__main__":
    sys.exit("utils.py is the training loop; run a script instead: python train_classifier.py --help")
