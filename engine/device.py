"""Where to train: the device, its settings, and its random number generators."""

import ctypes
import random
import sys
import timeit
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine import distributed
from engine.errors import UserError


def pick_device(name: str, amp: bool = False) -> torch.device:
    """The device for --device; `auto` takes CUDA, then MPS, then the CPU. Raises UserError.

    Under torchrun, joins the process group and takes the GPU of this process's local rank.
    """
    device = find_device(name)
    torch.set_flush_denormal(True)  # denormal numbers, which long runs produce, slow a CPU down
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # from older versions of numpy
    if sys.platform == "linux":
        keep_freed_memory()
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # of random numbers and graphs too
        torch.set_float32_matmul_precision("high")  # matrix products in TF32, as convolutions are by default
    if dist.is_torchelastic_launched():
        device = distributed.join(device)
    if amp and distributed.rank() == 0 and emulates_bfloat16(device):
        kind = device.type.upper()
        print(f"warning: --amp: this {kind} emulates bfloat16, which is slower than float32; omit --amp")
    return device


def find_device(name: str) -> torch.device:
    """Raises UserError if there is no such device, or if torchrun chooses the GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    device = torch.device(name)
    if not available[device.type]:
        reason = f"this machine or this build of torch has no {device.type} device"
        raise UserError(f"--device {name}: {reason}; use --device auto")
    if device.index is not None and dist.is_torchelastic_launched():
        raise UserError(f"--device {name}: torchrun gives each process a GPU of its own; use --device cuda")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: the last GPU of this machine is cuda:{torch.cuda.device_count() - 1}")
    return device


def emulates_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and seconds_of_product(torch.bfloat16) > 2 * seconds_of_product(torch.float32)


def seconds_of_product(dtype: torch.dtype) -> float:
    """The shortest of five times that one thread of the CPU needs to multiply two matrices."""
    x, threads = torch.ones(128, 128, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, several would wait for one another
    seconds = min(timeit.repeat(lambda: x @ x, number=1, repeat=5))
    torch.set_num_threads(threads)
    return seconds


def keep_freed_memory() -> None:
    """Keep the C library from returning memory after each step only to fault it in again in the next one."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python's `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_generators() -> dict[str, tuple[Callable, Callable]]:
    """How to read and how to set the state of each random number generator that a step may use, by name."""
    generators: dict[str, tuple[Callable, Callable]] = {
        "cpu": (torch.get_rng_state, torch.set_rng_state),
        "numpy": (lambda: [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()],
                  np.random.set_state),
        "python": (random.getstate, random.setstate),
    }  # fmt: skip
    if torch.cuda.is_initialized():  # not if this run is on the CPU because the GPU is taken
        generators["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    if torch.backends.mps.is_available():
        generators["mps"] = (torch.mps.get_rng_state, torch.mps.set_rng_state)
    return generators


def random_state() -> dict[str, Any]:
    return {name: read() for name, (read, _) in random_generators().items()}


def set_random_state(state: dict[str, Any], fresh_seed: int) -> None:
    """Continue from `state`. A generator it lacks, as after a change of device, starts from `fresh_seed`."""
    seed_all(fresh_seed)
    for name, (_, write) in random_generators().items():
        if name in state:
            write(state[name])
