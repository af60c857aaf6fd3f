"""Several processes that torchrun started: each computes its shard of every batch, rank 0 prints and saves.

All ranks keep the same weights: each backward pass sums their gradients. A single process needs none of this.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before `join()`: the defaults of its functions keep the group of that time alive

from engine.errors import UserError

PATIENCE = timedelta(days=1)  # while rank 0 reads files or validates; if a process dies, torchrun ends the others


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: torch.device) -> torch.device:
    """Join the process group; returns this rank's device. Raises UserError."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "mps":
        raise UserError("--device mps: there is only one such device; start the script without torchrun")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"--device cuda: more processes than GPUs ({count}); lower --nproc-per-node to {count}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store, number, size = next(dist.rendezvous("env://"))
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":  # after a restart it still holds addresses of dead workers
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    return device


def warn_of_other_tasks() -> None:
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"):
        if not dist.is_torchelastic_launched() and os.environ.get(name, "1") != "1":
            remedy = "for one run in several processes, start one task, with torchrun (docs/gpus.md)"
            print(f"warning: {name}={os.environ[name]}: each task trains a run of its own; {remedy}", file=sys.stderr)


@contextmanager
def collective() -> Iterator[None]:
    """Raise UserError if a collective operation fails within this, as it does when another rank has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own for it
        reason = " ".join(str(error).split())
        raise UserError(
            f"another process of this job has ended; its own message says why, or this: {reason}"
        ) from error


def broadcast(make: Callable[[], Any]) -> Any:
    """What `make()` returns on rank 0, on every rank. The other ranks do not call it."""
    made = [make() if rank() == 0 else None]
    if world_size() > 1:
        with collective():
            dist.broadcast_object_list(made, device=torch.device("cpu"))
    return made[0]


def all_gather(value: Any) -> list[Any]:
    """The `value` of each rank, in order of rank."""
    values = [value] * world_size()
    if world_size() > 1:
        with collective():
            dist.all_gather_object(values, value)
    return values


def rank_0_first(make: Callable[[], Any]) -> Any:
    """Call `make()` on rank 0, then on the others: rank 0 downloads, the others read. Only rank 0 prints its error."""
    made = make() if rank() == 0 else None
    broadcast(lambda: None)  # if rank 0 failed, the others end here
    return made if rank() == 0 else make()


def sync_flags(signals: list[int], due: bool) -> tuple[int, bool]:
    """The same decision on every rank: a signal that any of them received, or 0, and whether any has a save due."""
    flags = torch.tensor([max(signals, default=0), due])
    if world_size() > 1:
        with collective():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
    return tuple(flags.tolist())


def sum_gradients(weights: Iterable[torch.Tensor], fraction: Callable[[], float]) -> None:
    """Have each backward pass end with the gradient of the whole batch's mean loss, the same on every rank.

    fraction: returns the fraction of the batch that this rank computes. Not DistributedDataParallel, which does not
    support `create_graph=True`, which the R1 penalty needs.
    """

    def total(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient * fraction()
        with collective():
            dist.all_reduce(gradient)
        return gradient

    for weight in weights if world_size() > 1 else ():
        if weight.is_floating_point() or weight.is_complex():
            learns = weight.requires_grad  # one that does not may do so later
            weight.requires_grad_().register_hook(total)
            weight.requires_grad_(learns)
