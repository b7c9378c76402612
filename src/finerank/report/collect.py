"""What a run folder says, as plain values; reads files only.

run = read_run(Path("runs/first"))
run.results["after_eval_loss"], run.metrics[-1]["loss"], run.settings["lora_r"]
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finerank.errors import DataError


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
        results=_json(folder / "results.json", {}),
        receipt=_json(folder / "receipt.json", {}),
        answers=_json(folder / "answers.json", []),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that a running or killed program left unfinished is skipped."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(path.read_text(encoding="utf-8").splitlines()):
                break
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); restore the file or remove the line."
            ) from error
    return rows


def _json(path: Path, empty: Any) -> Any:
    if not path.is_file():
        return empty
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}); restore it or remove it.") from error


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML ({error}); restore it or remove it.") from error
