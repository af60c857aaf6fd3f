"""The captured step: replayed without Python, as compiled code, as a CUDA graph, or both.

It repeats the operations of the step that was recorded, on the same tensors and with the same Python numbers. A warm-up
check therefore comes first: the step runs several times, and is refused if its operations differ. Then everything that
these warm-up steps wrote is rolled back.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from engine.device import random_state, set_random_state
from engine.distributed import world_size
from engine.errors import UserError
from engine.recorder import Before, NotCapturable, Recorder, is_capturable, prepare, require_same

if TYPE_CHECKING:
    from engine.run import Run

COMPARED = 5  # steps in a row: enough to see `if i % 5 == 0`


def capture(step: Callable, run: "Run") -> Callable:
    """`step`, which takes tensors, as a captured step if `run` asks for one and it can be; otherwise `step` itself."""
    args, device, optimizers = run.args, run.device(), run.optimizers()
    graph = device.type == "cuda" and args.cuda_graph
    if not (args.compile or graph):
        return step
    if world_size() > 1:
        print("every step runs eagerly: there are several processes")
        return step
    for optimizer in optimizers:
        if not is_capturable(optimizer):
            print(f"every step runs eagerly: {type(optimizer).__name__} keeps its state on the CPU")
            return step
    return CapturedStep(step, optimizers, args.batch_size, device, compiled=args.compile, graph=graph, begun=run.begun)


class CapturedStep:
    """`step(*tensors)`, captured.

    compiled: by Inductor (--compile). graph: as a CUDA graph, of the compiled step if there is one.
    begun: whether the run has made a step. If not, the first one runs eagerly: it allocates the optimizer's state.

    A short last batch runs eagerly. When a setting of an optimizer changes that the recording holds, the step is
    captured again; if one keeps changing within a few steps, all steps run eagerly. Raises UserError if the step
    cannot be captured.
    """

    def __init__(
        self, step: Callable, optimizers: Sequence[Optimizer], batch_size: int, device: torch.device, *,
        compiled: bool, graph: bool, begun: bool,
    ):  # fmt: skip
        self.step, self.optimizers, self.batch_size, self.device = step, optimizers, batch_size, device
        self.compiled, self.graph, self.begun, self.eager = compiled, graph, begun, False
        self.captured: Callable | None = None
        self.settings: list[Any] | None = None  # of the optimizers, as recorded
        self.calls = 0  # of the captured step
        self.short_lived = 0  # how many captured steps in a row were replayed only a few times
        self.momenta = [torch.zeros((), device=device) for _ in self.groups()]
        for optimizer in optimizers:
            prepare(optimizer, device)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.eager or not self.begun or len(inputs[0]) != self.batch_size:
            self.begun = True
            return self.step(*inputs)
        if self.settings != (settings := self.recorded_settings()):
            self.short_lived = self.short_lived + 1 if self.settings and self.calls <= COMPARED else 0
            if self.short_lived == 2:  # the first may belong to a run that was resumed just before a change
                print("every step runs eagerly: a setting of the optimizer changes too often", flush=True)
                self.eager = True
                return self.step(*inputs)
            self.settings, self.calls, self.captured = settings, 0, None
        if self.captured is None:
            self.captured = self.capture(inputs)
        self.calls += 1
        return self.captured(*inputs)

    def capture(self, inputs: Sequence[torch.Tensor]) -> Callable:
        """Check the step, capture it, and roll back what that changed."""
        self.inputs = [tensor.clone() for tensor in inputs]  # a graph reads these very tensors
        random, before = random_state(), Before()
        recorders = [Recorder(self.device, before) for _ in range(COMPARED)]
        try:
            with side_stream() if self.graph else nullcontext():
                for recorder in recorders:  # the warm-up check
                    with recorder:
                        self.step(*self.inputs)
                    require_same(recorders[0], recorder)
                function = self.compile() if self.compiled else self.step
        except NotCapturable as error:
            raise UserError(self.refusal(error)) from error
        finally:
            for tensor, copy in reversed(before.values()):
                tensor.copy_(copy)
            set_random_state(random, fresh_seed=0)
        return self.record_graph(function) if self.graph else function

    def compile(self) -> Callable:
        from engine.compiler import compile_step  # imports torch's compiler, which takes a second

        print("compiling the training step", flush=True)
        started = time.monotonic()
        pairs = zip(self.groups(), self.momenta)
        momenta = {parameter.data_ptr(): momentum for group, momentum in pairs for parameter in group["params"]}
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        counts = {state["step"].data_ptr(): state["step"].item() for state in states if "step" in state}
        try:
            function = compile_step(self.step, self.inputs, momenta, counts)
            function(*self.inputs)
        except Exception as error:  # no compiler, no Triton, an operation that Inductor lacks, another torch
            print(f"not compiled: {reason_of(error)}", flush=True)
            self.compiled, self.eager = False, not self.graph
            self.settings = self.recorded_settings()  # now with the momentum
            return self.step
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
        return function

    def record_graph(self, function: Callable) -> Callable:
        graph, random = torch.cuda.CUDAGraph(), random_state()
        try:
            with torch.cuda.graph(graph):
                function(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # raised when the recording ends; its cause is the error before
            replace_generator(self.device, random)
            raise UserError(self.refusal(str(error.__context__ or error).splitlines()[0])) from error

        def replay(*inputs: torch.Tensor) -> None:
            for own, given in zip(self.inputs, inputs):
                own.copy_(given)
            graph.replay()

        return replay

    def refusal(self, reason: object) -> str:
        if not self.compiled:
            return f"train_step cannot be a CUDA graph: {reason}; add --no-cuda-graph to run it eagerly"
        flags = "omit --compile and add --no-cuda-graph" if self.graph else "omit --compile"
        return f"train_step cannot be compiled: {reason}; {flags} to run it eagerly"

    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def recorded_settings(self) -> list[Any]:
        """The settings of the optimizers that the captured step holds as numbers.

        A compiled step reads SGD's momentum from a tensor, which this keeps up to date.
        """
        settings = []
        for group, momentum in zip(self.groups(), self.momenta):
            for name, value in group.items():
                if name == "momentum" and self.compiled:
                    momentum.fill_(value)
                    settings.append(bool(value))  # without momentum, SGD keeps no average
                elif name != "params" and not isinstance(value, torch.Tensor):
                    settings.append(value)
        return settings


def reason_of(error: Exception) -> str:
    """The C++ compiler's own message, if there is one; otherwise the first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if " error: " in line), lines[0])


def replace_generator(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Make CUDA's generator usable again, in `state`: after a capture that failed, torch believes it still records."""
    fresh = torch.Generator(device)
    fresh.set_state(state["cuda"])
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)


@contextmanager
def side_stream() -> Iterator[None]:
    """A stream of its own for what comes before a capture, as CUDA requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
