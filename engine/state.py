"""What `state` may hold, and how it is saved and restored.

`state` is a dict of everything that a resumed run needs: networks, optimizers, schedules, an EMA, or any other object
with `state_dict()` and `load_state_dict()`; tensors; torch.Generators; plain values (numbers, strings, None, and lists,
tuples and dicts of them).
"""

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import MappingKey, tree_leaves, tree_leaves_with_path, tree_map_only

from engine.errors import UserError
from engine.recorder import NO_LINE, PLAIN, Recorder, address_of, keep_rates, portable_state, storage_of, tensors_of

CONTAINERS = (dict, list, tuple, OrderedDict)  # that a checkpoint may hold
VALUES = (torch.Tensor, nn.Parameter, *PLAIN, *CONTAINERS)  # a step may replace any of these by another


def saved(name: str, item: Any) -> Any:
    """What a checkpoint holds of state[name]. Raises UserError if it could not be saved, or not be loaded again."""
    if isinstance(item, Optimizer):
        content: Any = portable_state(item)
    elif isinstance(item, torch.Generator):
        content = item.get_state()
    elif hasattr(item, "load_state_dict") and hasattr(item, "state_dict"):
        content = item.state_dict()
    else:
        content = item
    # Counter: MultiStepLR's milestones
    loadable = (torch.Tensor, nn.Parameter, *PLAIN, Counter, *torch.serialization.get_safe_globals())
    foreign = lambda part: isinstance(part, dict | list | tuple | deque) and type(part) not in CONTAINERS  # noqa: E731
    for path, leaf in tree_leaves_with_path(content, foreign):
        for part in (leaf, *tree_leaves([step.key for step in path if isinstance(step, MappingKey)])):
            if type(part) in loadable:
                continue
            what = f"a {type(item).__name__}" + (f" that holds a {type(part).__name__}" if part is not item else "")
            remedy = "make it plain tensors, numbers, strings, lists or dicts, or give it state_dict()"
            raise UserError(f"state[{name!r}] is {what}, which cannot be saved; {remedy} and load_state_dict()")
    return content


def restored(item: Any, before: Any, device: torch.device) -> Any:
    """`item` as it was when `saved` returned `before`: changed in place, unless it is a number, a string or a tuple.

    device: for tensors that `item` lacks.
    """
    if isinstance(item, torch.Generator):
        if item.get_state().shape == before.shape:  # else it was another device's: it restarts from its seed
            item.set_state(before)
    elif isinstance(item, Optimizer):
        rates = [group["lr"] for group in item.param_groups]
        item.load_state_dict(before)
        keep_rates(item.param_groups, rates)
    elif isinstance(item, torch.Tensor) and isinstance(before, torch.Tensor):
        is_expanded = item.layout == torch.strided and 0 in item.stride()  # elements share memory
        if is_expanded or (item.shape, item.dtype) != (before.shape, before.dtype):
            return before.to(item.device)
        item.data.copy_(before)
    elif hasattr(item, "load_state_dict"):
        item.load_state_dict(before)
    elif type(item) is type(before) is list:
        item[:] = [restored(*pair, device) for pair in itertools.zip_longest(item[: len(before)], before)]
    elif isinstance(item, dict) and type(item) is type(before):
        content = {key: restored(item.get(key), value, device) for key, value in before.items()}
        item.clear()
        item.update(content)
    else:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), before)
    return item


def weights_of(state: dict[str, Any]) -> dict[torch.Tensor, str]:
    """The name of each weight that `state` saves: the parameters of its networks, and its tensors."""
    names = {item: name for name, item in state.items() if isinstance(item, torch.Tensor)}
    for network, item in state.items():
        if isinstance(item, nn.Module):
            names.update({parameter: f"{network}.{name}" for name, parameter in item.named_parameters()})
    return names


def held_weights(state: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The weights of each optimizer in `state`."""
    optimizers = {name: item for name, item in state.items() if isinstance(item, Optimizer)}
    return {name: [p for group in item.param_groups for p in group["params"]] for name, item in optimizers.items()}


def check_optimizers(state: dict[str, Any]) -> None:
    """Raise UserError if an optimizer holds weights that `state` lacks; name an optimizer whose schedule it lacks."""
    known = weights_of(state)
    for name, weights in held_weights(state).items():
        if lacking := [weight for weight in weights if weight not in known]:
            shapes = ", ".join(str(list(weight.shape)) for weight in lacking[:3])
            remedy = "add the network that they belong to"
            raise UserError(f"{name} updates {len(lacking)} weights that `state` lacks ({shapes}); {remedy}")
    parts = [part for item in state.values() for part in (item, *getattr(item, "__dict__", {}).values())]
    for name, item in state.items():
        scheduled = hasattr(getattr(item, "step", None), "_wrapped_by_lr_sched")
        if scheduled and not any(isinstance(part, LRScheduler) and part.optimizer is item for part in parts):
            print(f"warning: {name} has a schedule that `state` lacks; add it, and let the loop call its step()")


@contextmanager
def watched_optimizers(state: dict[str, Any], updated: dict[Optimizer, bool]) -> Iterator[None]:
    """Within this, a step of an optimizer that `state` lacks raises UserError: a resumed run would restart it.

    updated: gets, for each optimizer, whether its weights had a gradient at its first step.
    """

    def check(optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in updated:
            weights = (weight for group in optimizer.param_groups for weight in group["params"])
            updated[optimizer] = any(weight.grad is not None for weight in weights)
        if not any(optimizer is item for item in state.values()):
            remedy = "add it, so that a resumed run continues it"
            raise UserError(f"train_step uses an optimizer ({type(optimizer).__name__}) that `state` lacks; {remedy}")

    with register_optimizer_step_pre_hook(check):
        yield


def require_batches_for_norm(networks: dict[str, nn.Module], size: int) -> None:
    """Raise UserError if the smallest batch is one image, for which BatchNorm1d has no variance."""
    for name, network in networks.items():
        if size == 1 and any(isinstance(layer, nn.BatchNorm1d) for layer in network.modules()):
            raise UserError(f"batch norm of the {name}: one image would form a batch by itself; change --batch-size")


def untrained(state: dict[str, Any], updated: dict[Optimizer, bool]) -> Iterator[str]:
    """After a step: name the optimizers whose weights got no gradient at first, and the weights that none holds."""
    held = held_weights(state)
    for name, weights in held.items():
        if not updated.get(state[name]) and all(weight.grad is None for weight in weights):
            yield f"{name} trains nothing: in the first step, its weights got no gradient"
    known = set(itertools.chain(*held.values()))
    lacking = [name for weight, name in weights_of(state).items() if weight.grad is not None and weight not in known]
    if lacking and held:
        yield f"{len(lacking)} weights are not trained: no optimizer holds {', '.join(lacking[:3])}"


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within this, networks are in eval mode, and nothing has gradients. Each layer's mode is restored afterwards."""
    modes = {layer: layer.training for network in networks for layer in network.modules()}
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def unsaved(recorder: Recorder, state: dict[str, Any], before: Sequence[int] = ()) -> str:
    """What the recorded step changed and `state` lacks, with the line of the user's code; "" if nothing.

    before: the storages of what `state` held before the step, which may have replaced them.
    """
    generators = {address_of(item) for item in state.values() if isinstance(item, torch.Generator)}
    for address, (_, _, line) in recorder.generators.items():
        if address not in generators:
            return f"{line} uses a torch.Generator that `state` lacks; add it"
    weights = weights_of(state).items()
    gradients = {storage_of(weight.grad): name for weight, name in weights if weight.grad is not None}
    objects = [item for item in state.values() if type(item).__module__.startswith("torch.")]
    held = [vars(item) for item in objects if not isinstance(item, nn.Module) and hasattr(item, "load_state_dict")]
    known = {*before} | set(map(storage_of, tensors_of([held, *(saved(name, item) for name, item in state.items())])))
    for storage, (tensor, line) in recorder.continued().items():
        if storage in gradients and tensor.any():  # not zeroed at the end of the step
            remedy = "call optimizer.zero_grad() in each step, and accumulate gradients within one step only"
            return f"{line} adds to the gradient of {gradients[storage]} across steps; {remedy}"
        if line != NO_LINE and storage not in known and storage not in gradients:  # without a line, it is the loop's
            return f"{line} updates a tensor {list(tensor.shape)} that `state` lacks; add it"
    return ""


def plain_values(state: dict[str, Any]) -> dict[str, list[Any]]:
    """Python's values in what a checkpoint holds of each item; the settings of optimizers are compared separately.

    A GradScaler's numbers are tensors, which it updates in place.
    """
    apart = nn.Module | Optimizer | torch.amp.GradScaler
    others = {name: item for name, item in state.items() if not isinstance(item, apart)}
    leaves = {name: tree_leaves(saved(name, item)) for name, item in others.items()}
    return {name: [leaf for leaf in own if not isinstance(leaf, torch.Tensor)] for name, own in leaves.items()}
