"""Plain text for continued pretraining: rows with the column `text`.

A row is each line that is not blank; with `sample_by` each paragraph (blank lines lie between), or the whole file.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finerank.data.readers import Rows, open_binary

EXTENSIONS = (".txt",)


def read(path: Path, sample_by: str = "line") -> Rows:
    """The file's rows; `sample_by` is line, paragraph or document."""
    with open_binary(path) as file:
        yield from enumerate(({"text": text} for text in _texts(_lines(file), sample_by)), 1)


def _lines(file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file):
        text = line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")
        yield text.removeprefix("\ufeff") if number == 0 else text


def _texts(lines: Iterator[str], sample_by: str) -> Iterator[str]:
    if sample_by == "line":
        yield from (line for line in lines if line.strip())
    elif sample_by == "paragraph":
        for is_text, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
            if is_text:
                yield "\n".join(group)
    elif text := "\n".join(lines).strip("\n"):
        yield text
