"""Writing that cannot be torn: aside, flushed to the disk, then renamed.

    with replace_file(path) as aside: aside.write_text(...)        a file appears whole or not at all
    with replace_folder(path) as aside: (aside / "a").write_text() a folder appears whole or not at all

The place aside lies in the same folder as the target, so that the rename is atomic, and is removed on any error.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from finerank.errors import StorageError

_ASIDE_MARK, _DISCARDED = ".finerank-aside-", "discarded-"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(folder: Path) -> list[tuple[Path, list[Path]]]:
    """(folder, its files) for `folder` and all below, innermost first. Unlike `rglob`, which silently leaves out what
    it may not read, raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    places = os.walk(folder, topdown=False, onerror=fail)
    return [(Path(place), [Path(place) / name for name in sorted(names)]) for place, _, names in places]


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below and including `folder`."""
    for place, files in walk(folder):
        for path in [*files, place]:
            fsync_path(path)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about writing `path` into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        fix = {
            errno.ENOSPC: "free space or choose another folder",
            errno.EDQUOT: "your quota is used up: free space or choose another folder",
            errno.EACCES: "choose a folder you may write to",
            errno.EPERM: "choose a folder you may write to",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.ENOENT: "the folder vanished: create it again or choose another",
        }.get(error.errno or 0, "choose another folder or repair the disk")
        raise StorageError(f"Cannot write {path}: {(error.strerror or str(error)).lower()}; {fix}.") from error


def _aside(path: Path, kind: str = "") -> Path:
    return path.with_name(f"{path.name}{_ASIDE_MARK}{kind}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path to write; on success it is flushed and renamed to `path`. Raises StorageError."""
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            yield aside
            fsync_path(aside)
            os.replace(aside, path)
            fsync_path(path.parent)
        except BaseException:
            _remove(aside)
            raise


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill; on success it is flushed and takes the place of `path`. Raises StorageError.

    An existing `path` is moved out of the way first and removed after the rename, so at every instant either the old
    or the new folder exists whole (under its name or under a name with the aside mark next to it).
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            aside.mkdir()
            yield aside
            fsync_tree(aside)
            old = None
            if path.exists():
                old = _aside(path)
                os.rename(path, old)
            os.rename(aside, path)
            fsync_path(path.parent)
            if old is not None:
                _remove(old)
        except BaseException:
            _remove(aside)
            raise


def discard_folder(path: Path) -> None:
    """Remove a folder so that a kill in the middle leaves no half of it under its name. Raises StorageError."""
    with storage_errors(path):
        old = _aside(path, _DISCARDED)
        os.rename(path, old)
        _remove(old)


def leftovers_of_replacing(folder: Path) -> list[tuple[Path, Path]]:
    """(target, folder aside) of each folder that a killed `replace_folder` left in `folder`, oldest first.

    Killed between its two renames it leaves no folder under the target's name but two aside, both whole.
    """
    found = []
    for aside in sorted(folder.glob(f"*{_ASIDE_MARK}*"), key=lambda p: p.lstat().st_mtime_ns):
        name, _, rest = aside.name.partition(_ASIDE_MARK)
        if name and aside.is_dir() and not rest.startswith(_DISCARDED):
            found.append((folder / name, aside))
    return found


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what processes that were killed while writing left aside in `folder`; returns the names.

    Only for a folder that no other process writes to, e.g. under its lock.
    """
    names = sorted(p.name for p in folder.glob(f"*{_ASIDE_MARK}*"))
    for name in names:
        _remove(folder / name)
    return names


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or absent."""
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where finerank keeps what it can make again: `FINERANK_HOME`, else `~/.cache/finerank`."""
    return Path(os.environ.get("FINERANK_HOME") or Path.home() / ".cache" / "finerank")
