"""Parquet, read in record batches."""

from pathlib import Path

from finerank.data.readers import Rows, only_uncompressed
from finerank.errors import DataError

EXTENSIONS = (".parquet",)


def read(path: Path) -> Rows:
    """The file's rows."""
    import pyarrow
    import pyarrow.parquet

    only_uncompressed(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no whole Parquet file ({str(error).splitlines()[0]}); restore it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text after row {number} is not UTF-8 ({error.reason}); write it anew.") from error
