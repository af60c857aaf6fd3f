"""An eager step is watched for a few steps: would a resumed run continue what it does?"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from engine.device import random_state
from engine.recorder import COMPARED, NO_LINE, Recorder, difference, storage_of, tensors_of, user_line
from engine.run import Run
from engine.state import plain_values, unsaved

WARNING = "warning: a resumed run would not continue exactly"


class EagerRecorder(Recorder):
    """Records a step that may do anything.

    What the loop computes is left out: `state` has all of it. So is what optimizers compute, but not that they update,
    and with which settings, if the step has set them itself.
    """

    def __init__(self, inputs: tuple[torch.Tensor, ...], optimizers: list[Optimizer]):
        super().__init__(None, inputs)
        self.settings = {optimizer: settings_of(optimizer) for optimizer in optimizers}
        self.sizes = [len(tensor) for tensor in inputs]

    def record(self, name: str, inputs: list[Any], outputs: list[torch.Tensor], line: str) -> None:
        super().record(name, inputs, outputs, line)
        if self.optimizing or line == NO_LINE:
            del self.operations[-1], self.lines[-1]

    def __enter__(self) -> "EagerRecorder":
        self.hooks = [
            register_optimizer_step_pre_hook(self.begin_update),
            register_optimizer_step_post_hook(lambda *_: setattr(self, "optimizing", False)),
        ]
        super().__enter__()
        return self

    def begin_update(self, optimizer: Optimizer, *_: Any) -> None:
        settings = settings_of(optimizer)
        own = settings if settings != self.settings.get(optimizer) else []
        self.operations.append((f"an update of {type(optimizer).__name__}", *map(repr, own)))
        self.lines.append(user_line())
        self.optimizing = True

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()


def watched(step: Callable, run: Run) -> Callable:
    """`step(images, labels)`, which runs eagerly. Its second to sixth calls are recorded and compared.

    What changes from one to the next and is not in `run.state` is named in a warning.
    """
    last: list[EagerRecorder] = []
    warned = set[int]()
    calls = 0

    def watched_step(*inputs: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 or calls > 1 + COMPARED:
            return step(*inputs)
        before = host_values(run)
        with EagerRecorder(inputs, run.optimizers()) as watch:
            step(*inputs)
        after = host_values(run)
        reasons = [unsaved(watch, run.state, before[1])]
        if last and last[0].sizes == watch.sizes and not watch.reads_values and before == after:
            reasons.append(difference(last[0], watch))
        last[:] = [watch]
        for kind, reason in enumerate(reasons):
            if reason and kind not in warned:
                warned.add(kind)
                print(f"{WARNING}: {reason}")

    return watched_step


def host_values(run: Run) -> list[Any]:
    """What a checkpoint holds of Python: plain values, the places of tensors, and numpy's and Python's random numbers.

    A step may replace a tensor, as `p.data = p.data - lr * p.grad` does.
    """
    places, generators = list(map(storage_of, tensors_of(run.content()))), random_state()
    return [plain_values(run.state), places, generators["python"], generators["numpy"]]


def settings_of(optimizer: Optimizer) -> list[Any]:
    return [value for group in optimizer.param_groups for value in group.values() if isinstance(value, float | int)]
