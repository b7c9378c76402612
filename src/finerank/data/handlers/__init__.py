"""Handlers: what a row of a certain form means as a conversation.

    handler = make_handler("AlpacaStyleInstructionHandler", map_keys=None)     by name
    handler = detect_handler(rows)                                             by the columns of the first rows
    conversation = handler.convert(row)                                        raises BadRow with the reason

A handler is a module in this folder with `NAMES` (the class names of MindSpeed-LLM), `KEYS` (what `--map-keys` may
rename), `matches(row)` and `convert(row, columns)`. They are asked in the order of their `ORDER`, from special to
general, so that a row with `chosen` and `rejected` is never taken for a plain instruction.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from finerank import registry
from finerank.data.rows import BadRow
from finerank.data.types import Conversation
from finerank.errors import ConfigError, unknown_name

Row = dict[str, Any]
_OPTIONAL = ("history", "system", "tools")


@dataclass(frozen=True)
class Columns:
    """Which column has which role; `named` says that the handler was asked for by its class name.

    A role without a column is absent. Roles not listed have their usual column.
    """

    by_role: Mapping[str, Any]
    named: bool = False

    def get(self, row: Row, role: str, default: str) -> Any:
        """The value of a role's column, or None. Raises BadRow when `--map-keys` names a column the row lacks."""
        if role not in self.by_role:
            return row.get(default)
        column = self.by_role[role]
        if not column:
            return None
        if column not in row:
            raise BadRow(f"no column '{column}'")
        return row[column]

    def need(self, row: Row, role: str, default: str) -> Any:
        """The same for a role that every row must have: a missing column is a BadRow too."""
        if role not in self.by_role and default not in row:
            raise BadRow(f"no column '{default}'")
        return self.get(row, role, default)


@dataclass(frozen=True)
class Handler:
    """A row format with its columns."""

    name: str
    columns: Columns
    mask_history: bool = False

    @property
    def kind(self) -> str:
        """What its rows are: "instruction", "pairwise" or "text"."""
        return "pairwise" if self.name.endswith("pairwise") else "text" if self.name == "pretrain" else "instruction"

    def convert(self, row: Row) -> Conversation:
        """The row's conversation; with `mask_history`, only the last answer is trained. Raises BadRow."""
        conversation = _module(self.name).convert(row, self.columns)
        if not self.mask_history:
            return conversation
        answers = [i for i, m in enumerate(conversation.messages) if m.trained]
        last = answers[-1] if answers else -1
        messages = tuple(replace(m, trained=m.trained and i == last) for i, m in enumerate(conversation.messages))
        return replace(conversation, messages=messages)

    def unread(self, rows: Sequence[Any]) -> list[str]:
        """Columns with something in them that `convert` does not read, judged by those of `rows` that it takes."""
        read: set[str] = set()
        filled: set[str] = set()
        for row in rows:
            watched = _Watched(row) if isinstance(row, dict) else None
            try:
                if watched is not None:
                    self.convert(watched)
                    read |= watched.read
                    filled |= {str(column) for column, value in row.items() if value not in (None, "", [], {})}
            except BadRow:
                continue
        return sorted(filled - read)

    def notes(self, rows: Sequence[Any]) -> list[str]:
        """What the receipt should say about columns that are not read."""
        unread = self.unread(rows)
        roles = [column for column in unread if column in _OPTIONAL and column in _module(self.name).KEYS]
        notes = []
        if roles:
            example = " ".join(f"{role}={role}" for role in roles)
            notes.append(f"these rows can have {', '.join(roles)}, which are not read; add --map-keys {example}")
        if others := [column for column in unread if column not in roles]:
            notes.append(f"columns that are not used: {', '.join(others)}")
        return notes


class _Watched(dict[str, Any]):
    """A row that knows which of its columns were read."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)


def make_handler(name: str, *, map_keys: Mapping[str, Any] | None = None, mask_history: bool = False) -> Handler:
    """The handler of a class name (`AlpacaStyleInstructionHandler`) or file name (`alpaca`). Raises ConfigError."""
    by_name = {alias: stem for stem in registry.names(__name__) for alias in (stem, *_module(stem).NAMES)}
    stem = by_name.get(name) or by_name.get(name.replace("-", "_"))
    if stem is None:
        raise ConfigError(unknown_name("handler", name, by_name))
    return Handler(stem, _columns(stem, map_keys, named=name != stem), mask_history)


def detect_handler(
    rows: Sequence[Row], *, map_keys: Mapping[str, Any] | None = None, mask_history: bool = False
) -> Handler | None:
    """The handler of the first of `rows` that one of them knows; None when there is no such row. Raises ConfigError."""
    known = sorted({key for stem in registry.names(__name__) for key in _module(stem).KEYS})
    for role in map_keys or {}:
        if role not in known:
            raise ConfigError("--map-keys: " + unknown_name("role", role, known))
    for row in rows:
        columns = dict(row)
        for role, column in (map_keys or {}).items():
            if isinstance(column, str) and column in row:  # judged by what the columns are called after renaming
                columns[_default_column(role, row[column], has_tags="tags" in (map_keys or {}))] = row[column]
        for stem in sorted(registry.names(__name__), key=lambda s: (_module(s).ORDER, s)):
            if set(map_keys or {}) <= set(_module(stem).KEYS) and _module(stem).matches(columns):
                return Handler(stem, _columns(stem, map_keys, named=False), mask_history)
    return None


def _default_column(role: str, value: Any, *, has_tags: bool) -> str:
    if role == "messages":
        first = value[0] if isinstance(value, list) and value else None
        is_chat = isinstance(first, dict) and "role" in first and not has_tags
        return "messages" if is_chat else "conversations"  # ShareGPT's turns, whose keys may have any name
    return {"prompt": "instruction", "query": "input", "response": "output"}.get(role, role)


def _columns(stem: str, map_keys: Mapping[str, Any] | None, *, named: bool) -> Columns:
    for key in map_keys or {}:
        if key not in _module(stem).KEYS:
            raise ConfigError("--map-keys: " + unknown_name(f"role of the {stem} rows", key, _module(stem).KEYS))
    return Columns(dict(map_keys or {}), named)


@functools.cache  # asked for each row
def _module(stem: str) -> ModuleType:
    return registry.load(__name__, stem, "handler")
