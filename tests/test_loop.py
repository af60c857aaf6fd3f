"""The loop and its helpers, apart from any script."""

import argparse
import csv
import math
import os
import signal

import numpy as np
import pytest
import torch
from helpers import load
from PIL import Image, ImageSequence

import utils
from datasets import Batches
from engine import checkpoint, plots, threads
from engine.errors import Stopped, UserError
from engine.optim import EMA


class Position(torch.nn.Module):
    """A state that counts its steps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def start(folder, state, **options):
    options = {"epochs": 2, "batch_size": 2, "log_interval": 3, **options}
    return utils.Run(argparse.Namespace(**options, output_dir=str(folder)), state)


def numbered_images(count, batch_size, device="cpu", **options):
    """Images of one pixel, and their numbers as labels."""
    images = torch.arange(count).view(count, 1, 1, 1).to(torch.uint8)
    return Batches(images, torch.arange(count), batch_size, device, **options)


def ten_images(batch_size):
    return numbered_images(10, batch_size)


def fit(layer, optimizer):
    """A train_step that moves what a linear layer says of each image towards 0.3."""

    def train_step(images, labels):
        loss = (layer(images.flatten(1)) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return train_step


def test_best_pt_is_the_best_epoch_and_the_run_ends_when_it_should_stop(tmp_path):
    accuracies, asked = iter([0.5, 0.9, 0.9, 0.7, 0.8, 0.95]), []
    run = start(tmp_path / "run", {}, epochs=6)

    def should_stop(row):
        asked.append(row["epoch"])
        return row["epoch"] - run.best_epoch("val_accuracy") >= 2

    def validate():
        return {"val_accuracy": next(accuracies)}

    utils.train(run, lambda *_: {}, ten_images(10), validate, "val_accuracy", should_stop=should_stop)
    assert load(tmp_path / "run" / "best.pt")["epoch"] == 2
    assert load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 4
    assert asked == [1, 2, 3, 4]  # once each


def test_every_schedule_and_every_ema_in_the_state_is_updated_once_a_step(tmp_path):
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000) for _ in range(2)]
    emas = [EMA(network, decay) for decay in (0.9, 0.99)]
    state = {"network": network, "optimizer": optimizer, "a": emas[0], "b": emas[1], "c": schedules[0]}
    run = start(tmp_path / "run", {**state, "d": schedules[1]})
    utils.train(run, fit(network, optimizer), ten_images(batch_size=2))
    assert [schedule.last_epoch for schedule in schedules] == [ema.updates for ema in emas] == [10, 10]


@pytest.mark.parametrize(
    ("fault", "message", "batch"),
    [
        ("metric", "loss_d is not finite at or shortly before step 3 of epoch 1; .*--lr", 2),
        ("metric", "loss_d is not finite at or shortly before step 2 of epoch 1", 1),  # before its report
        ("weight", "network is not finite at or shortly before step 3 of epoch 1", 2),
        ("validation", "val_loss is not finite at or shortly before the end of epoch 1", 5),
    ],
)
def test_what_is_not_finite_is_named_and_never_saved(tmp_path, fault, message, batch):
    network = torch.nn.Linear(2, 2)
    run = start(tmp_path / "run", {"network": network}, save_interval=0.0)

    def train_step(images, labels):
        if fault == "weight" and run.batch == 2:
            network.weight.data[1, 1] = math.nan
        return {"loss_d": torch.tensor(math.inf if fault == "metric" and run.batch == batch else 0.0)}

    with pytest.raises(UserError, match=message):
        utils.train(run, train_step, ten_images(2), lambda: {"val_loss": math.nan if fault == "validation" else 0.0})
    saved = load(tmp_path / "run" / "checkpoint.pt")
    assert (saved["epoch"], saved["batch"]) == (0, batch)


def test_what_is_infinite_from_the_start_gets_a_remedy_of_its_own_and_what_is_empty_is_fine(tmp_path):
    run = start(tmp_path / "run", {"empty": torch.zeros(0), "mask": torch.full((2,), -math.inf)})
    with pytest.raises(UserError, match=r"^mask is not finite before the first step; make a mask bool, or a buf"):
        utils.train(run, lambda images, labels: {}, ten_images(2))


def test_options_are_saved_as_plain_values_or_refused(tmp_path):
    run = start(tmp_path / "run", {}, betas=(np.float64(0.5), 0.9))
    utils.train(run, lambda images, labels: {}, ten_images(2))
    assert load(tmp_path / "run" / "checkpoint.pt")["options"]["betas"] == [0.5, 0.9]
    with pytest.raises(UserError, match=r"options of a run must be numbers, strings, .* Object of type PosixPath"):
        start(tmp_path / "other", {}, root=tmp_path)
    with pytest.raises(UserError, match=r"could not be read again .*classes is a list of names"):
        start(tmp_path / "run", {}, classes=10)


def test_after_a_start_that_failed_another_one_can_use_the_folder(tmp_path):
    kept = []  # as a notebook keeps the last exception
    for _ in range(2):
        with pytest.raises(UserError, match="one image would form a batch") as caught:
            utils.train(start(tmp_path / "run", {"norm": torch.nn.BatchNorm1d(1)}), lambda *_: {}, ten_images(3))
        kept.append(caught)


@pytest.mark.parametrize("amp", [True, False])
def test_amp_runs_the_step_in_bfloat16_and_sees_weights_updated_within_it(tmp_path, amp):
    layer = torch.nn.Linear(1, 1, bias=False)
    white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    seen = []

    def train_step(images, labels):
        for weight in (1.0, 2.0):
            with torch.no_grad():
                layer.weight.fill_(weight)
            seen.append(layer(images.flatten(1)))
        return {}

    run = start(tmp_path / "run", {}, epochs=1, amp=amp)
    utils.train(run, train_step, Batches(white, torch.zeros(1).long(), 1, "cpu"))
    assert [x.item() for x in seen] == [1.0, 2.0]
    assert seen[0].dtype == (torch.bfloat16 if amp else torch.float32)


def mean_of(labels):
    return labels.float().mean()


def test_a_metric_is_averaged_over_the_images_that_it_was_returned_for(tmp_path):
    """A run of ten steps, the last with two images for three: one metric at each step, one of them a number, one at
    every third step, and one that begins within the epoch. A report without images for a metric leaves it out."""
    run = start(tmp_path / "run", {"position": Position()}, epochs=1, log_interval=2)
    seen = []

    def train_step(images, labels):
        rare = {"rare": mean_of(labels)} if run.batch % 3 == 0 else {}
        late = {"late": mean_of(labels)} if run.batch > 6 else {}
        seen.append(labels.tolist())
        return {"label": mean_of(labels), "number": mean_of(labels).item(), **rare, **late}

    utils.train(run, train_step, numbered_images(29, 3))

    def mean(batches):
        labels = [label for batch in batches for label in seen[batch]]
        return pytest.approx(sum(labels) / len(labels)) if labels else None

    (row,), reports = run.history, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert (row["label"], row["number"]) == (pytest.approx(14), pytest.approx(14))
    assert (row["rare"], row["late"]) == (mean([0, 3, 6, 9]), mean([7, 8, 9]))
    assert [row["epoch"] for row in run.curve] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert [row["label"] for row in run.curve] == [mean(steps) for steps in reports]
    assert [row.get("rare") for row in run.curve] == [mean([i for i in steps if i % 3 == 0]) for steps in reports]
    assert [row.get("late") for row in run.curve] == [mean([i for i in steps if i > 6]) for steps in reports]


def test_small_metrics_are_shown_with_as_many_digits_as_large_ones():
    assert utils.listed({"epoch": 3, "lr": 2e-6, "loss": 0.46}) == "lr 2.000e-06  loss 0.4600"


def test_sums_keep_growing_in_bfloat16(tmp_path):
    run = start(tmp_path / "run", {}, epochs=1)
    one = torch.ones((), dtype=torch.bfloat16)
    utils.train(run, lambda images, labels: {"one": one}, numbered_images(3000, 1))
    assert run.history[0]["one"] == 1


def test_a_stopped_run_leaves_its_plots_and_resumes_even_with_other_metrics(tmp_path):
    """The run is stopped after 3 of 5 batches of the second epoch."""
    folder = tmp_path / "run"
    run = start(folder, {"position": Position()}, epochs=3)
    seen = []

    def stopped_train_step(images, labels):
        if (run.epoch, run.batch) == (1, 2):
            signal.raise_signal(signal.SIGTERM)
        seen.append((run.epoch, mean_of(labels).item()))
        return {"label": mean_of(labels), "old": mean_of(labels)}

    with pytest.raises(Stopped):
        utils.train(run, stopped_train_step, ten_images(batch_size=2), sample=lambda: torch.zeros(10, 1, 28, 28))
    assert (folder / "curves.png").is_file()
    assert (folder / "samples.gif").is_file()
    resumed = start(folder, {"position": Position()}, epochs=3, resume=str(folder))

    def train_step(images, labels):
        seen.append((resumed.epoch, mean_of(labels).item()))
        return {"label": mean_of(labels), "new": mean_of(labels)}

    utils.train(resumed, train_step, ten_images(batch_size=2))
    second_epoch = [value for epoch, value in seen if epoch == 1]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert list(rows[0]) == ["epoch", "label", "old", "new"]
    assert [float(row["label"]) for row in rows] == pytest.approx([4.5] * 3)
    assert [float(row["old"]) for row in rows[:2]] == pytest.approx([4.5, sum(second_epoch[:3]) / 3])
    assert [float(row["new"]) for row in rows[1:]] == pytest.approx([sum(second_epoch[3:]) / 2, 4.5])
    assert (rows[0]["new"], rows[2]["old"]) == ("", "")


def test_curves_are_the_reports_as_a_line_and_validation_as_dots(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    history = [{"epoch": 1, "loss": 2.0, "val_loss": 3.0}, {"epoch": 2, "loss": 1.0, "val_loss": 2.5}]
    plots.plot_curves(history, [{"epoch": x, "loss": 4 - x} for x in (0.5, 1, 1.5, 2)], tmp_path / "a.png")
    (axis,) = figures[0].axes
    found = [line.get_xydata().tolist() for line in axis.lines]
    assert found == [[[0.5, 3.5], [1, 3], [1.5, 2.5], [2, 2]], [[1, 3], [2, 2.5]]]


def test_the_loop_saves_every_so_many_seconds_since_the_last_save(tmp_path, monkeypatch):
    """With a clock of the test's own: a step takes 4 seconds, and a checkpoint is due after 10."""
    clock, saved = [0.0], []
    monkeypatch.setattr("engine.run.time.monotonic", lambda: clock[0])
    run = start(tmp_path / "run", {}, epochs=1, save_interval=10.0)
    save = run.save
    monkeypatch.setattr(run, "save", lambda *name: saved.append(run.batch) or save(*name))

    def train_step(images, labels):
        clock[0] += 4
        return {}

    utils.train(run, train_step, numbered_images(20, 2))
    assert saved == [0, 3, 6, 9, 0]  # before the first step; after 12 s, 12 s and 12 s; at the end of the epoch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_says_how_to_resume(tmp_path, number):
    def impatient(images, labels):
        signal.raise_signal(number)
        signal.raise_signal(number)
        raise AssertionError("the second signal was ignored")

    with pytest.raises(Stopped, match=r"interrupted; resume with: resume='.*run' in its options"):
        utils.train(start(tmp_path / "run", {}), impatient, ten_images(batch_size=2))


def test_a_signal_that_torchrun_repeats_is_no_second_one(tmp_path, monkeypatch):
    def repeated(images, labels):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return {}

    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    with pytest.raises(Stopped, match="stopped and saved"):
        utils.train(start(tmp_path / "run", {}), repeated, ten_images(batch_size=2))


def test_a_checkpoint_is_on_the_disk_before_its_name_points_to_it(tmp_path, monkeypatch):
    done = []

    def size(file):
        return os.fstat(file).st_size if isinstance(file, int) else os.path.getsize(file)

    def watch(name, original):
        monkeypatch.setattr(checkpoint.os, name, lambda *args: done.append((name, size(args[0]))) or original(*args))

    watch("fsync", os.fsync)
    watch("replace", os.replace)
    checkpoint.write_atomically(tmp_path / "file", b"content")
    assert done == [("fsync", 7), ("replace", 7)]


@pytest.mark.parametrize(("first", "last", "shown"), [(1, 94, [*range(1, 95, 3)]), (9998, 10_000, [1, 2, 3])])
def test_the_gif_shows_evenly_spaced_epochs_in_their_order_up_to_the_last(tmp_path, first, last, shown):
    (tmp_path / "samples").mkdir()
    for epoch in range(first, last + 1):
        Image.new("L", (8, 8), epoch - first + 1).save(tmp_path / "samples" / f"epoch-{epoch:04d}.png")
    plots.save_gif(tmp_path)
    frames = ImageSequence.Iterator(Image.open(tmp_path / "samples.gif"))
    assert [frame.convert("L").getpixel((0, 0)) for frame in frames] == shown


def test_images_from_a_file_are_read_outside_the_captured_step(tmp_path, monkeypatch):
    """`on_device = False`: the loop calls `take` itself, and the step gets images and labels."""
    batches, captured = ten_images(batch_size=2), []
    batches.on_device = False
    monkeypatch.setattr(utils, "capture", lambda step, *_: captured.append(step) or step)
    run = start(tmp_path / "run", {}, epochs=1)
    utils.train(run, lambda images, labels: {"label": mean_of(labels)}, batches)
    assert run.history[0]["label"] == 4.5
    captured[0](torch.zeros(2, 1, 1, 1), torch.ones(2))
    assert run.meter.report() == {"label": 1.0}


def test_a_batch_source_that_yields_fewer_batches_than_its_length_is_refused(tmp_path, monkeypatch):
    batches = numbered_images(10, 4)
    monkeypatch.setattr(batches, "rows", lambda epoch, start=0: iter(torch.arange(8).split(4)[start:]))  # no short one
    with pytest.raises(UserError, match=r"^len\(batches\) is 3, but rows\(\) yields 2 batches; make them the same$"):
        utils.train(start(tmp_path / "run", {}), lambda images, labels: {}, batches)
    monkeypatch.setattr(batches, "rows", lambda epoch, start=0: torch.arange(10).split(4)[start : 3 - (epoch == 1)])
    with pytest.raises(UserError, match=r"^rows\(1\) yields only 2 of 3 batches; yield all in every epoch$"):
        utils.train(start(tmp_path / "other", {}, epochs=2), lambda images, labels: {}, batches)


def test_the_captured_step_has_the_size_of_the_batches_not_of_the_flag(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(utils, "capture", lambda step, run, size: sizes.append(size) or step)
    utils.train(start(tmp_path / "run", {}, batch_size=2), lambda images, labels: {}, ten_images(batch_size=4))
    assert sizes == [4]


def test_the_first_steps_choose_the_number_of_threads_and_a_resumed_run_keeps_it(tmp_path, monkeypatch, capsys):
    """More than two do not help this step."""
    seconds, chosen, used = [0.0], [], []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "CORES", 6)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)

    def train_step(images, labels):
        used.append(chosen[-1])
        seconds[0] += 1 / min(used[-1], 2)
        return {}

    for resume in (None, str(tmp_path / "run")):
        run = start(tmp_path / "run", {"layer": torch.nn.Linear(1, 1)}, epochs=20, resume=resume)
        if resume:
            run.args.epochs = run.epochs = 21
        utils.train(run, train_step, ten_images(2))
    assert used == [6, *[1, 2, 4, 6] * 3, *[2] * (100 - 13), *[2] * 5]
    assert capsys.readouterr().out.count("threads: 2 (a step takes ") == 1
