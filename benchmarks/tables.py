"""The README's tables, made from the measured results: no figure in them is typed by hand.

python benchmarks/tables.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "results.json"
SPEED = ROOT / "results" / "speed.json"


def results_table(rows):
    lines = ["| name | command | epochs | test accuracy | test errors | published |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        accuracy = f"{100 * row['test_accuracy_mean']:.2f} ± {100 * row['test_accuracy_sd']:.2f} %"
        errors = ", ".join(map(str, row["test_errors"]))
        cells = [name, f"`{row['command']}`", str(row["epochs_trained"]), accuracy, errors, row["published"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(speed):
    lines = ["| | ordinary loop | this loop | ratio (lowest to highest) |", "|---|---|---|---|"]
    for name, row in speed["rows"].items():
        times = f"{row['ordinary_ms']:.2f} ms a step | {row['ours_ms']:.2f} ms a step"
        spread = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        lines.append(f"| {name} | {times} | {spread} |")
    machine = f"{speed['processor']}, {speed['cores']} cores, torch {speed['torch']}"
    return "\n".join([*lines, "", f"{machine}; {speed['turns']} turns with {speed['steps']} steps of each loop."])


def fill(text):
    """The README's text with each section between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    sections = {
        "results": results_table(json.loads(RESULTS.read_text())),
        "speed": speed_table(json.loads(SPEED.read_text())),
    }
    for name, table in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
