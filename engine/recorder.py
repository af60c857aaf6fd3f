"""What a step does, operation by operation: whether it does the same each time, and what it wrote to."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.errors import UserError

Before = dict[tuple, tuple[torch.Tensor, torch.Tensor]]


class NotCapturable(UserError):
    """The step would be captured wrongly, or cannot be captured at all. The text is the reason."""


class Recorder(TorchDispatchMode):
    """Records each operation of a step: its name, its Python numbers, and the tensors it reads.

    device: where every tensor must be. Raises NotCapturable at an operation that a captured step cannot repeat.
    before: gets each tensor and a copy from before it was first written to, by its place in memory.
    """

    def __init__(self, device: torch.device, before: Before | None = None):
        super().__init__()
        self.device, self.before = device, {} if before is None else before
        self.operations: list[tuple] = []
        self.made: dict[int, int] = {}  # storage -> its number among those that the step made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise NotCapturable(f"it waits for a value on the device ({function}, as .item() or a boolean mask does)")
        for tensor in written(function, args, kwargs):
            place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if storage_of(tensor) not in self.made and place not in self.before:
                self.before[place] = (tensor.detach(), tensor.detach().clone())
        outputs = self.run(function, args, kwargs)
        self.record(str(function), tree_leaves((args, kwargs)), tensors_of(outputs))
        return outputs

    def record(self, name: str, inputs: list[Any], outputs: list[torch.Tensor]) -> None:
        for tensor in (*tensors_of(inputs), *outputs):
            if tensor.device.type != self.device.type:
                raise NotCapturable(f"{name} uses a tensor on the {tensor.device.type}")
        self.operations.append((name, *map(self.describe, inputs)))
        known = {storage_of(tensor) for tensor in tensors_of(inputs)}
        for tensor in outputs:
            if storage_of(tensor) not in known:
                self.made[storage_of(tensor)] = len(self.operations)

    def run(self, function, args, kwargs):
        return function(*args, **kwargs)

    def describe(self, value: Any) -> Any:
        """A tensor by its shape and its storage, which the step made or found; anything else by its value."""
        if not isinstance(value, torch.Tensor):
            return repr(value)
        storage = storage_of(value)
        origin = f"made by operation {self.made[storage]}" if storage in self.made else f"storage {storage}"
        return (*value.shape, origin)


def written(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of an operation that it changes in place."""
    values = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(function._schema.arguments)
        if (argument.alias_info and argument.alias_info.is_write)
        or argument.name in ("running_mean", "running_var")  # batch norm changes them and does not declare it
    ]
    return tensors_of(values)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def require_same(recorded: Recorder, other: Recorder) -> None:
    """Raise NotCapturable if two steps are not the same operations on the same tensors."""
    if len(recorded.operations) != len(other.operations):
        counts = f"{len(recorded.operations)} and {len(other.operations)} operations"
        raise NotCapturable(f"it is not the same in every step ({counts}), as after `if i % 5 == 0`")
    for first, second in zip(recorded.operations, other.operations):
        if first != second:
            a, b = next(((a, b) for a, b in zip(first, second) if a != b), (first, second))
            raise NotCapturable(f"it is not the same in every step ({first[0]}: {a}, then {b})")


def is_capturable(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps everything that changes from step to step on the device."""
    return all("capturable" in group or group.get("fused") for group in optimizer.param_groups)


def prepare(optimizer: Optimizer, device: torch.device) -> None:
    """Move what changes in each step onto the device; a learning rate that is read there becomes a tensor."""
    for group in optimizer.param_groups:
        if group.get("fused") or isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            group["lr"] = torch.as_tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = device.type != "cpu"  # which torch refuses on the CPU, where it is not needed
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)


def portable_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state without what `prepare` changed, so that a run saved on a GPU resumes on any device."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:  # copies of the optimizer's own groups
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return state
