"""What the loop in utils.py stands on: flags, errors, run folders, processes, capture, pictures. It knows no model."""

import os
import signal
import sys


def end_at_once(number, _) -> None:
    """Ctrl-C while torch is imported, which takes seconds: one line. Scripts import this before torch."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(128 + number)  # an exception could end up in C++ that does not handle it


if os.path.basename(sys.argv[0]).startswith(("train_", "evaluate.py", "demo.py")):  # not a notebook
    signal.signal(signal.SIGINT, end_at_once)  # until run_script
