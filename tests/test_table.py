"""Tables of metrics: each row is gone through once, and what a run has saved survives a kill and a spreadsheet."""

import shutil

import pytest
import torch
from helpers import DIGITS, assert_same_run, killed_at, load, save_sealed, train

import evaluate
from engine.errors import UserError
from engine.table import Table

MLP = [*DIGITS, "--model", "mlp", "--epochs", "3", "--val-size", "37", "--save-interval", "1000"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(*MLP, "--output-dir", folder)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The same run, killed in its second epoch."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with killed_at((1, 3)):
        train(*MLP, "--output-dir", folder)
    return folder


def test_a_row_more_costs_the_same_however_many_there_are(tmp_path):
    read = []

    class Row(dict):
        def get(self, *args):
            read.append(args[0])
            return super().get(*args)

    table = Table()
    for epoch in range(1000):
        table.append(Row(epoch=epoch, loss=0.5))
        table.write(tmp_path / "a.csv")
        table.pack()
    assert len(read) == 2 * 1000  # once, for the checkpoint and for the file
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1001


def test_a_file_that_was_changed_or_is_gone_is_written_whole(tmp_path):
    table, path = Table([{"epoch": 1, "loss": 0.1}]), tmp_path / "a.csv"
    for change in (lambda: path.write_text("epoch;loss\n1;0,1\n2;0"), path.unlink, lambda: None):
        table.write(path)
        change()
        table.append({"epoch": len(table) + 1, "loss": 0.2})
        table.write(path)
        assert path.read_text().splitlines() == ["epoch,loss", "1,0.1", *(f"{i},0.2" for i in range(2, len(table) + 1))]


@pytest.mark.parametrize("left", [b"2,0.5", b"2,0.5,0.5,0.5,0.5\n3,1,1,1,1\n", "older"])
def test_what_a_kill_leaves_in_a_table_is_mended_on_resume(whole, killed, tmp_path, left):
    """Also of a run of 1.x: its checkpoint holds lists of rows, and other names."""
    path = shutil.copytree(killed, tmp_path / "run") / "metrics.csv"
    if left == "older":
        checkpoint = load(killed / "checkpoint.pt")
        del checkpoint["options"]["kind"]
        checkpoint["classes"] = checkpoint.pop("types")
        for each in checkpoint["ranks"]:
            sums, counts = ({name: pair[i] for name, pair in each["meter"]["since_report"].items()} for i in (0, 1))
            each["meter"] = {"sums": sums, "counts": counts}
        save_sealed({**checkpoint, "seconds": checkpoint["seconds"].tolist()}, tmp_path / "run" / "checkpoint.pt")
    else:
        path.write_bytes(path.read_bytes() + left)
    train("--resume", "run")
    assert_same_run(whole, tmp_path / "run")
    assert (whole / "curve.csv").read_bytes() == (tmp_path / "run" / "curve.csv").read_bytes()


FOREIGN = [
    (("options",), None), (("options", "lr"), "x"), (("options", "epochs"), None), (("options", "batch_norm"), [1]),
    (("options", "classes"), "0123456789"), (("options", "kind"), ["classifier"]), (("options", "model"), "cnn"),
    (("options", "script"), "../../etc/passwd"), (("options", "black"), {}), (("code",), {"models/mlp.py": 5}),
    (("state", "model"), []), (("state", "optimizer"), {"state": 5}), (("state",), {5: 5}), (("epoch",), -1),
    (("ranks",), [{"random": 5}]), (("ranks", 0, "meter"), None), (("epoch",), 2), (("batch",), "x"), (("history",), 5),
    (("history",), {"loss": torch.zeros(4)}), (("curve",), [{"loss": 1.0}]), (("seconds",), torch.zeros(2)),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), FOREIGN)
def test_a_checkpoint_with_a_valid_seal_and_foreign_content_is_one_line(whole, tmp_path, place, value):
    checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
    held = checkpoint
    for key in place[:-1]:
        held = held[key]
    held[place[-1]] = value
    save_sealed(checkpoint, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match=r"^run") as caught:
        train("--resume", "run")
    assert "\n" not in str(caught.value)
    if place[0] in ("options", "code", "state") and place[-1] not in ("lr", "epochs", "optimizer"):
        with pytest.raises(UserError, match=r"^run"):
            evaluate.load_model("run")
