"""Choose the number of CPU threads: several threads slow a small step down."""

import os
import time
from collections.abc import Callable

import torch

from engine.distributed import world_size
from engine.run import Run

CORES = torch.get_num_threads()
WORTH = 0.95  # more threads must take less than this fraction of the time with fewer


def tuned(step: Callable, then: Callable[[], Callable], run: Run, batch_size: int) -> Callable:
    """`step` with 1, 2, 4, ... threads in turn, three times each; afterwards `then()`, with the fastest.

    These are steps of the training. The choice goes into the run's options, so that a resumed run makes the same one.
    --threads and OMP_NUM_THREADS choose without trying.
    """
    counts = sorted({*(2**i for i in range(CORES.bit_length())), CORES})
    chosen = run.args.threads or "OMP_NUM_THREADS" in os.environ
    if chosen or run.args.dry_run or run.device().type != "cpu" or world_size() > 1 or CORES == 1:
        return then()
    trials = [CORES, *counts * 3]  # the first step allocates memory, and is slower
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    function: Callable | None = None

    def run_step(*inputs: torch.Tensor) -> None:
        nonlocal function
        if function is None and not trials:
            choose({threads: min(times) for threads, times in seconds.items()}, run)
            function = then()
        if function is not None:
            function(*inputs)
        elif len(inputs[0]) < batch_size:
            step(*inputs)
        else:
            torch.set_num_threads(threads := trials.pop(0))
            started = time.perf_counter()
            step(*inputs)
            seconds[threads].append(time.perf_counter() - started)

    return run_step


def choose(seconds: dict[int, float], run: Run) -> None:
    """Set the number of threads to the fastest. seconds: of a step with so many threads, fewest first."""
    best = 1
    for threads, own in seconds.items():
        best = threads if own < WORTH * seconds[best] else best
    listed = ", ".join(f"{1000 * own:.2f} ms with {threads}" for threads, own in seconds.items())
    print(f"threads: {best} (a step takes {listed})")
    torch.set_num_threads(best)
    run.args.threads = run.options["threads"] = best
    run.write_config()
