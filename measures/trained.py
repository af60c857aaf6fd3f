"""Trained networks from Python: load_model, classify, sample."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from engine.checkpoint import load_result
from engine.errors import UserError
from engine.provenance import warn_if_code_changed
from measures.samples import device_of, is_conditional, sample_images, spread
from models import KINDS, build_network
from photos import to_pixels

UNUSUAL_SEED = 314159265  # a network that is rebuilt starts from other weights than any that was trained
REMEDY = "make every layer in __init__, and keep tensors as parameters or buffers (register_buffer)"


def load_network(run: str | Path, device: torch.device | str) -> tuple[Any, dict[str, Any]]:
    """The network that is the run's result (of best.pt and the EMA, if there are any), and its checkpoint.

    run: a run folder, a checkpoint, or a file of weights/, also from another working directory. Raises UserError.
    """
    checkpoint = load_result(run)
    changed = warn_if_code_changed(checkpoint, run)
    return rebuild(checkpoint, run, changed).to(device), checkpoint


def rebuild(checkpoint: dict[str, Any], run: str | Path, changed: bool) -> Any:
    """The network of a result, in eval mode. run: its name in a UserError. changed: whether its code has changed."""
    options, state = checkpoint["options"], checkpoint["state"]
    if (kind := options.get("kind")) not in KINDS:
        known = f"models/__init__.py knows {', '.join(KINDS)}"
        raise UserError(f"{run} is of the unknown kind {kind}; {known}: add it to KINDS there")
    name, _ = KINDS[kind]
    try:
        with torch.random.fork_rng([]):  # the first weights, soon replaced, take none of the caller's random numbers
            torch.default_generator.manual_seed(UNUSUAL_SEED)  # torch.manual_seed would also seed the GPU
            network: Any = build_network(options)
        network.load_state_dict(state[name])
        [options[key] for key in ("dataset", "classes", *["black"] * (kind == "classifier"))]
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())
        mismatch = "does not match models/, which has changed since; undo the edit, or train again"
        if not changed:
            mismatch = f"does not match what models/ builds; {REMEDY}"
        raise UserError(f"{run} {mismatch}: {reason}") from error
    network.options = options
    return network.eval()


def check_rebuilt(run: Any, network: Any, batches: Any) -> None:
    """Raise UserError unless evaluate.py would measure `network`: rebuild it from the last checkpoint and compare.

    run: an engine.run.Run of one of KINDS. batches: those that it trains on. A generator must also return images.
    """
    name, _ = KINDS[run.options["kind"]]
    result = run.state["ema"].model if "ema" in run.state else run.state.get(name)
    if network is not result:
        remedy = 'use that one, or put an average of weights into `state` as "ema" (engine.optim.EMA)'
        raise UserError(f'evaluate.py measures state["{name}"] or its EMA, but the result here is another; {remedy}')
    path, (images, _) = run.folder / "checkpoint.pt", batches.take(torch.zeros(1, dtype=torch.int64))
    rebuilt, made = rebuild(load_result(path), path, changed=False).to(images.device), outputs(network, images)
    scale = max(1.0, made.abs().max().item()) if images.is_cuda else 1.0  # kernels for other strides may use TF32
    if not torch.allclose(outputs(rebuilt, images), made, rtol=1e-2, atol=1e-3 * scale):
        raise UserError(f"evaluate.py would measure another network: state_dict() lacks a part of this one; {REMEDY}")
    if name == "generator" and (made.shape != (4, 1, 28, 28) or made.min() < 0 or made.max() > 1):
        found = f"{list(made.shape)} with pixels from {made.min():.3g} to {made.max():.3g}"
        raise UserError(f"the generator returns {found}; it must return [N, 1, 28, 28] with pixels in [0, 1]")


@torch.no_grad()
def outputs(network: Any, images: torch.Tensor) -> torch.Tensor:
    """What a network in eval mode gives, from the same random numbers each time; it is left as it was.

    Its loss on `images` if it has one, else samples, else its outputs for `images`.
    """

    def refuse(module: torch.nn.Module, *_: Any) -> None:
        raise UserError(f"forward makes a layer ({type(module).__name__}), which is never trained; make it in __init__")

    before, devices = copy.deepcopy(network.state_dict()), [images.device] if images.is_cuda else []
    mps = torch.mps.get_rng_state() if images.device.type == "mps" else None  # which fork_rng leaves as it is seeded
    with register_module_parameter_registration_hook(refuse), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        if hasattr(network, "loss"):
            made = network.loss((images > 0.5).float())
        elif hasattr(network, "sample"):
            made = network.sample(4, torch.Generator(images.device).manual_seed(0))
        else:
            made = network(images)
    if mps is not None:
        torch.mps.set_rng_state(mps)
    network.load_state_dict(before)  # an RBM's loss moves its Gibbs chains
    return made.float()


def load_model(run: str | Path, device: torch.device | str = "cpu") -> Any:
    """The network of a run folder, a checkpoint or a file of weights/, in eval mode; its `options` are the run's.

    A classifier takes images [N, 1, 28, 28] scaled as in training and returns logits; `classify` scales any images.
    Raises UserError.
    """
    return load_network(run, device)[0]


@torch.no_grad()
def classify(model: Any, images: Any) -> torch.Tensor:
    """The probability of each class for each image, [N, classes] on the CPU; `model` is a classifier of load_model.

    images: arrays or tensors with pixels from 0 to 255, 0 to 1 or -1 to 1, white on black. photos.to_pixels lists the
    shapes. Raises UserError.
    """
    if hasattr(model, "sample"):
        raise UserError("this is a generator, not a classifier; classify needs a run of a classifier")
    black = model.options["black"]
    pixels = to_pixels(images) * (1 - black) + black
    logits = [model(part.to(device_of(model))).float() for part in pixels.split(1000)]
    return torch.cat(logits).softmax(1).cpu()


def sample(model: Any, n: int, digit: int | str | None = None, seed: int = 0) -> torch.Tensor:
    """n images [n, 1, 28, 28] with pixels from 0 to 1, on the CPU; `model` is a generator of load_model.

    digit: the class that a conditional generator samples, a name or a number; None: all of them. `evaluate.py RUN
    --samples n --seed seed` gives the same images. Raises UserError.
    """
    if not hasattr(model, "sample"):
        raise UserError("this is a classifier, not a generator; sample needs a run of a generator")
    if digit is not None and not is_conditional(model):
        raise UserError("this model was trained without labels; omit digit, or load a conditional generator")
    numbers = class_numbers(None if digit is None else [digit], model.options["classes"])
    return sample_images(model, spread(n, numbers), seed)[0]


def class_numbers(asked: Sequence[int | str] | None, classes: Sequence[str]) -> list[int]:
    """The numbers of the classes that are asked for by name or by number; None: of all. Raises UserError."""
    known = {str(number): number for number in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    for name in asked or ():
        if str(name) not in known:
            raise UserError(f"digit {name}: there is no such class; choose from {', '.join(classes)}")
    return [known[str(name)] for name in asked or classes]
