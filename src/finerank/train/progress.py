"""What the user sees while a run goes on: a live bar on a terminal, plain lines in a log.

    step 12/63  loss 1.8421  eval_loss 1.7903  lr 1.9e-04  14.2 rows/s  2213 tokens/s  ETA 1:02

Everything goes to stderr; stdout is for results. Where stderr cannot be written to any more (a closed terminal, a full
disk) the run goes on in silence: metrics.jsonl has the same numbers.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


def say(message: str) -> None:
    """A line on stderr, if it can be written."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class RunProgress:
    """Speed over the last steps and one line, or one refreshed bar, a step."""

    def __init__(self, *, num_steps: int, first_step: int, log_interval: int):
        self.num_steps = num_steps
        self.log_interval = max(log_interval, 1)
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=20)  # seconds, rows, tokens of the last steps
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=Console(file=sys.stderr),
                transient=False,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=first_step)
            self._bar.start()

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            say(message)
            return
        with contextlib.suppress(OSError):
            self._bar.console.print(message, markup=False, highlight=False)

    def step(self, row: Mapping[str, Any], *, rows: int) -> None:
        """Show a metrics row of a step that took in `rows` samples; `rows` 0 is the evaluation before training."""
        if rows and row.get("step_seconds"):
            self._recent.append((row["step_seconds"], rows, row.get("tokens") or 0))
        text = self._text(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
            if row.get("eval_loss") is not None:
                self.say(f"step {row['step']}  {text}")
        elif row["step"] % self.log_interval == 0 or row["step"] == self.num_steps or row.get("eval_loss") is not None:
            self.say(f"step {row['step']}/{self.num_steps}  {text}")

    def close(self) -> None:
        """Stop the bar and leave its last state on the screen."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def _text(self, row: Mapping[str, Any]) -> str:
        parts = [f"{key} {row[key]:.4f}" for key in ("loss", "eval_loss") if isinstance(row.get(key), float)]
        for key, name in (("rewards/accuracies", "accuracy"), ("eval_rewards/accuracies", "eval_accuracy")):
            if isinstance(row.get(key), float):
                parts.append(f"{name} {row[key]:.2f}")
        if row.get("skipped"):
            parts.append("skipped: not finite")
        if row.get("lr") is not None:
            parts.append(f"lr {row['lr']:.1e}")
        seconds = sum(s for s, _, _ in self._recent)
        if seconds > 0:
            left = (self.num_steps - row["step"]) * seconds / len(self._recent)
            parts.append(f"{sum(r for _, r, _ in self._recent) / seconds:.1f} rows/s")
            parts.append(f"{sum(t for _, _, t in self._recent) / seconds:.0f} tokens/s")
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        return "  ".join(parts)


class Stopwatch:
    """Seconds since the last `lap()`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since creation or the last call."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed
