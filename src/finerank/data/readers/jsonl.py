"""JSON lines: one object on each line; blank lines are no rows. A line that is no JSON is one bad row."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from finerank.data.readers import Rows, as_row, open_binary
from finerank.data.rows import BadRow

EXTENSIONS = (".jsonl", ".ndjson")


def read(path: Path) -> Rows:
    """The file's rows."""
    with open_binary(path) as file:
        yield from read_lines(file)


def read_lines(lines: Iterable[bytes]) -> Rows:
    """The rows of lines."""
    number = 0
    for line in lines:
        if not line.strip():
            continue
        number += 1
        yield number, parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def parse(text: bytes) -> dict[str, Any] | BadRow:
    """One row from its JSON text."""
    try:
        return as_row(orjson.loads(text))
    except ValueError:
        pass
    try:
        return as_row(json.loads(text))  # accepts lone surrogates and NaN, so that the handler names what is wrong
    except (ValueError, RecursionError):
        return BadRow("broken JSON")
