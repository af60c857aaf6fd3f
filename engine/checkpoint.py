"""Files that are whole or absent, and checkpoints in which every changed byte is detected.

A checkpoint is what torch.save writes, a zip archive, with the SHA-256 of everything before as the archive's comment.
torch.load reads it as it is. It holds tensors and plain values; loading executes nothing.
"""

import hashlib
import io
import os
import secrets
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from engine.distributed import rank
from engine.errors import UserError
from engine.provenance import ROOT

TEMPORARY = f"*.{'[0-9a-f]' * 8}.tmp"  # pattern of the names of files that are being written
DIGEST_SIZE = hashlib.sha256().digest_size
POSITION = ("epoch", "batch")  # where the training is: attributes of engine.run.Run
TABLES = ("history", "curve")  # likewise
NETWORK = {"options", "code", "state", "epoch"}  # what a network is built from: all that a file of weights/ must hold
KEYS = {*NETWORK, "types", "ranks", "seconds", *POSITION, *TABLES}  # what resuming needs


def seal(checkpoint: dict[str, Any]) -> bytes:
    """What torch.save writes, a zip archive without a comment, with its SHA-256 as comment."""
    archive = io.BytesIO()
    torch.save(checkpoint, archive)
    body = archive.getvalue()[:-2] + struct.pack("<H", DIGEST_SIZE)
    return body + hashlib.sha256(body).digest()


def is_sealed(content: bytes) -> bool:
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def write_atomically(path: Path, content: bytes) -> None:
    """On rank 0, write `content` to `path` whole. A valid checkpoint.pt becomes previous.pt first. Raises UserError."""
    if rank() > 0:
        return
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # another process may write the same file
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the name points to it
            if path.name == "checkpoint.pt" and path.exists() and is_sealed(path.read_bytes()):
                os.replace(path, path.with_name("previous.pt"))
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # which would replace the message
            temporary.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Append `content` to the file. Raises UserError."""
    with writing(path), open(path, "ab") as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free space there, allow writing, or use another name; everything saved before is unchanged"
        raise UserError(f"{path} could not be written ({error.strerror}); {remedy}") from error


def has_checkpoint(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in ("checkpoint.pt", "previous.pt"))


def load_checkpoint(path: str | Path, warn: bool = True) -> dict[str, Any]:
    """Read one checkpoint file, or a run folder's checkpoint.pt or else previous.pt, onto the CPU. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        return read_checkpoint(path, NETWORK)
    try:
        return read_checkpoint(path / "checkpoint.pt")
    except UserError as error:
        if not (path / "previous.pt").is_file():
            raise
        if warn:
            reason = str(error).rpartition("; ")[0]
            print(f"warning: {reason}; using {path / 'previous.pt'}", file=sys.stderr)
        return read_checkpoint(path / "previous.pt")


def load_result(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a run's result: that of best.pt, if there is one, with the EMA in place of its network.

    path: of a run or a file; a file of weights/ is found from any working directory. Raises UserError.
    """
    path = path if Path(path).exists() or not (ROOT / path).is_file() else ROOT / path
    best = Path(path) / "best.pt"
    checkpoint = load_checkpoint(best if best.is_file() else path)
    state = checkpoint["state"]
    if "ema" in state:
        state["model" if "model" in state else "generator"] = state["ema"]["model"]
    return checkpoint


def read_checkpoint(path: Path, keys: set[str] = KEYS) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: this is not a run, or nothing was saved yet; name another run")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); allow reading it, or copy the run") from error
    if not is_sealed(content):
        raise UserError(
            f"{path} is damaged or not a checkpoint of this repository (its SHA-256 does not match); name another run"
        )
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        upgrade(checkpoint)
        require(checkpoint, keys)
    except Exception as error:  # of many kinds
        raise UserError(f"{path} is not a checkpoint of this version of the repository; train again") from error
    return checkpoint


def require(checkpoint: dict[str, Any], keys: set[str]) -> None:
    """Fail if a key is missing, a value that the network is built from has the wrong type, or `script` is elsewhere."""
    options, code, state = (checkpoint[key] for key in ("options", "code", "state"))
    script, *others = (options.get(key, "") for key in ("script", "kind", "dataset", "data_dir"))
    classes: Any = options.get("classes", [])
    "".join([script, *others, *classes, *options.keys(), *code.keys(), *code.values(), *state.keys()])
    if "ema" in state:
        state["ema"]["model"].keys()
    good = isinstance(classes, list) and checkpoint["epoch"] >= 0 and options.get("black", 0) <= 0
    if not good or Path(script).is_absolute() or ".." in Path(script).parts or keys - checkpoint.keys():
        raise ValueError


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Bring a checkpoint of version 1 to the names of version 2, in place."""
    options = checkpoint["options"]
    if "kind" in options or "script" not in options or "types" in checkpoint:
        return
    options["kind"] = options["script"].removeprefix("train_").removesuffix(".py")
    options.setdefault("classes", list("0123456789"))
    if "generator_loss" in options:
        relativistic = options.get("adversarial_loss") == "relativistic"
        options["loss"] = "relativistic" if relativistic else options["generator_loss"]
    if "mismatched" in options:
        options["wrong_label"] = options["mismatched"]
    checkpoint["types"] = checkpoint.pop("classes", {})
    for rank_state in checkpoint.get("ranks", []):
        sums, counts = rank_state["meter"]["sums"], rank_state["meter"]["counts"]
        totals = {name: (value, counts.get(name, 0)) for name, value in sums.items()}
        rank_state["meter"] = {"since_report": totals, "epoch": {}}
