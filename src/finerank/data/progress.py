"""What the user sees while rows are prepared: a bar on a terminal, a line every `interval` rows elsewhere.

    with RowProgress(files, interval=10_000) as progress:
        progress.show(512)           so many rows are done

Everything goes to stderr. Where that cannot be written to, the work goes on in silence.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finerank.data.readers._estimate import estimated_rows


class RowProgress:
    """Rows done and rows a second; `interval` 0 shows nothing."""

    def __init__(self, files: Sequence[Path], *, interval: int):
        self.interval = interval
        self._rows = 0
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if interval and sys.stderr.isatty():
            counts = [estimated_rows(path) for path in files]
            total = sum(n for n in counts if n is not None) if None not in counts else None
            self._bar = Progress(
                TextColumn("rows"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}  {task.description}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr),
            )
            self._task = self._bar.add_task("", total=total)

    def show(self, rows: int) -> None:
        """Say that so many rows are done."""
        before, self._rows = self._rows, rows
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=rows, description=self._rate())
        elif self.interval and rows // self.interval > before // self.interval:
            with contextlib.suppress(OSError):
                print(f"{rows} rows, {self._rate()}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        return f"{self._rows / max(time.monotonic() - self._started, 1e-9):.0f} rows a second"

    def __enter__(self) -> "RowProgress":
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                if kind is None:  # the number of rows may have been a guess
                    self._bar.update(self._task, total=self._rows, completed=self._rows)
                self._bar.stop()
