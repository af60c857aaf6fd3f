"""The folder of a run: a new one, and a lock on it."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engine.checkpoint import TEMPORARY, has_checkpoint
from engine.distributed import broadcast, rank
from engine.errors import UserError, shell


def new_folder(wanted: str | None, name: str) -> Path:
    """Create the folder `wanted`, or else the next free of runs/`name`, runs/`name`-2, and so on. Raises UserError."""
    if wanted:
        folder = Path(wanted)
        make_folder(folder)
        if not all(map(is_unstarted, folder.iterdir())):
            remedy = f", or use {shell('--resume', folder)}" if has_checkpoint(folder) else ""
            raise UserError(f"--output-dir {folder} is not empty; name a new folder{remedy}")
        return folder
    make_folder(Path("runs"))
    folder, number = Path("runs") / name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder, number = Path("runs") / f"{name}-{number + 1}", number + 1
        except OSError as error:
            remedy = "allow writing there, or name another folder with --output-dir"
            raise UserError(f"{folder} cannot be created ({error.strerror}); {remedy}") from error


def is_unstarted(path: Path) -> bool:
    """Whether a run that was killed before its first save left this file."""
    if path.name == "config.json":
        return bool(read_config(path.parent))
    if path.name == ".lock":
        return path.lstat().st_size == 0
    return path.match(TEMPORARY)


def make_folder(folder: Path) -> None:
    """Create `folder` and those above it, unless they exist. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason, remedy = error.strerror, "allow writing there"
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                reason, remedy = f"{path} is a link to {os.readlink(path)}, which is missing", "create that"
            elif path.is_file():
                reason, remedy = f"{path} is a file", "rename that"
        raise UserError(f"{folder} cannot be created ({reason}); {remedy}, or use another folder") from error


class HardLock(FileLock):
    """A lock that ends with its process. Without flock(), filelock would use a file, which survives a kill."""

    def _fallback_to_soft_lock(self) -> None:
        raise NotImplementedError


def lock(folder: Path) -> FileLock:
    """The lock of `folder`, which rank 0 holds until it is released. Raises UserError if another run holds it."""
    file_lock = HardLock(folder / ".lock")
    try:
        if rank() == 0:
            file_lock.acquire(blocking=False)
            for path in (*folder.glob(TEMPORARY), *folder.glob(f"samples/{TEMPORARY}")):  # of a run that was killed
                path.unlink()
    except Timeout as error:
        raise UserError(f"another process is training in {folder}; wait for it, or stop it first") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    broadcast(lambda: None)  # if rank 0 failed, the others end here
    return file_lock


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; {} if it is missing, or not what a run writes."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"options": dict, "device": str, "commit": str | None}
    good = isinstance(config, dict) and all(isinstance(config.get(key), kind) for key, kind in kinds.items())
    return config if good else {}
