"""Errors on one line, commands to paste, output that nobody reads, and signals: how a script ends."""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

AT_ONCE: list[bool] = []  # not empty during work that takes a minute: the first signal also interrupts it


class OneLine(Exception):
    """An exception that a notebook shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self.args[-1]}"]


class UserError(OneLine):
    """An error the user can fix. The message is one line that names the cause and the remedy."""


class DataError(UserError):
    """A dataset or picture that cannot be used. The message names the file and the remedy."""


class Stopped(OneLine):
    """A signal ended a training, whose run can be resumed. Arguments: signal, message."""


def shell(*words: object) -> str:
    """`words` on one line, as they can be pasted into a shell. A Path that begins with - gets ./ before it."""
    texts = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def command(script: str, *words: object) -> str:
    """The command that runs a script of this repository from where the user stands, as the running one was called."""
    called, root = Path(sys.argv[0]), Path(__file__).resolve().parent.parent
    folder = next((each for each in (called.parent, Path()) if each.resolve() == root), root)
    is_on_path = Path(shutil.which("python") or "").parent == Path(sys.executable).parent
    path = called if script in ("", called.name) else folder / script  # "": a script of the user's own
    return shell("python" if is_on_path else sys.executable, path, *words)


def ending_signals() -> list[int]:
    """SIGINT, SIGTERM, the signal of a closed terminal, and those that batch systems send at a job's time limit.

    Signals that were ignored at the start, as under nohup, stay ignored, except under torchrun, which passes them on.
    """
    found = [getattr(signal, name, None) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")]
    stays = () if dist.is_torchelastic_launched() else (signal.SIG_IGN,)
    return [signal.SIGINT, signal.SIGTERM, *(each for each in found if each and signal.getsignal(each) not in stays)]


def interrupt(number, _) -> None:
    """A signal handler that does what Ctrl-C does, for any signal, so that cleanup runs."""
    raise KeyboardInterrupt(number)


@contextmanager
def handled(handler: Callable | signal.Handlers) -> Iterator[None]:
    """Within this, `handler` gets the `ending_signals`. Python delivers signals to the main thread alone."""
    numbers = ending_signals() if threading.current_thread() is threading.main_thread() else ()
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for each in before:
            signal.signal(*each)


@handled(interrupt)  # until the end: a signal while Python shuts down would print a traceback
def run_script(main: Callable[[], object]) -> None:
    """Call `main()`. Expected errors print one line and exit with status 1; bugs keep their traceback."""
    keep_writing()
    name = Path(sys.argv[0]).name
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
        print(f"{name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "close other programs, or use a smaller --batch-size (when training: in a new run)"
        print(f"{name}: error: out of memory; {remedy}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            with handled(signal.SIG_IGN):  # torchrun sends one to each process of a job that failed
                dist.destroy_process_group()


class Output(io.FileIO):
    """Standard output or error. What cannot be written, after `| head` or without a terminal, does not end a run."""

    def write(self, content) -> int:
        try:
            return super().write(content) or len(content)
        except OSError:
            return len(content)


def keep_writing() -> None:
    """Make standard output and error Outputs, whose every line is written at once. Only rank 0 prints.

    Characters that their encoding lacks are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed at the start: a file opened later would get this number
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if os.name != "nt" and isinstance(stream, io.TextIOWrapper | None):  # not a console of Windows, or a notebook
            raw = io.BufferedWriter(Output(number, "w", closefd=False))
            encoding = stream.encoding if stream else None
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_out_of_memory(error: Exception) -> bool:
    """CUDA and MPS raise a class of their own; the CPU's allocator raises a plain RuntimeError."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that signals append to instead of ending the process. A second SIGINT or SIGTERM ends it at once."""
    caught: list[int] = []
    asked = {signal.SIGINT, signal.SIGTERM}  # by the user; a terminal that closes sends its signal twice

    def catch(number, frame):
        if number in asked and asked & {*caught} and not dist.is_torchelastic_launched():  # torchrun repeats signals
            interrupt(number, frame)
        caught.append(number)
        if AT_ONCE and len(caught) == 1:
            interrupt(number, frame)

    with handled(catch):
        yield caught
