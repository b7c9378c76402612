"""The receipt: what became of every row of every input file.

    receipt.files[0].drop(17, "the answer is empty")
    print(receipt.table())
    write_text(folder / "receipt.json", receipt.to_json())

For each file, `rows_read == rows_kept + rows_dropped`, and `rows_dropped` is the sum over the reasons; duplicates that
`--deduplicate` leaves out are one of the reasons.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FIRST_ROWS = 10
"""How many row numbers are kept for each reason."""

DUPLICATE = "exact copy of an earlier row"


@dataclass
class Counted:
    """How many rows, and the first of them."""

    count: int = 0
    first_rows: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        """Count one row."""
        self.count += 1
        if len(self.first_rows) < FIRST_ROWS:
            self.first_rows.append(row)

    def add_all(self, rows: np.ndarray) -> None:
        """Count several rows."""
        self.count += len(rows)
        self.first_rows += rows[: FIRST_ROWS - len(self.first_rows)].tolist()


@dataclass
class FileReceipt:
    """What became of the rows of one file."""

    path: str
    handler: str | None = None
    rows_read: int = 0
    rows_kept: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, Counted] = field(default_factory=dict)
    truncated: Counted = field(default_factory=Counted)
    duplicates: Counted = field(default_factory=Counted)
    lengths: dict[str, int] = field(default_factory=dict)
    """Samples by length in tokens: "65-128" -> how many."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the file, such as columns that are not read."""

    def drop(self, row: int, reason: str) -> None:
        """Count a row that was read and cannot be used."""
        self.rows_read += 1
        self.dropped.setdefault(reason, Counted()).add(row)

    def keep(self, row: int, *, truncated: bool) -> None:
        """Count a row that was read and used."""
        self.rows_read += 1
        self.rows_kept += 1
        if truncated:
            self.truncated.add(row)

    def keep_all(self, num_rows: int, *, truncated: np.ndarray) -> None:
        """Count several rows that were used, and the numbers of those that were cut."""
        self.rows_read += num_rows
        self.rows_kept += num_rows
        self.truncated.add_all(truncated)

    def add_samples(self, lengths: np.ndarray, trained_tokens: int) -> None:
        """Count samples made of kept rows."""
        self.samples += len(lengths)
        self.tokens += int(lengths.sum())
        self.trained_tokens += trained_tokens
        buckets = np.maximum(6, np.ceil(np.log2(np.maximum(lengths, 1)))).astype(int)
        for bucket, count in zip(*np.unique(buckets, return_counts=True), strict=True):
            name = f"{1 if bucket == 6 else 2 ** (bucket - 1) + 1}-{2**bucket}"
            self.lengths[name] = self.lengths.get(name, 0) + int(count)

    @property
    def rows_dropped(self) -> int:
        """Rows read and not used."""
        return sum(c.count for c in self.dropped.values())


@dataclass
class Receipt:
    """The receipts of all files, and remarks about the whole."""

    files: list[FileReceipt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Totals, then notes and files, as plain values."""
        totals = {
            name: sum(getattr(f, name) for f in self.files)
            for name in ("rows_read", "rows_kept", "rows_dropped", "samples", "tokens", "trained_tokens")
        }
        totals["truncated"] = sum(f.truncated.count for f in self.files)
        totals["duplicates"] = sum(f.duplicates.count for f in self.files)
        return {**totals, "notes": self.notes, "files": [_file_dict(f) for f in self.files]}

    def to_json(self) -> str:
        """The receipt as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Receipt":
        """The inverse of `to_dict`."""
        files = []
        for f in values["files"]:
            f = {k: v for k, v in f.items() if k != "rows_dropped"}
            f["dropped"] = {reason: Counted(**c) for reason, c in f["dropped"].items()}
            f["truncated"], f["duplicates"] = Counted(**f["truncated"]), Counted(**f["duplicates"])
            files.append(FileReceipt(**f))
        return cls(files, list(values["notes"]))

    def table(self) -> str:
        """The receipt for reading: a line for each file, below it why rows were dropped."""
        head = f"{'rows read':>10} {'kept':>9} {'dropped':>8} {'cut':>7} {'copies':>7} {'tokens':>11} {'trained':>11}"
        lines = [f"{head}  file"]
        for f in self.files:
            handler = f" ({f.handler})" if f.handler else ""
            lines.append(
                f"{f.rows_read:>10} {f.rows_kept:>9} {f.rows_dropped:>8} {f.truncated.count:>7} "
                f"{f.duplicates.count:>7} {f.tokens:>11} {f.trained_tokens:>11}  {Path(f.path).name}{handler}"
            )
            for reason, counted in sorted(f.dropped.items(), key=lambda item: -item[1].count):
                rows = ", ".join(map(str, counted.first_rows)) + (", ..." if counted.count > FIRST_ROWS else "")
                lines.append(f"{'':>10} {'':>9} {counted.count:>8}  {reason}: row {rows}")
            lines += [f"note: {Path(f.path).name}: {note}" for note in f.notes]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _file_dict(f: FileReceipt) -> dict[str, Any]:
    values = {**vars(f), "rows_dropped": f.rows_dropped}
    values["dropped"] = {reason: vars(c) for reason, c in f.dropped.items()}
    values["truncated"], values["duplicates"] = vars(f.truncated), vars(f.duplicates)
    return values
