"""Rows of numbers, to which rows are only added: a row of metrics per epoch, or per report."""

import csv
import io
import math
from array import array
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import append, write_atomically


class Table(list[dict[str, float]]):
    """A list of rows. Rows that were packed or written are not visited again, so each new row costs the same."""

    def __init__(self, columns: Any = ()):
        """columns: what `pack` returned, or the rows themselves."""
        values = columns
        if isinstance(columns, dict):
            rows = zip(*(column.tolist() for column in columns.values()))
            values = ({name: x for name, x in zip(columns, row) if not math.isnan(x)} for row in rows)
        super().__init__(values)
        self.columns: dict[str, array] = {}  # with NaN where a row lacks a number
        self.packed = 0  # rows
        self.written: Any = None  # columns, rows and size of the file

    def pack(self) -> dict[str, torch.Tensor]:
        """The columns, float64 [rows]."""
        self.extend_columns()
        return {name: torch.frombuffer(column, dtype=torch.float64).clone() for name, column in self.columns.items()}

    def extend_columns(self) -> None:
        """Append the rows that the columns lack."""
        for row in self[self.packed :]:
            for name in row:
                if name not in self.columns:
                    self.columns[name] = array("d", [math.nan]) * self.packed
            for name, column in self.columns.items():
                column.append(row.get(name, math.nan))
            self.packed += 1

    def write(self, path: Path) -> None:
        """Append the rows that the file lacks. If its size has changed since, or a column is new, rewrite it."""
        self.extend_columns()
        names, rows, size = self.written or ([], 0, -1)
        whole = names != list(self.columns) or not path.is_file() or path.stat().st_size != size
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.columns), lineterminator="\n")
        if whole:
            writer.writeheader()
        writer.writerows(self if whole else self[rows:])
        (write_atomically if whole else append)(path, text.getvalue().encode())
        self.written = list(self.columns), len(self), path.stat().st_size
