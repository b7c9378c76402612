"""Where a merge or conversion writes: a folder that is replaced whole, and never one that holds something else.

with output_folder(Path("merged"), sources=[base, adapter], overwrite=False) as folder: ...
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from finerank.checkpoints.checksums import write_checksums
from finerank.errors import ConfigError
from finerank.files import replace_folder

REPORTS = ("merge_report.json", "conversion_report.json")
"""Either marks a folder that finerank wrote, which may be replaced by the next run of the same command."""


@contextlib.contextmanager
def output_folder(
    folder: Path, *, sources: Sequence[Path | None], overwrite: bool, flag: str = "--save-dir"
) -> Iterator[Path]:
    """A new folder to fill that takes the place of `folder` when all went well; its weight files get checksums.

    Raises:
        ConfigError: `folder` is one of the sources, holds one, or holds files that finerank did not write.
        StorageError: the disk is full, read-only or gone.
    """
    check_output(folder, sources=sources, overwrite=overwrite, flag=flag)
    _remove_stale(folder)
    with replace_folder(folder) as aside:
        yield aside
        write_checksums(aside)


def check_output(folder: Path, *, sources: Sequence[Path | None], overwrite: bool, flag: str = "--save-dir") -> None:
    """The checks of `output_folder` alone. Raises ConfigError."""
    target = folder.resolve()
    for source in sources:
        if source is not None and (target == source.resolve() or target in source.resolve().parents):
            raise ConfigError(f"{flag} {folder} holds the input {source}; choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{flag} {folder} is a file; choose a folder.")
    is_ours = any((folder / report).is_file() for report in REPORTS)
    if folder.is_dir() and any(folder.iterdir()) and not is_ours and not overwrite:
        raise ConfigError(
            f"{flag} {folder} is not empty and was not written by finerank; choose another folder, or "
            "--overwrite to replace everything in it."
        )


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs left beside `folder`; a living process keeps its own."""
    pattern = re.compile(re.escape(folder.name) + r"\.finerank-aside-(\d+)-[0-9a-f]{8}")
    if not folder.parent.is_dir():
        return
    for path in folder.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _is_running(int(match[1])) and (folder.exists() or not _is_whole(path)):
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Killed between the two renames: this is the old or the new folder, and the only one; leave it to the user."""
    return any((path / report).is_file() for report in REPORTS)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
