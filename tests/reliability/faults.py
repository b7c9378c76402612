"""Faults in file operations: fail, or die at, the n-th one of a save.

Every way a save touches the disk is wrapped: opening, writing, flushing, renaming, making and removing. `count` tells
how many operations there are, so a test can visit each one instead of drawing some.
"""

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

OS_OPERATIONS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "scandir", "link", "remove")


class Faults:
    """Counts file operations and calls `strike(name)` at operation number `at` (from 1)."""

    def __init__(self, at: int, strike: Callable[[str], None]):
        self.at, self.strike, self.count, self.names = at, strike, 0, list[str]()

    def touch(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.at:
            self.strike(name)


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Wrap the operations of `os` and the writes of files opened meanwhile."""
    before: dict[str, Any] = {name: getattr(os, name) for name in OS_OPERATIONS}
    before_open, before_io_open = builtins.open, io.open

    def wrap(name: str) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            faults.touch(name)
            return before[name](*args, **kwargs)

        return operation

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not any(c in mode for c in "wax+"):
            return before_open(file, mode, *args, **kwargs)
        faults.touch("open for writing")
        opened = before_open(file, mode, *args, **kwargs)
        return _Writes(opened, faults)

    try:
        for name in OS_OPERATIONS:
            setattr(os, name, wrap(name))
        builtins.open = io.open = open_file  # type: ignore[assignment]
        yield faults
    finally:
        for name in OS_OPERATIONS:
            setattr(os, name, before[name])
        builtins.open, io.open = before_open, before_io_open


class _Writes:
    """A file whose write and close may fail; half of the bytes of a failing write are written."""

    def __init__(self, file: Any, faults: Faults):
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        try:
            self._faults.touch("write")
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        self._faults.touch("close")

    def __enter__(self) -> "_Writes":
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.close()
        else:
            self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
