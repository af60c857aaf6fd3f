"""The folder of a run: a new one, and a lock on it."""

import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engine.errors import UserError

# Files left by a run that was killed before its first save.
UNSTARTED = (".lock", "config.json", "config.json.tmp", "checkpoint.pt.tmp")


def new_folder(wanted: str | None, name: str) -> Path:
    """Create the folder `wanted`, or else the next free of runs/`name`, runs/`name`-2, and so on.

    Raises UserError if `wanted` holds anything but the files of a run that ended before its first step.
    """
    if wanted:
        folder = Path(wanted)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output-dir {folder} is a file; name a new folder")
        make_folder(folder)
        if any(path.name not in UNSTARTED for path in folder.iterdir()):
            raise UserError(f"--output-dir {folder} is not empty; name a new folder, or use --resume {folder}")
        return folder
    make_folder(Path("runs"))
    for i in itertools.count(1):
        folder = Path("runs") / (name if i == 1 else f"{name}-{i}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError  # there is always a next number


def make_folder(folder: Path) -> None:
    """Create `folder` and those above it, unless they exist. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link to {os.readlink(folder)}, which is missing; create that") from error
        remedy = "allow writing there, or use another folder"
        raise UserError(f"{folder} cannot be created ({error.strerror}); {remedy}") from error


def lock(folder: Path) -> FileLock:
    """Keep other processes from training in `folder` until the lock is released or this process ends.

    Raises UserError if another process is training there.
    """
    file_lock = FileLock(folder / ".lock")
    try:
        file_lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is training in {folder}; wait for it, or stop it first") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    return file_lock


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; {} if it is missing or damaged."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
