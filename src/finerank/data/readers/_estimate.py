"""About how many rows a file has, for a progress bar: exact where the file says so, else counted or guessed quickly."""

import re
from pathlib import Path

from finerank.data.readers import extension_of

_BLOCK = 1 << 20
_FIRST_NAME = re.compile(rb'[\[{,\s]*("(?:[^"\\]|\\.)*"\s*:)')


def estimated_rows(path: Path) -> int | None:
    """Rows of a file, or None where that would cost as much as reading it.

    Parquet files know it; in lines it is their number; in a JSON array it is how often the first name in it occurs.
    """
    extension = extension_of(path)
    if extension != path.suffix.lower():  # compressed
        return None
    try:
        if extension == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if extension in (".jsonl", ".ndjson", ".txt"):
            return _occurrences(path, b"\n")
        if extension == ".json":
            with path.open("rb") as file:
                found = _FIRST_NAME.match(file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf"))
            return _occurrences(path, found[1]) if found else None
    except Exception:  # a file that cannot be read is named by its reader
        return None
    return None


def _occurrences(path: Path, wanted: bytes) -> int:
    count = 0
    tail = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            block = tail + block
            count += block.count(wanted)
            tail = block[len(block) - len(wanted) + 1 :] if len(wanted) > 1 else b""
    return count
