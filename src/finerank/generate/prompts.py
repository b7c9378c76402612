"""Prompts from a file, one a line.

prompts.txt      each line that is not blank is a prompt
prompts.jsonl    "text", {"prompt": "text"}, {"messages": [{"role": "user", "content": "text"}]}, each with an
                 optional "system"; other keys are kept and come back in the answer's row
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finerank.data.types import Message
from finerank.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer, and the row it came from."""

    messages: tuple[Message, ...]
    row: dict[str, Any]


def make_messages(text: str, system: str | None) -> tuple[Message, ...]:
    """A user's first turn, after a system turn if there is one. Raises DataError for text that is no UTF-8."""
    turns = [] if system is None else [Message(role="system", content=system)]
    turns.append(Message(role="user", content=text))
    for turn in turns:
        try:
            turn.content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"The prompt is not valid UTF-8 text ({error.reason}); give it in UTF-8.") from error
    return tuple(turns)


def read_prompts(path: Path, *, system: str | None = None) -> list[Prompt]:
    """All prompts of a file; `system` is the system turn of those that bring none. Raises DataError with the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the prompts in {path} ({error}); give an existing UTF-8 file.") from error
    read = _from_json if path.suffix in (".jsonl", ".json") else _from_text
    prompts = [read(line, f"{path} line {n}", system) for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompts; put one on each line.")
    return prompts


def _from_text(line: str, place: str, system: str | None) -> Prompt:
    return Prompt(make_messages(line, system), {"prompt": line})


def _from_json(line: str, place: str, system: str | None) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}); write one JSON value on each line.") from error
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise DataError(f'{place} is no prompt: write a text or an object with "prompt" or "messages".')
    system = row.get("system", system)
    if isinstance(row.get("prompt"), str) and (system is None or isinstance(system, str)):
        return Prompt(make_messages(row["prompt"], system), row)
    if isinstance(row.get("messages"), list):
        return Prompt(_turns(row["messages"], place, system), row)
    raise DataError(f'{place} has neither "prompt" (a text) nor "messages" (a list); add one of them.')


def _turns(rows: Sequence[Any], place: str, system: str | None) -> tuple[Message, ...]:
    turns = []
    for row in rows:
        ok = isinstance(row, dict) and row.get("role") in ROLES and isinstance(row.get("content"), str)
        if not ok:
            raise DataError(f'{place}: each message needs a "role" ({", ".join(ROLES)}) and a "content" text.')
        turns.append(Message(role=row["role"], content=row["content"]))
    if not turns or turns[-1].role != "user":
        raise DataError(f"{place}: the last message must be the user's, since the answer follows it.")
    if system is not None and turns[0].role != "system":
        turns.insert(0, Message(role="system", content=system))
    return tuple(turns)
