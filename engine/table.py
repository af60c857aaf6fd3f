"""Rows of numbers, to which rows are only added: a row of metrics per epoch, or per report."""

import csv
import io
import itertools
from pathlib import Path
from typing import Any

from engine.checkpoint import append, write_atomically


class Table(list[dict[str, float]]):
    """A list of rows, and the same as CSV. Each row is turned into text only once."""

    def __init__(self, rows: Any = ()):
        """rows: what `pack` returned, or the rows themselves."""
        if isinstance(rows, str):
            lines = csv.DictReader(io.StringIO(rows))
            rows = ({name: float(value) for name, value in line.items() if value} for line in lines)
        super().__init__(rows)
        self.columns: list[str] = []
        self.text, self.packed = io.StringIO(), 0  # the first `packed` rows as CSV
        self.written = -1  # bytes of it in the file

    def pack(self) -> str:
        """The rows as CSV. Where a row lacks a number, its cell is empty."""
        columns = list(dict.fromkeys(itertools.chain(self.columns, *self[self.packed :])))
        if columns != self.columns:
            self.columns, self.text, self.packed, self.written = columns, io.StringIO(), 0, -1
            csv.writer(self.text, lineterminator="\n").writerow(columns)
        csv.DictWriter(self.text, columns, lineterminator="\n").writerows(self[self.packed :])
        self.packed = len(self)
        return self.text.getvalue()

    def write(self, path: Path) -> None:
        """Append the rows that the file lacks. If its size has changed since, or a column is new, rewrite it."""
        content = self.pack().encode()
        if path.is_file() and path.stat().st_size == self.written:
            append(path, content[self.written :])
        else:
            write_atomically(path, content)
        self.written = len(content)
