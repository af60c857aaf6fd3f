"""Make a file of weights/ from an evaluated run: its network alone, with its options and its measures.

python benchmarks/reproduce.py mlp-best --seeds 1
python benchmarks/weights.py mlp runs/reproduce/mlp-best-0           # writes weights/mlp.pt
python benchmarks/weights.py cgan runs/reproduce/cgan-best-0 --half  # in half precision
python evaluate.py weights/mlp.pt
python benchmarks/weights.py mlp weights/mlp.pt                      # the same network, measured again
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate
from engine import flags
from engine.checkpoint import seal
from engine.errors import UserError, command, run_script
from engine.folder import read_config
from models import KINDS

WEIGHTS = ROOT / "weights"
NOT_KEPT = ("data_dir", "first_stage", "device")  # options that say where something was


def write_sums() -> None:
    """Write SHA256SUMS as `sha256sum --check` reads it."""
    files = [path for path in sorted(WEIGHTS.iterdir()) if path.suffix in (".pt", ".npz")]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (WEIGHTS / "SHA256SUMS").write_text("".join(sums))


def main() -> None:
    parser = flags.ArgumentParser("weights.py", __doc__)
    parser.add_argument("name", metavar="NAME", help="name of the file, weights/NAME.pt")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder or file that evaluate.py has evaluated")
    parser.add_argument("--half", action="store_true", help="keep float16 numbers; evaluate the file afterwards")
    args = parser.parse_args()
    path = evaluate.evaluation_folder(args.run) / "metrics.json"
    measured = json.loads(path.read_text()) if path.is_file() else {}
    network, checkpoint = evaluate.load_network(args.run, "cpu")
    if (measured.get("epochs"), measured.get("noise_seed", 0)) != (checkpoint["epoch"], 0):
        raise UserError(f"{args.run} has not been evaluated as it is; run: {command('evaluate.py', args.run)}")
    name, _ = KINDS[checkpoint["options"]["kind"]]
    weights = {key: tensor.half() if args.half and tensor.is_floating_point() else tensor
               for key, tensor in network.state_dict().items()}  # fmt: skip
    kept = {
        "options": {key: value for key, value in checkpoint["options"].items() if key not in NOT_KEPT},
        "code": {},  # not compared with the code: what counts is that the weights fit the network
        "state": {name: weights},
        "epoch": checkpoint["epoch"],
        "commit": checkpoint.get("commit", read_config(path.parent.parent).get("commit")),
        "measured": measured,
    }
    path = WEIGHTS / f"{args.name}.pt"
    path.write_bytes(seal(kept))
    write_sums()
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
