"""What a run measured: `metrics.jsonl`, one JSON object a step, and the trackers of `--report-to`.

    {"step": 3, "loss": 1.92, "eval_loss": null, "lr": 0.0002, "grad_norm": 0.71, "step_seconds": 1.3,
     "tokens": 3120, "trained_tokens": 911, "peak_memory_bytes": 1203445760}

Step 0 is the state before training: only `eval_loss` is set. A value that was not measured, or is not finite, is
null, so every line is valid JSON. A skipped step (see `--on-nonfinite skip`) says `"skipped": true`.
"""

import contextlib
import importlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from finerank.errors import MissingExtraError
from finerank.files import replace_file, storage_errors

FILE_NAME = "metrics.jsonl"
KEYS = (
    "step",
    "loss",
    "eval_loss",
    "lr",
    "grad_norm",
    "step_seconds",
    "tokens",
    "trained_tokens",
    "peak_memory_bytes",
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line that a kill cut short is left out. Missing file: no lines."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def measures_at(rows: Iterable[Mapping[str, Any]], step: int, prefix: str = "eval_") -> dict[str, float]:
    """What a loss measured after a step besides its value, e.g. `rewards/margins`, by name without the prefix."""
    (row,) = [row for row in rows if row["step"] == step][-1:] or [{}]
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and "/" in k}


class Tracker(Protocol):
    """Where numbers also go: TensorBoard or W&B."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Appends rows to `metrics.jsonl` and hands their numbers to trackers."""

    def __init__(self, path: Path, *, history: Iterable[Mapping[str, Any]] = (), trackers: Sequence[Tracker] = ()):
        """Begin the file anew with the rows of `history` (those before the resumed step)."""
        self.path = path
        self.trackers = list(trackers)
        with replace_file(path) as aside:
            aside.write_text("".join(_line(row) for row in history), encoding="utf-8")
        self._backlog = b""
        # unbuffered, so that a kill loses no finished step and a full disk leaves us knowing what was not written
        with storage_errors(path):
            self._file = self._open()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step. On a full disk the row waits and is written with a later one; StorageError says so."""
        self._backlog += _line(row).encode()
        numbers = {k: float(v) for k, v in row.items() if k != "step" and _is_finite_number(v)}
        try:
            for tracker in self.trackers:
                with storage_errors(self.path.parent):
                    tracker.log(row["step"], numbers)
        finally:
            self._flush()

    def _open(self) -> io.FileIO:
        return io.FileIO(self.path, "a+")

    def _flush(self) -> None:
        with storage_errors(self.path):
            self._put_back()
            while self._backlog:
                self._backlog = self._backlog[self._file.write(self._backlog) :]

    def _put_back(self) -> None:
        """When someone has removed the file, write it anew: the open one still has all rows."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        self._file.seek(0)
        rows = self._file.readall() or b""
        with replace_file(self.path) as aside:
            aside.write_bytes(rows)
        self._file.close()
        self._file = self._open()

    def flush_to_disk(self) -> None:
        """Bring the rows to the disk itself, where they survive a power cut, too. Raises StorageError."""
        self._flush()
        with storage_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits and close the file and the trackers. Raises StorageError."""
        try:
            self._flush()
        finally:
            self._file.close()
            for tracker in self.trackers:
                with storage_errors(self.path.parent):
                    tracker.close()


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _line(row: Mapping[str, Any]) -> str:
    whole = {**dict.fromkeys(KEYS), **row}
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in whole.items()}
    return json.dumps(clean) + "\n"


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        # rows after the resumed step, written before a kill, are hidden by purge_step
        self.writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, folder: Path, first_step: int):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise _missing("wandb") from error
        self.run = wandb.init(dir=str(folder), name=folder.name, resume="allow" if first_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(f"--report-to {package} needs a package that is absent: pip install 'finerank[track]'.")


def open_trackers(names: Sequence[str], folder: Path, *, first_step: int) -> list[Tracker]:
    """The trackers of `--report-to`, writing below the run folder. Raises MissingExtraError."""
    return [_TRACKERS[name](folder / name if name == "tensorboard" else folder, first_step) for name in names]
