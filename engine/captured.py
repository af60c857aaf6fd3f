"""The captured step: replayed without Python, as compiled code, as a CUDA graph, or both.

It repeats the operations of the step that was recorded, on the same tensors and with the same Python numbers. A warm-up
check therefore comes first: the step runs several times, and is refused if its operations differ. Then everything that
these warm-up steps wrote is rolled back. The first step of each epoch runs eagerly and is compared with the recording:
if it has changed, the step is captured again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine import products
from engine.device import random_state, set_random_state
from engine.distributed import world_size
from engine.errors import AT_ONCE, UserError
from engine.recorder import COMPARED, Before, NotCapturable, Recorder, difference, is_capturable, keep_rates, prepare
from engine.run import Run
from engine.state import plain_values, unsaved
from engine.threads import tuned
from engine.watched import WARNING, settings_of, watched


def capture(step: Callable, run: Run, batch_size: int) -> Callable:
    """`step`, which takes tensors, as a captured step if `run` asks for one and its optimizers allow it; else eager.

    On a CPU, the first steps choose the number of threads.
    """
    return tuned(step, lambda: captured_or_watched(step, run, batch_size), run, batch_size)


def captured_or_watched(step: Callable, run: Run, batch_size: int) -> Callable:
    device = run.device()
    graph = device.type == "cuda" and run.args.cuda_graph
    if run.args.compile or graph:
        if not (reason := why_eager(run.optimizers(), device)):
            return CapturedStep(step, run, batch_size, compiled=run.args.compile, graph=graph)
        print(f"every step runs eagerly: {reason}")
    step = products.with_products(step, run)
    return step if world_size() > 1 else watched(step, run)


def why_eager(optimizers: list[Optimizer], device: torch.device) -> str:
    if world_size() > 1:
        return "there are several processes"
    for optimizer in optimizers:
        if not is_capturable(optimizer, device):
            name, remedy = type(optimizer).__name__, "fused=True" if "fused" in optimizer.defaults else "another one"
            return f"{name} takes its settings as Python numbers; use {remedy}"
    return ""


class CapturedStep:
    """`step(*tensors)`, captured.

    compiled: by Inductor (--compile). graph: as a CUDA graph, of the compiled step if there is one.

    The first step of a new run, which allocates the optimizer's state, and a short last batch run eagerly. When an
    optimizer setting that the recording holds changes, the step is captured again; if one keeps changing within a few
    steps, all steps run eagerly. Raises UserError if the step cannot be captured.
    """

    def __init__(self, step: Callable, run: Run, batch_size: int, *, compiled: bool, graph: bool):
        self.step, self.run, self.batch_size, self.device = step, run, batch_size, run.device()
        self.compiled, self.graph, self.eager = compiled, graph, False
        self.left_out = ("momentum",) if compiled else ()  # of operations: what a compiled step reads from a tensor
        self.captured: Callable | None = None
        self.recorded: Recorder | None = None  # the step as it was captured
        self.settings: list[tuple[str, Any]] | None = None  # of the optimizers, as recorded
        self.warning = ""  # the last one
        self.calls = 0  # of the captured step
        self.short_lived = 0  # how many captured steps in a row were replayed only a few times
        self.rates: list[Any] = []  # learning rates
        self.prepare()
        self.momenta = [torch.zeros((), device=self.device) for _ in self.groups()]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.eager or not self.run.begun or len(inputs[0]) != self.batch_size:
            self.run.begun = True
            return self.step(*inputs)
        is_first = self.run.batch == 0  # of the epoch
        if is_first:
            self.prepare()
        if self.settings != (settings := self.recorded_settings()):
            self.renew(self.settings is not None, changed(self.settings, settings))
            self.settings = settings
        if is_first or self.eager:
            return self.compare(inputs)
        if self.captured is None:
            self.captured = self.capture(inputs)
        self.calls += 1
        return self.captured(*inputs)

    def prepare(self) -> None:
        """Again before each epoch: `after_epoch` may have replaced an optimizer, or a learning rate by a number."""
        keep_rates(self.groups(), self.rates)
        for optimizer in self.run.optimizers():
            prepare(optimizer, self.device)
        self.rates = [group["lr"] for group in self.groups()]

    def renew(self, changed: bool, reason: str) -> None:
        """Capture the step again. If that is due for the third time within a few steps, run all steps eagerly."""
        self.short_lived = self.short_lived + 1 if changed and self.calls <= COMPARED else 0
        if self.short_lived == 2:  # the first may belong to a run that was resumed just before a change
            print(f"every step runs eagerly: {reason} too often")
            self.eager = True
        self.calls, self.captured, self.recorded = 0, None, None

    def compare(self, inputs: Sequence[torch.Tensor]) -> None:
        """Run the step eagerly. If its operations are no longer the recorded ones, the next step is captured again."""
        if self.recorded is None:
            return self.step(*inputs)
        try:
            with Recorder(self.device, inputs, left_out=self.left_out) as recorder:
                self.step(*inputs)
        except NotCapturable as error:
            raise UserError(self.refusal(error)) from error
        if reason := difference(self.recorded, recorder):
            print(f"capturing the training step again: {reason.partition(';')[0]}")
            self.renew(True, "the step changes")

    def capture(self, inputs: Sequence[torch.Tensor]) -> Callable:
        """Check the step, capture it, and roll back what that changed."""
        self.inputs = [tensor.clone() for tensor in inputs]  # a graph reads these very tensors
        random, before = random_state(), Before()
        recorders = [Recorder(self.device, self.inputs, before, self.left_out) for _ in range(1 + COMPARED)]
        try:
            with side_stream() if self.graph else nullcontext():
                self.warm_up(recorders)
                function = self.compile() if self.compiled else self.step
        except NotCapturable as error:
            raise UserError(self.refusal(error)) from error
        finally:
            for tensor, copy in reversed(before.values()):
                tensor.copy_(copy)
            before.clear()  # one of the recorders is kept, and these copies would be with it
            for generator, state, _ in recorders[0].generators.values():
                generator.set_state(state)
            set_random_state(random, fresh_seed=0)
        self.recorded = recorders[1]
        if (reason := unsaved(self.recorded, self.run.state)) != self.warning:
            self.warning = reason
            print(f"{WARNING}: {reason}")
        return self.record_graph(function) if self.graph else function

    def warm_up(self, recorders: list[Recorder]) -> None:
        """The warm-up check. Its first step, which may make the gradients, is not compared. Raises NotCapturable."""
        values, random, settings = plain_values(self.run.state), [], []
        for i, recorder in enumerate(recorders):
            torch.rand((), device=self.device)  # the random numbers of each step begin elsewhere
            with advanced(self.run.state, i), recorder:
                self.step(*self.inputs)
            random.append(random_state())
            settings.append([settings_of(optimizer) for optimizer in self.run.optimizers()])
        for recorder in recorders[2:]:
            if reason := difference(recorders[1], recorder):
                raise NotCapturable(reason)
        if settings[1] != settings[-1]:
            remedy = "change them in `after_epoch`, or by a schedule in `state`"
            raise NotCapturable(f"it changes settings of an optimizer, which are Python numbers; {remedy}")
        if any(random[0][name] != random[-1][name] for name in ("python", "numpy")):
            raise NotCapturable("it draws random numbers from Python or numpy; draw them with torch")
        if torch.equal(*(state[self.device.type] for state in random[:2])):
            raise NotCapturable("it seeds the random number generator in each step; seed it before the first step")
        for name, value in plain_values(self.run.state).items():
            if value != values[name]:
                remedy = "make it a tensor on the device that the step updates in place"
                raise NotCapturable(f"it changes state[{name!r}], a Python value; {remedy}")

    def compile(self) -> Callable:
        from engine.compiler import compile_step  # imports torch's compiler, which takes a second

        print("compiling the training step")
        started = time.monotonic()
        pairs = zip(self.groups(), self.momenta)
        momenta = {parameter.data_ptr(): momentum for group, momentum in pairs for parameter in group["params"]}
        states = [state for optimizer in self.run.optimizers() for state in optimizer.state.values()]
        counts = {state["step"].data_ptr(): state["step"].item() for state in states if "step" in state}
        random, ends = random_state(), []
        AT_ONCE.append(True)
        try:
            replaced = products.in_compiled(self.step, self.inputs, self.run)
            function = compile_step(self.step, self.inputs, momenta, counts, replaced)
            for each in (self.step, function):
                set_random_state(random, fresh_seed=0)
                each(*self.inputs)
                ends.append(random_state()[self.device.type])
            if not torch.equal(*ends):
                cause = "torch.utils.checkpoint or, on CUDA, torch.bernoulli"
                raise RuntimeError(f"when compiled, it draws other random numbers, as with {cause}")
        except (Exception, KeyboardInterrupt) as error:  # no compiler, no Triton, another torch, Ctrl-C
            print(f"not compiled: {reason_of(error)}")
            self.compiled, self.eager = False, not self.graph
            self.settings = self.recorded_settings()  # now with the momentum
            return self.step
        finally:
            AT_ONCE.clear()
        print(f"compiled in {time.monotonic() - started:.0f} s")
        return function

    def record_graph(self, function: Callable) -> Callable:
        graph, random = torch.cuda.CUDAGraph(), random_state()
        for generator, _, _ in self.recorded.generators.values() if self.recorded else ():
            graph.register_generator_state(generator)  # torch 2.11 and older know the default one alone
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
        return [group for optimizer in self.run.optimizers() for group in optimizer.param_groups]

    def recorded_settings(self) -> list[tuple[str, Any]]:
        """The settings of the optimizers that the captured step holds as numbers.

        A compiled step reads SGD's momentum from a tensor, which this keeps up to date.
        """
        settings = []
        for group, momentum in zip(self.groups(), self.momenta):
            for name, value in group.items():
                if name == "momentum" and self.compiled:
                    momentum.fill_(value)
                    settings.append((name, bool(value)))  # without momentum, SGD keeps no average
                elif name != "params" and not isinstance(value, torch.Tensor):
                    settings.append((name, value))
        return settings


@contextmanager
def advanced(state: dict[str, Any], steps: int) -> Iterator[None]:
    """Within this, the values of the schedules in `state` depend on `steps`, which shows in a step that reads them."""
    schedules = [item for item in state.values() if isinstance(item, LRScheduler)]
    before = [(schedule, getattr(schedule, "last_epoch", None), schedule._last_lr) for schedule in schedules]
    try:
        for schedule, epoch, rates in before:
            schedule.last_epoch, schedule._last_lr = (epoch or 0) + steps, [rate * (1 + steps) for rate in rates]
        yield
    finally:
        for schedule, epoch, rates in before:
            schedule._last_lr = rates
            if epoch is None:  # a ChainedScheduler has none
                del schedule.last_epoch
            else:
                schedule.last_epoch = epoch


def changed(before: list[tuple[str, Any]] | None, settings: list[tuple[str, Any]]) -> str:
    names = {name for pair, (name, value) in zip(before or [], settings) if pair != (name, value)}
    return f"{' and '.join(sorted(names)) or 'a setting'} of the optimizer changes"


def reason_of(error: BaseException) -> str:
    """The C++ compiler's own message, if there is one; otherwise the first line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if " error: " in line), lines[0])


def replace_generator(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Make CUDA's generator usable again, in `state`: after a capture that failed, torch believes it still records."""
    fresh = torch.Generator(device)
    fresh.set_state(state["cuda"])
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)


@contextmanager
def side_stream() -> Iterator[None]:
    """A separate stream for the steps before a capture, as CUDA requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # the rollback, also that of a failed step, runs on the current stream
        torch.cuda.current_stream().wait_stream(stream)
