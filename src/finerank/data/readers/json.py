"""JSON: an array of objects, streamed; a file of JSON lines under this name is read as such.

Where the array breaks off or is damaged, the rows before are used, and the place counts as one bad row: nothing can be
read after it.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import orjson

from finerank.data.readers import Rows, as_row, jsonl, open_binary
from finerank.data.rows import BadRow
from finerank.errors import DataError

EXTENSIONS = (".json",)

WHOLE_BYTES = 32 << 20
"""Files up to this size are parsed at once, which is several times faster than streaming."""


def read(path: Path) -> Rows:
    """The file's rows."""
    with open_binary(path) as file:
        start = _skip_blank(file)
        if start == b"[":
            yield from _array(file)
        elif start == b"{":
            yield from _objects(file, path)
        elif start:
            raise DataError(f"{path} is no JSON array of rows: it begins with {start!r}; correct the file.")


def _skip_blank(file: BinaryIO) -> bytes:
    """Move to the first character that counts, and return it."""
    if file.peek(3)[:3] == b"\xef\xbb\xbf":  # type: ignore[attr-defined]
        file.read(3)
    while (start := file.peek(1)[:1]) and start in b" \t\r\n":  # type: ignore[attr-defined]
        file.read(1)
    return start


def _array(file: BinaryIO) -> Rows:
    head = file.read(WHOLE_BYTES)
    if len(head) < WHOLE_BYTES:
        values = _whole(head)
        if values is not None:
            yield from ((i, as_row(value)) for i, value in enumerate(values, start=1))
            return
    yield from _stream(_Chained(head, file))


def _whole(text: bytes) -> list[Any] | None:
    for parse in (orjson.loads, json.loads):  # the second accepts lone surrogates; the handler names them
        try:
            return parse(text)
        except (ValueError, RecursionError):
            continue
    return None


def _stream(file: Any) -> Rows:
    number = 0
    values: Iterator[Any] = ijson.items(file, "item", use_float=True, buf_size=1 << 18)
    while True:
        try:
            value = next(values)
        except StopIteration:
            return
        except (ijson.JSONError, ValueError, RecursionError):
            yield number + 1, BadRow("broken JSON; nothing after it could be read")
            return
        number += 1
        yield number, as_row(value)


def _objects(file: BinaryIO, path: Path) -> Rows:
    """JSON lines, or one object, which is refused with the name of the list inside it."""
    first = file.readline()
    try:
        orjson.loads(first)
    except ValueError:
        rest = file.read(WHOLE_BYTES) + file.readline()
        whole = _whole(first + rest)
        if isinstance(whole, dict):
            lists = [key for key, value in whole.items() if isinstance(value, list)]
            hint = f" (its rows may be under {lists[0]!r})" if lists else ""
            raise DataError(f"{path} holds one JSON object, not a list of rows{hint}; make it an array.") from None
        yield from jsonl.read_lines(itertools.chain([first], rest.splitlines(), file))
        return
    yield from jsonl.read_lines(itertools.chain([first], file))


class _Chained:
    """A head that was read already, then the file."""

    def __init__(self, head: bytes, file: BinaryIO):
        self.head, self.at, self.file = head, 0, file

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        if self.at < len(self.head):
            end = len(self.head) if size < 0 else self.at + size
            piece = self.head[self.at : end]
            self.at += len(piece)
            if self.at >= len(self.head):
                self.head, self.at = b"", 0
            return piece
        return self.file.read(size)
