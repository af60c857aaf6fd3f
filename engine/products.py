"""Matrix products of a step on a CPU: by oneDNN where it is faster than torch's default, MKL.

Both come with torch. On AMD's processors MKL does not use AVX-512, which oneDNN does.
"""

import timeit
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed import broadcast
from engine.run import Run

WORTH = 0.8  # oneDNN must take less than this fraction of MKL's time, so that noise seldom changes the choice
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
OPERATION = "onednn_products::mm"  # of our own, because Inductor would ask for constant weights in oneDNN's
Matrices = tuple[tuple[torch.Size, tuple[int, ...]], ...]  # the shape and strides of each


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias, for float32 a [M, K], b [K, N] and bias [N]; by a private operation of torch."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


if not hasattr(torch.ops.onednn_products, "mm"):  # this module may be imported again, as by importlib.reload
    torch.library.define(OPERATION, "(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    torch.library.impl(OPERATION, "cpu", onednn)
    torch.library.register_fake(OPERATION, lambda a, b, bias=None: a.new_empty(len(a), b.shape[1]))


warnings.filterwarnings("ignore", "Warning only once for all operators")  # of torch 2.10, about the replacement below


def with_products(step: Callable, run: Run) -> Callable:
    """`step`, run eagerly, with oneDNN's products if they are faster, which its first call measures."""
    if not available(run):
        return step

    def run_step(*inputs: Tensor) -> None:
        if run.args.products:
            return by_onednn(step, *inputs) if run.args.products == "onednn" else step(*inputs)
        with Products() as products:
            step(*inputs)
        replacing = min(timeit.repeat(lambda: by_onednn(lambda: None), number=1, repeat=5))
        choose(products.matrices, run, replacing)

    return run_step


def by_onednn(step: Callable, *inputs: Any) -> Any:
    """Run `step(*inputs)` with oneDNN's products in place of torch's."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
        return step(*inputs)


def mm(a: Tensor, b: Tensor) -> Tensor:
    if are_float32(a, b):
        return onednn(a, b)
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # torch's own


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if adds_a_row(bias, a, b, beta, alpha):
        return onednn(a, b, bias)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(len(a), b.shape[1]))


def are_float32(a: Tensor, b: Tensor, *others: Tensor) -> bool:
    """Whether all are dense and float32, and a and b fit; otherwise torch's own product runs, or raises its error."""
    dense = all(tensor.dtype == torch.float32 and tensor.layout == torch.strided for tensor in (a, b, *others))
    return dense and a.shape[1] == len(b) > 0


def adds_a_row(bias: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> bool:
    return are_float32(a, b, bias) and beta == alpha == 1 and bias.shape == b.shape[1:]


class Products(TorchDispatchMode):
    """Records the matrices of a step's float32 products."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: list[Matrices] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (MM, ADDMM) and not kwargs and are_float32(*args[-2:]):
            self.matrices.append(tuple((matrix.shape, matrix.stride()) for matrix in args[-2:]))
        return function(*args, **(kwargs or {}))


def in_compiled(step: Callable, inputs: Sequence[Tensor], run: Run) -> dict[Any, Callable]:
    """What replaces the products of a compiled step: oneDNN's if they are faster, which one step measures; else {}."""
    if available(run) and not run.args.products:
        with Products() as products:
            step(*inputs)
        choose(products.matrices, run)
    return {MM: compiled_mm, ADDMM: compiled_addmm} if available(run) and run.args.products == "onednn" else {}


def compiled_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.onednn_products.mm(a, b, None) if are_float32(a, b) else NotImplemented


def compiled_addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.ops.onednn_products.mm(a, b, bias) if adds_a_row(bias, a, b, beta, alpha) else NotImplemented


def available(run: Run) -> bool:
    """On a CPU, and if torch still has the two private functions that this needs."""
    private = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.library, "_scoped_library")
    return private and run.device().type == "cpu"


def choose(products: list[Matrices], run: Run, replacing: float = 0.0) -> None:
    """Put the faster library into the run's options, so that a resumed run makes the same choice.

    replacing: the seconds that a step takes to replace torch's products.
    """
    library = broadcast(lambda: faster(products, replacing)) if products else "torch"
    run.args.products = run.options["products"] = library
    run.write_config()


def faster(products: list[Matrices], replacing: float) -> str:
    rounds = [(seconds(products), replacing + by_onednn(seconds, products)) for _ in range(3)]  # in turn: times drift
    own, other = map(min, zip(*rounds))
    library = "onednn" if other < WORTH * own else "torch"
    times = f"torch's take {1000 * own:.2f} ms a step, oneDNN's {1000 * other:.2f} ms"
    print(f"products: {library} ({times}; oneDNN is chosen below {1000 * WORTH * own:.2f} ms)")
    return library


def seconds(products: list[Matrices]) -> float:
    """The time of all products, measured with random matrices of the same shapes and strides."""
    times: dict[Matrices, float] = {}  # the RNN has hundreds of products, but few shapes
    for matrices in products:
        if matrices not in times:
            a, b = (random_matrix(*matrix) for matrix in matrices)
            times[matrices] = min(timeit.repeat(partial(torch.mm, a, b), number=1, repeat=3))
    return sum(times[matrices] for matrices in products)


def random_matrix(shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride))
    return torch.randn(size, generator=torch.Generator()).as_strided(shape, stride)
