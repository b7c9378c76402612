"""Model folders that are made once and kept: whole or absent, also when two processes start at once."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from finerank.errors import StorageError
from finerank.files import cache_folder, replace_folder, storage_errors


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
            with FileLock(folder.with_name(f".{name}.lock")):
                if not _is_made(folder, source):  # another process may have made it while this one waited
                    with replace_folder(folder) as aside:
                        make(aside)
                        (aside / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    except StorageError as error:
        raise StorageError(f"{error} The environment variable FINERANK_HOME names the cache folder.") from error
    return folder


def _is_made(folder: Path, source: Mapping[str, str | int]) -> bool:
    try:
        return json.loads((folder / "source.json").read_text(encoding="utf-8")) == dict(source)
    except (OSError, ValueError):
        return False
