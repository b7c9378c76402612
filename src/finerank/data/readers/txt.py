"""Plain text for continued pretraining: each line that is not blank is a row with the column `text`."""

from pathlib import Path

from finerank.data.readers import Rows, open_binary

EXTENSIONS = (".txt",)


def read(path: Path) -> Rows:
    """The file's rows."""
    number = 0
    with open_binary(path) as file:
        for line in file:
            text = line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")
            text = text.removeprefix("\ufeff") if number == 0 else text
            if text.strip():
                number += 1
                yield number, {"text": text}
