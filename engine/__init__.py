"""The internals of the loop in utils.py: flags, errors, run folders, processes, capture, plots. They know no model."""

import os
import signal
import sys
from importlib.util import find_spec


def end_at_once(number, _) -> None:
    """Ctrl-C while torch is imported, which takes seconds: one line. Scripts import this before torch."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(128 + number)  # an exception could end up in C++ that does not handle it


SCRIPTS = ("train_", "evaluate.py", "demo.py", "compare.py", "reproduce.py", "run.py")
PACKAGES = ["torch", "torchvision", "torchmetrics", "numpy", "scipy", "sklearn"]
PACKAGES += ["matplotlib", "PIL", "tqdm", "filelock"]

script = os.path.basename(sys.argv[0])
if script.startswith(SCRIPTS):  # not a notebook
    if missing := [package for package in PACKAGES if not find_spec(package)]:
        remedy = "install them: pip install -r requirements.txt"
        sys.exit(f"{script}: error: these packages are missing: {', '.join(missing)}; {remedy}")
    signal.signal(signal.SIGINT, end_at_once)  # until run_script
