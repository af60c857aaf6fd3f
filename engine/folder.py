"""The folder of a run: a new one, and a lock on it."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engine.distributed import broadcast, rank
from engine.errors import UserError

# Files left by a run that was killed before its first save.
UNSTARTED = (".lock", "config.json", "config.json.tmp", "checkpoint.pt.tmp")


def new_folder(wanted: str | None, name: str) -> Path:
    """Create the folder `wanted`, or else the next free of runs/`name`, runs/`name`-2, and so on. Raises UserError."""
    if wanted:
        folder = Path(wanted)
        make_folder(folder)
        if any(path.name not in UNSTARTED for path in folder.iterdir()):
            raise UserError(f"--output-dir {folder} is not empty; name a new folder, or use --resume {folder}")
        return folder
    make_folder(Path("runs"))
    folder, number = Path("runs") / name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder, number = Path("runs") / f"{name}-{number + 1}", number + 1


def make_folder(folder: Path) -> None:
    """Create `folder` and those above it, unless they exist. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "allow writing there, or use another folder"
        raise UserError(f"{folder} cannot be created ({error.strerror}); {remedy}") from error


def lock(folder: Path) -> FileLock:
    """The lock of `folder`, which rank 0 holds until it is released. Raises UserError if another run holds it."""
    file_lock = FileLock(folder / ".lock")
    try:
        if rank() == 0:
            file_lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is training in {folder}; wait for it, or stop it first") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    broadcast(lambda: None)  # if rank 0 failed, the others end here
    return file_lock


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; {} if it is missing or damaged."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
