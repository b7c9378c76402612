"""CSV and TSV: the first line names the columns; every cell is text. Cells may hold line breaks between quotes."""

import csv
import io
from pathlib import Path
from typing import Any

from finerank.data.readers import Rows, extension_of, open_binary
from finerank.data.rows import BadRow

EXTENSIONS = (".csv", ".tsv")

csv.field_size_limit(1 << 30)


def read(path: Path) -> Rows:
    """The file's rows."""
    delimiter = "\t" if extension_of(path) == ".tsv" else ","
    with open_binary(path) as file:
        # Bytes that are no UTF-8 become lone surrogates, which the handler names row by row.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield number + 1, BadRow("broken CSV; nothing after it could be read")
                return
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            number += 1
            yield number, _row(header, cells)


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow("the row has more or fewer cells than the header")
    return dict(zip(header, cells, strict=True))
