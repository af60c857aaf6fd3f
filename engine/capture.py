"""The step as a CUDA graph: captured once, then replayed with one launch instead of hundreds.

A graph is a frozen step. It repeats the operations of the step that was captured, on the same tensors and with the same
Python numbers. Whatever Python would have decided differently in a later step is lost, so the first steps run eagerly
and are compared, operation by operation: if they differ, the step is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.errors import UserError

COMPARED = 5  # steps in a row: enough to see `if i % 5 == 0`
WARM_UP = COMPARED + 1  # the first step differs from all others: it allocates the optimizer's state


class NotCapturable(UserError):
    """A graph would freeze the step wrongly, or cannot be captured at all. reason: what the step does."""

    def __init__(self, reason: str):
        super().__init__(f"train_step cannot be a CUDA graph: {reason}; add --no-cuda-graph to run it eagerly")


class Recorder(TorchDispatchMode):
    """Records each operation of a step: its name, its Python numbers, and the tensors it reads.

    device: where every tensor must be. Raises NotCapturable at an operation that a graph cannot repeat.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.operations: list[tuple] = []
        self.made: dict[int, int] = {}  # storage -> its number among those that the step made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        inputs = tree_leaves((args, kwargs))
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise NotCapturable(f"it waits for a value on the device ({function}, as .item() or a boolean mask does)")
        outputs = self.run(function, args, kwargs)
        for value in (*inputs, *tree_leaves(outputs)):
            if isinstance(value, torch.Tensor) and value.device.type != self.device.type:
                raise NotCapturable(f"{function} uses a tensor on the {value.device.type}")
        self.operations.append((str(function), *map(self.describe, inputs)))
        known = {storage_of(tensor) for tensor in inputs if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in known:
                self.made[storage_of(tensor)] = len(self.operations)
        return outputs

    def run(self, function, args, kwargs):
        return function(*args, **kwargs)

    def describe(self, value: Any) -> Any:
        """A tensor by its shape and its storage, which the step made or found; anything else by its value."""
        if not isinstance(value, torch.Tensor):
            return repr(value)
        storage = storage_of(value)
        return (
            (*value.shape, "made by operation", self.made[storage]) if storage in self.made else (*value.shape, storage)
        )


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def require_same(recorded: Recorder, other: Recorder) -> None:
    """Raise NotCapturable if two steps are not the same operations on the same tensors."""
    if len(recorded.operations) != len(other.operations):
        counts = f"{len(recorded.operations)} and {len(other.operations)} operations"
        raise NotCapturable(f"it is not the same in every step ({counts}), as after `if i % 5 == 0`")
    for first, second in zip(recorded.operations, other.operations):
        if first != second:
            a, b = (
                next((a, b) for a, b in zip(first, second) if a != b) if len(first) == len(second) else (first, second)
            )
            raise NotCapturable(f"it is not the same in every step ({first[0]}: {a}, then {b})")


def is_capturable(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps everything that changes from step to step on the device."""
    return all("capturable" in group or group.get("fused") for group in optimizer.param_groups)


def prepare(optimizer: Optimizer, device: torch.device) -> None:
    """Move what the optimizer changes in each step onto the device.

    Where the optimizer reads its learning rate there, it becomes a tensor that a schedule can change.
    """
    for group in optimizer.param_groups:
        if group.get("fused") or isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            group["lr"] = torch.as_tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True
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


class GraphedStep:
    """`step(*tensors)` as a CUDA graph. Returns what `step` returned when it was captured.

    The first WARM_UP calls run eagerly and are compared. When a frozen setting of an optimizer changes, such as a
    momentum once per epoch, this starts again; if one changes in every step, all steps run eagerly. So does a short
    last batch. A replay draws new random numbers. Raises NotCapturable.
    """

    def __init__(self, step: Callable, optimizers: Sequence[Optimizer], batch_size: int, device: torch.device):
        self.step, self.optimizers, self.batch_size, self.device = step, optimizers, batch_size, device
        self.calls, self.graph, self.inputs, self.result, self.eager = 0, None, None, None, False
        for optimizer in optimizers:
            prepare(optimizer, device)
        self.settings = self.frozen_settings()

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.eager or len(inputs[0]) != self.batch_size:
            return self.step(*inputs)
        if self.frozen_settings() != self.settings:
            if 0 < self.calls <= WARM_UP:
                print("no CUDA graph: a setting of the optimizer changes too often; every step runs eagerly")
                self.eager = True
                return self.step(*inputs)
            self.calls, self.graph, self.settings = 0, None, self.frozen_settings()
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        if self.calls < WARM_UP:
            self.result = self.warm_up()
        elif self.graph is None:
            self.capture()
        self.calls += 1
        if self.graph:
            self.graph.replay()
        return self.result

    def warm_up(self) -> Any:
        """An eager step, on a stream of its own as capture requires. All but the first are compared."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self.calls == 0:
                result = self.step(*self.inputs)
            else:
                recorder = Recorder(self.device)
                with recorder:
                    result = self.step(*self.inputs)
                if self.calls == 1:
                    self.recorded = recorder
                require_same(self.recorded, recorder)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = self.step(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # raised when capture ends; what broke it is the error before
            raise NotCapturable(str(error.__context__ or error).splitlines()[0]) from error
        if result != self.result:
            raise NotCapturable(f"it returned {result} after {self.result}")
        self.graph = graph

    def frozen_settings(self) -> list[dict[str, Any]]:
        """The settings of the optimizers that a graph keeps as they were when it was captured."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [
            {name: value for name, value in group.items() if name != "params" and not isinstance(value, torch.Tensor)}
            for group in groups
        ]
