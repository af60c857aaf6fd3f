"""What a step does, operation by operation: whether it does the same each time, and what it wrote to."""

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.errors import UserError

ENGINE, TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)
ROOT = Path(ENGINE).parent
LOOP = str(ROOT / "utils.py")
NO_LINE = "a metric of train_step, or its backward pass,"  # in place of the line where the user's code is
COMPARED = 5  # steps in a row: enough to see `if i % 5 == 0`
OVERWRITES = ("zero_", "_foreach_zero_", "fill_", "copy_", "normal_", "uniform_", "bernoulli_", "random_")
MANY = "values"  # prefix of the hash of many values
PLAIN_STATE = ("cpu", "mps")  # devices on which torch's optimizers refuse to be capturable unless they are fused
PLAIN = (bool, int, float, str, type(None))  # with tensors, what a checkpoint may hold
Before = dict[tuple, tuple[torch.Tensor, torch.Tensor]]


class NotCapturable(UserError):
    """The step would be captured wrongly, or cannot be captured at all. The text is the reason."""


class HostReads(TorchFunctionMode):
    """Calls `read()` before a tensor's values become Python's or numpy's, which no operation shows.

    caller: the name of the last function of torch that the step called.
    """

    def __init__(self, read: Callable[[], None]):
        super().__init__()
        self.read, self.caller = read, ""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.caller = getattr(function, "__name__", "")
        if function in (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__):
            self.read()
        return function(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records each operation of a step: its name, its Python numbers, the tensors it reads, and the user's line.

    device: where every tensor must be, None: anywhere. Raises NotCapturable at an operation that a captured step
        cannot repeat.
    inputs: of the step.
    before: gets each tensor and a copy from before it was first written to, by its place in memory.
    left_out: keywords of operations whose values may change.
    """

    def __init__(
        self,
        device: torch.device | None,
        inputs: Sequence[torch.Tensor] = (),
        before: Before | None = None,
        left_out: Sequence[str] = (),
    ):
        super().__init__()
        self.device, self.before, self.left_out = device, before, left_out
        self.operations: list[tuple] = []
        self.lines: list[str] = []  # of each operation
        self.made = {storage_of(tensor): -i for i, tensor in enumerate(inputs)}  # storage -> operation, or input
        self.used: dict[int, str] = {}  # storage that the step found -> the first operation on it
        self.written: dict[int, tuple[torch.Tensor, str]] = {}  # of these, the ones that it wrote to, and the line
        self.generators: dict[int, tuple[torch.Generator, torch.Tensor, str]] = {}  # with its first state, and the line
        self.reads_values = False  # .item() and the like
        self.optimizing = False  # whether the operations are an optimizer's
        self.host_reads = HostReads(self.read_on_host)

    def __enter__(self) -> "Recorder":
        self.host_reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.host_reads.__exit__(*error)

    def read_on_host(self) -> None:
        self.reads_values |= not self.optimizing
        if self.device:
            raise NotCapturable(f"{user_line()} reads values on the host, as .tolist() does; compute with tensors")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        line = user_line()
        inputs = tree_leaves((args, {name: value for name, value in kwargs.items() if name not in self.left_out}))
        if function.__name__ == "lift_fresh.default" and args[0].device.type != "meta":  # torch.tensor(x)
            if self.device and self.device.type == "cuda":
                remedy = "make it before the first step, or with torch.full"
                raise NotCapturable(f"{line} makes a tensor from Python values, as torch.tensor(x) does; {remedy}")
            self.made[storage_of(args[0])] = len(self.operations)
            inputs.append(values_of(args[0]))
        if reason := waits(function, inputs, self.host_reads.caller):
            self.reads_values |= not self.optimizing
            if self.device:
                raise NotCapturable(f"{line} waits for a value on the device, {reason}")
        self.note(function.__name__, inputs, written(function, args, kwargs), line)
        outputs = self.run(function, args, kwargs)
        self.record(str(function), inputs, tensors_of(outputs), line)
        return outputs

    def note(self, name: str, inputs: list[Any], written: list[torch.Tensor], line: str) -> None:
        """Before an operation, note which tensors from outside the step it uses, and which of them it changes."""
        for tensor in tensors_of(inputs):
            if storage_of(tensor) not in self.made:
                self.used.setdefault(storage_of(tensor), name)
        for tensor in written:
            if storage_of(tensor) not in self.made:
                self.written.setdefault(storage_of(tensor), (tensor.detach(), line))
                place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
                if self.before is not None and place not in self.before:
                    self.before[place] = (tensor.detach(), tensor.detach().clone())
        for generator in inputs:
            if isinstance(generator, torch.Generator):
                self.generators.setdefault(address_of(generator), (generator, generator.get_state(), line))

    def record(self, name: str, inputs: list[Any], outputs: list[torch.Tensor], line: str) -> None:
        for tensor in (*tensors_of(inputs), *outputs):
            # Attention keeps the seed of its dropout on the CPU, except while CUDA captures it.
            if self.device and tensor.device.type != self.device.type and "scaled_dot_product" not in name:
                remedy = f"make it with device=images.device, or before the first step and with .to({self.device})"
                raise NotCapturable(f"{line} uses a tensor on the {tensor.device.type} in {name}; {remedy}")
        self.operations.append((name, *map(self.describe, inputs)))
        self.lines.append(line)
        known = {storage_of(tensor) for tensor in tensors_of(inputs)}
        for tensor in outputs:
            if storage_of(tensor) not in known:
                self.made[storage_of(tensor)] = len(self.operations)

    def continued(self) -> dict[int, tuple[torch.Tensor, str]]:
        """What the step wrote to without overwriting it first: its values carry over from the step before."""
        first = {storage: name.partition(".")[0] for storage, name in self.used.items()}
        return {storage: what for storage, what in self.written.items() if first[storage] not in OVERWRITES}

    def run(self, function, args, kwargs):
        return function(*args, **kwargs)

    def describe(self, value: Any) -> Any:
        """A tensor by its shape and its storage, which the step made or found; anything else by its value."""
        if not isinstance(value, torch.Tensor | torch.UntypedStorage):  # cuDNN's GRU passes the storage of its weights
            return repr(value)
        storage = storage_of(value) if isinstance(value, torch.Tensor) else value._cdata
        origin = f"made by operation {self.made[storage]}" if storage in self.made else f"storage {storage}"
        return (*getattr(value, "shape", ()), origin)


def waits(function: Any, inputs: list[Any], caller: str) -> str:
    """The kind of code that makes this operation wait for a value on the device, and the remedy; "" if it does not."""
    name = function.__name__.partition(".")[0]
    if name == "_local_scalar_dense" and caller == "one_hot":
        return "as F.one_hot on a CPU does; compare labels[:, None] == torch.arange(classes)"
    if name == "_local_scalar_dense":
        return (
            "as .item(), print and `if` on a tensor do, and a distribution that is built in the step; return metrics "
            "as tensors, use torch.where, and build distributions before the first step"
        )
    masks = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors_of(inputs[1:]))
    if name == "equal":
        return "as `if` on a comparison does; use torch.where"
    if masks or name in ("nonzero", "masked_select", "_unique2", "bincount"):
        return "as images[mask] does; use torch.where(mask, images, 0), or weight the loss of each image by the mask"
    return ""


def written(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of an operation that it changes in place."""
    arguments = function._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
    changed = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    if named.get("training"):  # batch norm changes these and does not declare it
        changed += ["running_mean", "running_var"]
    return tensors_of([named.get(name) for name in changed])


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def values_of(constant: torch.Tensor) -> Any:
    """A number, or a few; of many, a hash."""
    with torch._C.DisableTorchFunction():
        values = constant.tolist()
    return values if constant.numel() < 5 else f"{MANY} {hash(str(values))}"


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)  # a sparse one has several


def address_of(generator: torch.Generator) -> int:
    """By which it is known: each operation gets another Python object for it."""
    return generator._cdata  # type: ignore[attr-defined]


def difference(recorded: Recorder, other: Recorder) -> str:
    """The first difference between two steps, with the line of the user's code and the remedy; "" if there is none."""
    pairs = itertools.zip_longest(recorded.operations, other.operations, fillvalue=())
    for i, (first, second) in enumerate(pairs):
        if first != second:
            line = (other if second else recorded).lines[i]
            return f"{line} does not do the same in every step{change(first, second)}"
    return ""


def change(first: tuple, second: tuple) -> str:
    """What differs between two operations, and the remedy."""
    if first[:1] != second[:1] or len(first) != len(second):
        remedy = "make what happens every few steps part of each step, or weight it by 0 or 1 with torch.where"
        return f", as after `if i % 5 == 0`; {remedy}"
    a, b = next((a, b) for a, b in zip(first, second) if a != b)
    if isinstance(a, tuple):
        remedy = 'update it in place, as with x.copy_(...), or read optimizer.param_groups[0]["lr"] if it is the rate'
        return f": {first[0]} reads a tensor that was replaced; {remedy}"
    if a.startswith(f"'{MANY}"):
        return f": {first[0]} gets other values from Python or numpy; draw or compute them with torch"
    remedy = 'compute it from state["step"], or keep it in a tensor in `state` that the step updates in place'
    return f": {first[0]} gets the number {a}, then {b}; {remedy}"


def user_line() -> str:
    """Where the user's code is: `file:line` of the innermost frame that is neither torch's nor the engine's."""
    frame = sys._getframe(1).f_back
    while frame:
        file = frame.f_code.co_filename
        if file.endswith(LOOP):
            break
        if not file.startswith((ENGINE, TORCH)):
            path = Path(file)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return NO_LINE  # in backward passes on a GPU, which run in a thread of their own


def is_capturable(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether the optimizer keeps everything that changes from step to step on the device."""
    refuses = device.type in PLAIN_STATE and type(optimizer).__module__.startswith("torch.")  # to be capturable there
    return all(group.get("fused") or ("capturable" in group and not refuses) for group in optimizer.param_groups)


def prepare(optimizer: Optimizer, device: torch.device) -> None:
    """Move what changes in each step onto the device; a learning rate that is read there becomes a tensor."""
    for group in optimizer.param_groups:
        if group.get("fused") or isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            group["lr"] = torch.as_tensor(group["lr"], device=device)  # a tensor of the user's stays the same
        if "capturable" in group:
            group["capturable"] = device.type not in PLAIN_STATE
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)


def keep_rates(groups: list[dict[str, Any]], rates: list[Any]) -> None:
    """If the learning rate of a group was a tensor, which a step may read, and is a number now, fill the tensor."""
    for group, rate in zip(groups, rates):
        if isinstance(rate, torch.Tensor) and not isinstance(group["lr"], torch.Tensor):
            group["lr"] = rate.fill_(group["lr"])


def portable_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state without what `prepare` changed, so that a run saved on a GPU resumes on any device."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:  # copies of the optimizer's own groups
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return state
