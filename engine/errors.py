"""Errors on one line, and signals: how a script ends."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


class OneLine(Exception):
    """An exception that a notebook shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self.args[-1]}"]


class UserError(OneLine):
    """An error the user can fix. The message is one line that names the cause and the remedy."""


class DataError(OSError):
    """A dataset that cannot be used. The message names the file and the remedy."""


class Stopped(OneLine):
    """SIGINT or SIGTERM ended the training after a whole step, and the run was saved. Arguments: signal, message."""


def run_script(main: Callable[[], object]) -> None:
    """Call `main()`. Expected errors print one line and exit with status 1; bugs keep their traceback."""
    print_on_rank_0_only()
    name, before = Path(sys.argv[0]).name, signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except Stopped as stopped:
        number, message = stopped.args
        if message:
            print(message, file=sys.stderr)
        sys.exit(128 + number)
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
    except (UserError, OSError) as error:
        sys.exit(f"{name}: error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{name}: error: out of memory; start again with a smaller --batch-size")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)  # a signal while Python shuts down would print a traceback


def print_on_rank_0_only() -> None:
    if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_out_of_memory(error: Exception) -> bool:
    """CUDA and MPS raise a class of their own; the CPU's allocator raises a plain RuntimeError."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)


def interrupt(number, _) -> None:
    """A signal handler that does what Ctrl-C does, for any signal, so that cleanup runs."""
    raise KeyboardInterrupt(number)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to instead of ending the process. A second signal ends it at once.

    Python delivers signals to the main thread alone: in any other, the list stays empty.
    """
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def catch(number, frame):
        if caught and not dist.is_torchelastic_launched():  # torchrun repeats the terminal's signal
            interrupt(number, frame)
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
