"""The training step as one function, compiled by Inductor, PyTorch's compiler."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # else it warns of a CUDA_HOME without CUDA
OPTIONS = {
    "fallback_random": True,  # the random numbers of the eager step
    "layout_optimization": False,  # convolutions keep their layout; another one slows down what follows, such as Adam
    "realize_reads_threshold": 3,  # with 4, its default, Inductor fails on the HMM (KeyError; torch 2.14)
}


def compile_step(
    step: Callable,
    inputs: Sequence[torch.Tensor],
    momenta: dict[int, torch.Tensor],
    counts: dict[int, float],
    products: dict[Any, Callable],
) -> Callable:
    """Compile `step(*inputs)`, which must be the same operations on the same tensors in every call.

    The step runs once, and its operations are recorded below autograd: forward pass, backward pass and updates, in one
    graph. Tensors from outside the step, such as weights, become inputs of the graph.
    momenta: address of a parameter -> SGD's momentum, as a tensor that may change between calls.
    counts: address of Adam's step count of a parameter -> its value.
    products: what replaces matrix products, as `engine.products.in_compiled` returns it.
    """
    updates: dict[Any, Callable] = {
        **products,
        torch.ops.aten._fused_adam_.tensor_lr: partial(adam, counts=counts),
        torch.ops.aten._fused_adamw_.tensor_lr: partial(adam, counts=counts, decoupled=True),
        torch.ops.aten._fused_sgd_.tensor_lr: partial(sgd, momenta=momenta),
        torch.ops.aten.bernoulli_.float: bernoulli_,
    }
    traced = make_fx(step, decomposition_table=updates)(*inputs)
    found = lift_tensors(traced)
    fake = FakeTensorMode(shape_env=ShapeEnv())  # without shapes that it knows, Inductor does not use its cache
    examples: list[Any] = [fake.from_tensor(tensor, static_shapes=True) for tensor in (*inputs, *found)]
    compiled = torch._inductor.compile(GraphModule({}, traced.graph), examples, options=OPTIONS)

    def run(*inputs):
        with torch.no_grad():
            compiled(*inputs, *found)

    return run


def lift_tensors(traced: GraphModule) -> list[torch.Tensor]:
    """Turn the tensors that a traced function holds into inputs of its graph, after the others; return them."""
    graph: Graph = traced.graph
    *_, place = (node for node in graph.nodes if node.op == "placeholder")
    found: list[torch.Tensor] = []
    nodes: dict[tuple, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = getattr(traced, node.target)
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in nodes:
                with graph.inserting_after(place):
                    nodes[key] = place = graph.placeholder(f"found_{len(found)}")
                found.append(tensor.data)
            node.replace_all_uses_with(nodes[key])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            node.args = ((),)  # metrics are summed by the step; their names are known
        elif getattr(node.target, "namespace", None) == "profiler":
            graph.erase_node(node)
    return found


def bernoulli_(x: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Refuse dropout of a tensor whose dimensions are not in the order of its memory, as within attention.

    Inductor would change that order, and with it which element gets which random number.
    """
    if not x.is_contiguous() and not generator:
        raise RuntimeError("compiled dropout of a transposed tensor, as in attention, would draw other random numbers")
    return NotImplemented


# The updates, which `torch.optim` has as one operation, written out so that Inductor can fuse them with the gradients.


def adam(
    weights, gradients, averages, squares, maxima, steps, *,
    lr, beta1, beta2, weight_decay, eps, amsgrad, maximize, grad_scale=None, found_inf=None, counts, decoupled=False,
):  # fmt: skip
    """m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  w = w - lr m' / (sqrt(v') + eps)

    where m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t) (Kingma & Ba 2015, algorithm 1).
    decoupled: AdamW's weight decay, w = (1 - lr weight_decay) w, instead of an addition to the gradient.
    """
    if amsgrad or maximize or found_inf is not None:
        return NotImplemented
    decay, penalty = (weight_decay, 0) if decoupled else (0, weight_decay)
    t = torch.stack(steps).to(weights[0].dtype)
    rate, scale = lr / correction(beta1, t), correction(beta2, t).rsqrt()  # of each weight
    if len({counts.get(step.data_ptr()) for step in steps}) == 1:  # else some weights have been trained for longer
        # Equal numbers: Inductor computes their maximum once, but an expression anew for every weight.
        rate, scale = rate.amax().expand(len(steps)), scale.amax().expand(len(steps))
    for i, (w, g, m, v) in enumerate(zip(weights, gradients, averages, squares, strict=True)):
        old = w * (1 - lr * decay) if decay else w
        if penalty:
            g = g + penalty * w
        m.lerp_(g, 1 - beta1)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        w.copy_(old - rate[i] * m / (v.sqrt() * scale[i] + eps))
    return None


def correction(beta: float, t: torch.Tensor) -> torch.Tensor:
    """1 - beta^t, without the cancellation where beta^t is almost 1."""
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def sgd(
    weights, gradients, averages, *,
    lr, momentum, weight_decay, dampening, nesterov, maximize, is_first_step, grad_scale=None, found_inf=None, momenta,
):  # fmt: skip
    """b = momentum b + (1 - dampening) g,  w = w - lr b"""
    if maximize or found_inf is not None:
        return NotImplemented
    momentum = momenta.get(weights[0].data_ptr(), momentum)
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        if weight_decay:
            g = g + weight_decay * w
        if averages:
            b = averages[i]
            b.copy_(momentum * b + (1 - dampening) * g)
            g = g + momentum * b if nesterov else b
        w.sub_(lr * g)
    return None
