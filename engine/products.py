"""Matrix products of the compiled step on a CPU: by oneDNN where it is faster than torch's default, MKL.

Both come with torch. On AMD's processors MKL does not use AVX-512, which oneDNN does.
"""

import timeit
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

if TYPE_CHECKING:
    from engine.run import Run

WORTH = 0.9  # of MKL's time, which oneDNN must not exceed: the choice is the same on a busy day
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
OPERATION = "onednn_products::mm"  # of our own, because Inductor would ask for constant weights in oneDNN's


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias, for float32 a [M, K], b [K, N] and bias [N]; by a private operation of torch."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


if not hasattr(torch.ops.onednn_products, "mm"):  # this module may be imported again, as by importlib.reload
    torch.library.define(OPERATION, "(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    torch.library.impl(OPERATION, "cpu", onednn)
    torch.library.register_fake(OPERATION, lambda a, b, bias=None: a.new_empty(len(a), b.shape[1]))


def choose(graph: Graph, run: "Run") -> None:
    """Have oneDNN compute the products of a recorded step if it is faster. --products chooses without trying.

    The choice goes into the run's options, so that a resumed run makes the same one.
    """
    products = [node for node in graph.nodes if is_product(node)]
    if run.device().type != "cpu" or not products or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    if not run.args.products:
        run.args.products = run.options["products"] = faster(products)
        run.write_config()
    if run.args.products == "onednn":
        for node in products:
            replace(node, graph)


def faster(products: list[Node]) -> str:
    ms = {name: 1000 * seconds(products, by) for name, by in (("torch", torch.mm), ("onednn", onednn))}
    best = "onednn" if ms["onednn"] < WORTH * ms["torch"] else "torch"
    print(f"products: {best} (torch's own take {ms['torch']:.2f} ms a step, oneDNN's {ms['onednn']:.2f} ms)")
    return best


def replace(product: Node, graph: Graph) -> None:
    with graph.inserting_before(product):
        new = graph.call_function(torch.ops.onednn_products.mm.default, arguments(product))
    new.meta.update(product.meta)
    product.replace_all_uses_with(new)
    graph.erase_node(product)


def is_product(node: Node) -> bool:
    """Whether it is a float32 product: a @ b, or a @ b + bias, where bias is a row."""
    if node.target not in (MM, ADDMM) or node.kwargs or node.meta["tensor_meta"].dtype != torch.float32:
        return False
    *_, bias = arguments(node)
    return bias is None or matrix(bias).shape == node.meta["tensor_meta"].shape[1:]


def arguments(node: Node) -> tuple[Any, Any, Any]:
    """a, b and bias, or None."""
    first, *others = node.args
    return (*others, first) if node.target is ADDMM else (first, *others, None)  # type: ignore[return-value]


def seconds(products: list[Node], multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The time of all products, by matrices with their shapes and memory orders."""
    times: dict[Any, float] = {}  # the RNN has hundreds of products, but few shapes
    total = 0.0
    for product in products:
        a, b = (matrix(node) for node in arguments(product)[:2])
        key = a.shape, a.stride(), b.shape, b.stride()
        if key not in times:
            times[key] = min(timeit.repeat(partial(multiply, a, b), number=3, repeat=5)) / 3
        total += times[key]
    return total


def matrix(node: Node) -> Tensor:
    """One that the step holds, such as weights, or random numbers."""
    if node.op == "get_attr":
        return getattr(node.graph.owning_module, str(node.target))
    shape, stride = node.meta["tensor_meta"].shape, node.meta["tensor_meta"].stride
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride))
    return torch.randn(size).as_strided(shape, stride)
