"""What a run folder says, as plain values; reads files only.

run = read_run(Path("runs/first"))
run.results["after_eval_loss"], run.metrics[-1]["loss"], run.settings["lora_r"]
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finerank.errors import DataError

NATS, PER_PAIR = "nats per token", "per pair"
"""Units of losses: of a supervised loss, of one over pairs of answers."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder's files, parsed. What is not there is empty."""

    folder: Path
    metrics: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `answers.json`: a prompt and the answers of several models."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def loss_unit(self) -> str:
        """What the run's losses are in."""
        by_stage = PER_PAIR if self.settings.get("stage") == "dpo" else NATS
        return str(self.results.get("loss_unit") or by_stage)


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises DataError when it holds no metrics."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder} is no run folder: it has no metrics.jsonl. Give the --output-dir of finerank tune.")
    return Run(
        folder=folder,
        metrics=read_metrics(path),
        settings=_yaml(folder / "config.yaml"),
        results=_json(folder / "results.json", dict),
        receipt=_json(folder / "receipt.json", dict),
        answers=_json(folder / "answers.json", list),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that a running or killed program left unfinished is skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {(error.strerror or str(error)).lower()}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON; restore the file or remove the line.") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}, line {number}: not a step of a run; restore the file or remove the line.")
        rows.append(row)
    return rows


def _json(path: Path, kind: type) -> Any:
    return _read(path, kind, json.loads, "JSON")


def _yaml(path: Path) -> dict[str, Any]:
    return _read(path, dict, yaml.safe_load, "YAML")


def _read(path: Path, kind: type, parse: Callable[[str], Any], name: str) -> Any:
    """The file's value, or an empty one where there is no file. Raises DataError when it is not what it should be."""
    if not path.is_file():
        return kind()
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not {name} ({' '.join(str(error).split())}); restore or remove it.") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} must hold a {kind.__name__}, not a {type(value).__name__}; restore or remove it.")
    return value
