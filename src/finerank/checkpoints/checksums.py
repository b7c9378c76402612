"""SHA-256 of written files, so that a flipped bit is found and named: formats like safetensors have no checksum.

    write_checksums(folder)        after a merge, conversion or export: checksums.json lists every weight file
    check_checksums(folder)        before one: raises CheckpointError naming the file that is not as it was written

A run's own checkpoints list all their files in their manifest with the same functions. Small text files of a model
folder (config, tokenizer) are left out on purpose: people edit those.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finerank.errors import CheckpointError
from finerank.files import sha256_file, walk

FILE_NAME = "checksums.json"
_WEIGHT_FILES = {".safetensors", ".pt", ".pth", ".gguf"}


def fingerprints(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files, by their path inside `folder`, sorted."""
    names = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in names}


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for _, paths in walk(folder) for path in paths]


def difference(folder: Path, recorded: Mapping[str, Any], *, listed_in: str) -> str | None:
    """What is not as recorded, in words; None when every file is."""
    for name, entry in sorted(recorded.items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{listed_in} names {name}, which is outside"
        try:
            if not path.is_file():
                return f"{name} is missing"
            if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
                return f"{name} is cut short or of another size"
            if sha256_file(path) != entry.get("sha256"):
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` over the weight files below a folder."""
    files = fingerprints(folder, (path for path in files_below(folder) if path.suffix in _WEIGHT_FILES))
    text = json.dumps({"files": files}, indent=1, sort_keys=True)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """Compare a folder with its `checksums.json`, where it has one. Raises CheckpointError."""
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["files"]
        problem = difference(folder, recorded, listed_in=FILE_NAME)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged; restore it, or remove it to go on without checksums.") from error
    if problem:
        raise CheckpointError(
            f"{folder}: {problem}; write the folder anew, or remove {FILE_NAME} if the change is meant."
        )
