"""Where a run comes from: code, versions and machine."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from engine.distributed import rank, world_size
from engine.errors import UserError, shell

ROOT = Path(__file__).resolve().parent.parent


def code_fingerprint(script: str) -> dict[str, str]:
    """SHA-256 of the files that decide what a run's weights mean: those of models/, and the script."""
    files = [*sorted((ROOT / "models").glob("[!.]*.py")), ROOT / script]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files if path.is_file()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def warn_if_code_changed(checkpoint: dict[str, Any], path: str | Path) -> bool:
    """Whether files differ from those that made the checkpoint; a warning names them. New files do not count."""
    before, now = checkpoint["code"], code_fingerprint(checkpoint["options"].get("script", ""))
    changed = [name for name in before if before[name] != now.get(name)]
    if changed and rank() == 0:
        print(f"warning: {', '.join(changed)} changed since {path} was saved; its results may differ", file=sys.stderr)
    return bool(changed)


def pinned(path: Path, sha256: str) -> bytes:
    """The content of a file of weights/ that the code relies on. Raises UserError if it is missing or another one."""
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        remedy = shell("git", "-C", ROOT, "checkout", path)
        raise UserError(f"{path} is missing, or not the file of this repository; restore it: {remedy}")
    return content


def environment() -> dict[str, Any]:
    """Versions, hardware and git commit."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain=v2", "--branch", "--", "*.py"]
    try:
        lines = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
        changed = any(not line.startswith("#") for line in lines)
        commit = lines[0].removeprefix("# branch.oid ") + "-dirty" * changed
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "processes": world_size(), "commit": commit,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }  # fmt: skip


def processor() -> str:
    """Its name, and its vector instructions, which the name of a virtual machine's processor does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
