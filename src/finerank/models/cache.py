"""Model folders that are made once and kept: whole or absent, also when two processes start at once."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from finerank.errors import StorageError
from finerank.files import cache_folder, remove_leftovers, replace_folder, storage_errors

logger = logging.getLogger(__name__)

CONVERTER = 1
"""Raised when conversion of GGUF files changes what it writes, so that folders of an older one are made again."""


def gguf_folder(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, converted first if needed. Raises ModelError, StorageError."""
    path = path.resolve()
    status = path.stat()
    source: dict[str, str | int] = {
        "file": str(path),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "converter": CONVERTER,
    }

    def make(folder: Path) -> None:
        from finerank.models.gguf_file import (
            convert_gguf,  # imports PyTorch, which a folder that is there has no use for
        )

        convert_gguf(path, folder)

    key = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    return made_once(f"{path.stem}-{key}", source, make)


def made_once(name: str, source: Mapping[str, str | int], make: Callable[[Path], None]) -> Path:
    """The folder `<cache folder>/models/<name>`, filled by `make(folder)` unless it is there already.

    Args:
        name: folder name.
        source: what it is made from; stored as `source.json`. A folder whose stored source differs is made again.
        make: fills the empty folder it is given. Runs in one process; others wait for it.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    folder = cache_folder() / "models" / name
    if _is_made(folder, source):
        return folder
    try:
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.parent):
                if not _is_made(folder, source):  # another process may have made it while this one waited
                    remove_leftovers(folder.parent)
                    with replace_folder(folder) as aside:
                        make(aside)
                        (aside / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    except StorageError as error:
        raise StorageError(f"{error} The environment variable FINERANK_HOME names the cache folder.") from error
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time; the operating system frees the lock of one that was killed."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        logger.info("waiting for another process that prepares a model in %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_made(folder: Path, source: Mapping[str, str | int]) -> bool:
    try:
        return json.loads((folder / "source.json").read_text(encoding="utf-8")) == dict(source)
    except (OSError, ValueError):
        return False
