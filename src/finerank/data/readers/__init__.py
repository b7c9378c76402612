"""Readers: files to rows, one at a time, so that a file need not fit into memory.

    for number, row in read_rows(path):     number counts from 1; row is a dict, or a BadRow with the reason
    input_files(["data/", "more.jsonl.gz"])

A reader is a module in this folder with `EXTENSIONS` and `read(path)`. Any of the text formats may be compressed
(`.gz`, `.zst`). In a folder, the most frequent extension wins and the others are left alone, as MindSpeed-LLM does.
"""

import collections
import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from finerank import registry
from finerank.data.rows import BadRow
from finerank.errors import DataError

logger = logging.getLogger(__name__)

Rows = Iterator[tuple[int, dict[str, Any] | BadRow]]
_COMPRESSED = (".gz", ".zst")
_PART_OF_PREFIX = re.compile(r"(_packed_\w+_document|_text_document)?(\.bin|\.idx)?\Z")


def extensions() -> dict[str, str]:
    """Extension, with its dot -> name of the reader."""
    return {e: name for name in registry.names(__name__) for e in _load(name).EXTENSIONS}


def extension_of(path: Path) -> str:
    """The extension that decides the reader: `.jsonl` for `rows.jsonl.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def input_files(paths: Sequence[str]) -> list[Path]:
    """The files that the given files and folders stand for, in order. Raises DataError for what is not there."""
    known = extensions()
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            files += _in_folder(path, known)
        elif path.suffix in (".bin", ".idx") or path.with_name(path.name + ".idx").is_file():
            prefix = _PART_OF_PREFIX.sub("", name)
            raise DataError(f"{name} is a part of indexed files; give their prefix, {prefix}, to tune or inspect.")
        elif not path.is_file():
            raise DataError(f"There is no file or folder {name}; correct --data-path (or --input).")
        elif extension_of(path) not in known:
            raise DataError(
                f"{name} has no known extension; give one of {', '.join(sorted(known))}, perhaps with .gz or .zst."
            )
        else:
            files.append(path)
    return files


def _in_folder(folder: Path, known: dict[str, str]) -> list[Path]:
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and extension_of(p) in known]
    if not found:
        raise DataError(f"The folder {folder} holds no rows; put files of {', '.join(sorted(known))} there.")
    counts = collections.Counter(extension_of(p) for p in found)
    most = max(sorted(counts), key=lambda e: counts[e])
    left = len(found) - counts[most]
    if left:
        logger.warning(
            "%s: reading its %d %s files; %d of other kinds are left alone", folder, counts[most], most, left
        )
    return [p for p in found if extension_of(p) == most]


def read_rows(path: Path, *, sample_by: str = "line") -> Rows:
    """(row number from 1, row or why there is none) for each row of a file. Raises DataError for an unreadable file.

    `sample_by` says what a row of plain text is: a line, a paragraph or the document.
    """
    reader = _load(extensions()[extension_of(path)])
    try:
        yield from reader.read(path, sample_by) if is_plain_text(path) else reader.read(path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"Cannot read {path}: {error}; restore the file or leave it out.") from error


def is_plain_text(path: Path) -> bool:
    """Whether the file's rows are texts without columns."""
    return extensions()[extension_of(path)] == "txt"


def open_binary(path: Path) -> BinaryIO:
    """The file's bytes, decompressed by its extension."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), 1 << 20)  # type: ignore[arg-type]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(zstandard.open(path, "rb"), 1 << 20)  # type: ignore[arg-type]
    return open(path, "rb", buffering=1 << 20)


def only_uncompressed(path: Path) -> None:
    """Raise DataError for formats that compress by themselves and are read in place."""
    if path.suffix.lower() in _COMPRESSED:
        raise DataError(f"{path} is compressed twice; decompress it first.")


def as_row(value: Any) -> dict[str, Any] | BadRow:
    """A value as a row, if it is an object."""
    return value if isinstance(value, dict) else BadRow("the row is not an object")


def _load(name: str) -> Any:
    return registry.load(__name__, name, "reader")
