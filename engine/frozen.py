"""The frozen step: repeated without Python, as compiled code, as a CUDA graph, or both.

It repeats the operations of the step that was recorded, on the same tensors and with the same Python numbers. Whatever
Python would have decided differently in a later step is lost. The step is therefore rehearsed first: it runs several
times and is compared, operation by operation; if it differs, it is refused. Then what the rehearsal wrote is undone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from engine.capture import NotCapturable, Recorder, Undo, prepare, require_same
from engine.compiler import compile_step
from engine.device import random_state, set_random_state
from engine.errors import UserError

COMPARED = 5  # steps in a row: enough to see `if i % 5 == 0`


class FrozenStep:
    """`step(*tensors)`, frozen. Returns what `step` returned when it was recorded.

    compiled: by Inductor (--compile). graph: as a CUDA graph, of the compiled step if there is one.
    begun: whether the run has made a step. If not, the first one runs eagerly, because it allocates the optimizer's
        state. Whatever is frozen later, a resumed run therefore repeats the very steps of one that was not stopped.

    A short last batch runs eagerly. When a frozen setting of an optimizer changes, the step is frozen again; if one
    keeps changing within a few steps, all steps run eagerly. Random numbers are new in every step. Raises UserError.
    """

    def __init__(
        self,
        step: Callable,
        optimizers: Sequence[Optimizer],
        batch_size: int,
        device: torch.device,
        compiled: bool,
        graph: bool,
        begun: bool,
    ):
        self.step, self.optimizers, self.batch_size, self.device = step, optimizers, batch_size, device
        self.compiled, self.graph, self.begun = compiled, graph, begun
        self.frozen, self.result, self.settings, self.calls, self.eager = None, None, None, 0, False
        self.short_lived = 0  # how many frozen steps in a row have been repeated only a few times
        self.momenta = [torch.zeros((), device=device) for optimizer in optimizers for _ in optimizer.param_groups]
        for optimizer in optimizers:
            prepare(optimizer, device)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.eager or not self.begun or len(inputs[0]) != self.batch_size:
            self.begun = True
            return self.step(*inputs)
        if self.settings != (settings := self.frozen_settings()):
            self.short_lived = self.short_lived + 1 if self.settings and self.calls <= COMPARED else 0
            if self.short_lived == 2:  # the first may belong to a run that was resumed just before a change
                print("every step runs eagerly: a setting of the optimizer changes too often", flush=True)
                self.eager = True
                return self.step(*inputs)
            self.settings, self.calls, self.frozen = settings, 0, None
        if self.frozen is None:
            self.freeze(inputs)
        self.calls += 1
        self.frozen(*inputs)
        return self.result

    def freeze(self, inputs: Sequence[torch.Tensor]) -> None:
        """Rehearse the step, freeze it, and restore what that changed."""
        self.inputs = [tensor.clone() for tensor in inputs]  # a graph reads these very tensors
        random, undo = random_state(), Undo()
        try:
            with side_stream(self.graph):
                self.rehearse(undo)
                function = self.compile() if self.compiled else self.step
        except NotCapturable as error:
            raise UserError(self.refusal(error)) from error
        finally:
            undo()
            set_random_state(random, fresh_seed=0)
        self.frozen = self.capture(function) if self.graph else function

    def rehearse(self, undo: Undo) -> None:
        """Run the step several times, and raise NotCapturable if they differ."""
        recorders = []
        for _ in range(COMPARED):
            with Recorder(self.device, undo) as recorder:
                self.result = self.step(*self.inputs)
            recorders.append(recorder)
            require_same(recorders[0], recorder)

    def compile(self) -> Callable:
        print("compiling the training step", flush=True)
        started = time.monotonic()
        momenta = {
            parameter.data_ptr(): momentum
            for group, momentum in zip(self.groups(), self.momenta)
            for parameter in group["params"]
        }
        try:
            function = compile_step(self.step, self.inputs, momenta)
            function(*self.inputs)
        except Exception as error:  # no compiler, no Triton, an operation that Inductor lacks, another torch
            lines = str(error).splitlines() or [type(error).__name__]
            reason = next((line for line in lines if " error: " in line), lines[0])  # a compiler's own words
            print(f"not compiled: {reason}", flush=True)
            self.compiled, self.eager = False, not self.graph
            self.settings = self.frozen_settings()  # now with the momentum
            return self.step
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
        return function

    def capture(self, function: Callable) -> Callable:
        graph, random = torch.cuda.CUDAGraph(), random_state()
        try:
            with torch.cuda.graph(graph):
                result = function(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # raised when capture ends; what broke it is the error before
            replace_generator(self.device, random)
            raise UserError(self.refusal(str(error.__context__ or error).splitlines()[0])) from error
        if not self.compiled and result != self.result:
            raise UserError(self.refusal(f"it returned {result} after {self.result}"))

        def replay(*inputs):
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

    def frozen_settings(self) -> list[Any]:
        """The settings of the optimizers that stay as they were when the step was frozen.

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


def replace_generator(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Make CUDA's generator usable again, in `state`: after a capture that failed, torch believes it still records."""
    fresh = torch.Generator(device)
    fresh.set_state(state["cuda"])
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)


@contextmanager
def side_stream(needed: bool) -> Iterator[None]:
    """A stream of its own for what comes before a capture, as CUDA requires."""
    if not needed:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
