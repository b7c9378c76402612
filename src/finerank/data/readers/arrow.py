"""Arrow: the stream format, which `datasets` saves, or the file format; a record batch at a time.

Not memory-mapped: a file that is cut short while it is read would end the process with a bus error.
"""

from pathlib import Path

from finerank.data.readers import Rows, only_uncompressed
from finerank.errors import DataError

EXTENSIONS = (".arrow", ".feather")

_MOST_ROWS_PER_BYTE = 8
"""A column needs a bit for a row; a batch that claims more has no columns, or one run of billions of nulls."""


def read(path: Path) -> Rows:
    """The file's rows."""
    import pyarrow

    only_uncompressed(path)
    number = 0
    try:
        with pyarrow.OSFile(str(path)) as source:
            for batch in _batches(source):
                batch.validate(full=True)  # offsets that point outside would be followed
                if batch.num_rows > _MOST_ROWS_PER_BYTE * batch.nbytes:
                    raise DataError(
                        f"{path} claims {batch.num_rows} rows in {batch.nbytes} bytes after row {number}; write it new."
                    )
                for start in range(0, batch.num_rows, 1024):
                    for row in batch.slice(start, 1024).to_pylist():
                        number += 1
                        yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no whole Arrow file ({str(error).splitlines()[0]}); restore it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text after row {number} is not UTF-8 ({error.reason}); write it anew.") from error


def _batches(source):  # type: ignore[no-untyped-def]
    import pyarrow.ipc

    if source.read(6) == b"ARROW1":
        source.seek(0)
        file = pyarrow.ipc.open_file(source)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    source.seek(0)
    return iter(pyarrow.ipc.open_stream(source))
