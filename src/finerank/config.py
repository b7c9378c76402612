"""Settings: a dataclass, over it a YAML file, over that the command line. Strict, and saved resolved.

A setting has one name everywhere: `lora_r` in Python and YAML, `--lora-r` (or `--lora_r`) on the command line. Where
Megatron, MindSpeed-LLM or alpaca-lora has another name for the same thing, it is a further flag of the same setting:

    @dataclass(kw_only=True)
    class OptimSettings:
        lr: float = setting(2e-4, help="peak learning rate", flags=("--learning-rate",))

Settings of several parts are joined by inheritance, so the namespace stays flat. `parse` adds `--config FILE.yaml` and
`--dry-run` to every verb. Unknown keys and flags are refused with the nearest name.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finerank.errors import ConfigError, unknown_name
from finerank.flags import BOOL_WORDS, flag_name, inner_type, read_flags, split_items

T = TypeVar("T")


def setting(
    default: Any = MISSING,
    *,
    help: str,
    flags: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    positional: bool = False,
    split: bool = True,
    words: Sequence[str] = (),
) -> Any:
    """A dataclass field with what the command line needs.

    Args:
        default: value when neither YAML nor flag sets it; a list or dict is copied for each instance.
        help: one line for `--help`; say the unit.
        flags: further flag names for the same setting, as other programs spell it, e.g. `("--learning-rate",)`.
        choices: the allowed values of a string setting.
        positional: taken without a flag name (at most one a verb).
        split: a list on the command line may be written `a,b`; False where the items are free text.
        words: texts that a number may be instead, e.g. `("auto",)`.
    """
    metadata = {"help": help, "flags": tuple(flags), "choices": choices, "positional": positional, "split": split}
    metadata["words"] = tuple(words)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Parsed(typing.Generic[T]):
    """What the command line asked for; `dry_run` means: print the resolved settings and stop."""

    settings: T
    dry_run: bool


def parse(settings_class: type[T], argv: Sequence[str], *, verb: str, help: str = "") -> Parsed[T]:
    """Settings from defaults, then `--config`, then flags.

    `settings_class.IGNORED_FLAGS`, when there is one, names flags of other programs that change nothing here: each is
    accepted with a warning on stderr, with or without values. `settings_class.REPLACED_FLAGS` says of others what to
    use instead.

    Raises:
        ConfigError: an unknown flag or key (with the nearest name), a value of the wrong type, a missing setting.
        SystemExit: `--help` was asked for.
    """
    values = read_flags(settings_class, argv, verb=verb, help=help)
    dry_run = values.pop("dry_run", False)
    config = values.pop("config", None)
    merged = read_yaml(config, settings_class) if config else {}
    merged.update(values)
    return Parsed(build(settings_class, merged), dry_run)


def build(settings_class: type[T], values: dict[str, Any]) -> T:
    """An instance from plain values, checked and converted field by field. Raises ConfigError."""
    fields = {f.name: f for f in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(settings_class)
    for name in values:
        if name not in fields:
            raise ConfigError(unknown_name("setting", name, fields))
    converted = {name: _convert(name, value, hints[name], fields[name]) for name, value in values.items()}
    missing = [
        flag_name(name)
        for name, field in fields.items()
        if name not in converted and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"Missing {', '.join(missing)}: give the flag or the key in --config FILE.yaml.")
    return settings_class(**converted)


def read_yaml(path: str | Path, settings_class: type) -> dict[str, Any]:
    """Keys and values of a YAML file of settings. Keys may be spelled with hyphens. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the settings file {path}: {error}. Give an existing UTF-8 YAML file."
        ) from error
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Correct that line.") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, not a {type(loaded).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(settings_class)}
    by_alias = {a.lstrip("-").replace("-", "_"): n for n, f in fields.items() for a in f.metadata.get("flags", ())}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        name = name if name in fields else by_alias.get(name, name)
        if name not in fields:
            raise ConfigError(f"{path}: {unknown_name('setting', str(key), fields)}")
        if name in values:
            raise ConfigError(f"{path}: the setting {name} is given twice; keep one.")
        values[name] = value
    return values


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML readers silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def to_dict(settings: Any) -> dict[str, Any]:
    """All settings as plain YAML/JSON values, in the order of their definition."""
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def to_yaml(settings: Any) -> str:
    """The resolved settings as YAML; `parse` with `--config` gives them back unchanged."""
    return yaml.safe_dump(to_dict(settings), sort_keys=True, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _convert(name: str, value: Any, hint: Any, field: Field) -> Any:
    optional = type(None) in typing.get_args(hint)
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if optional:
            return None
        raise ConfigError(f"{flag_name(name)} needs a value.")
    inner = inner_type(hint)
    origin = typing.get_origin(inner)
    if origin is list:
        item = typing.get_args(inner)[0]
        items = (
            value
            if isinstance(value, list | tuple)
            else split_items([value])
            if field.metadata.get("split", True)
            else [value]
        )
        return [_scalar(name, v, item, field) for v in items]
    if origin is dict:
        return _pairs(name, value, typing.get_args(inner)[1], field)
    return _scalar(name, value, inner, field)


def _pairs(name: str, value: Any, kind: Any, field: Field) -> dict[str, Any]:
    """A mapping from YAML, from JSON text, or from `key=value` words."""
    if isinstance(value, list) and len(value) == 1 and str(value[0]).lstrip().startswith("{"):
        value = value[0]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{flag_name(name)}: {value!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        words = split_items(value if isinstance(value, list | tuple) else [value])
        broken = [w for w in words if "=" not in str(w)]
        if broken:
            raise ConfigError(f"{flag_name(name)}: write key=value, not {broken[0]!r}.")
        value = dict(str(w).split("=", 1) for w in words)
    if kind is Any:
        return {str(k): v for k, v in value.items()}
    return {str(k): _scalar(name, v, kind, field) for k, v in value.items()}


def _scalar(name: str, value: Any, kind: Any, field: Field) -> Any:
    if isinstance(value, list | dict | tuple | set) or value is None:
        raise ConfigError(f"{flag_name(name)}: {value!r} is not one value; write one.")
    choices, others = field.metadata.get("choices"), field.metadata.get("words", ())
    if isinstance(value, str) and value in others:
        return value
    if kind is str and isinstance(value, bool):  # YAML reads yes, no, on, off and true as booleans
        value = str(value).lower()
        if not choices or value not in choices:
            raise ConfigError(f"{flag_name(name)} needs text, not {value}; write it in quotes.")
    try:
        converted = (
            _to_bool(value) if kind is bool else _to_number(value, kind) if kind in (int, float) else kind(value)
        )
    except (ValueError, TypeError, OverflowError) as error:
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        wanted = " or ".join([words.get(kind, kind.__name__), *others])
        raise ConfigError(f"{flag_name(name)} needs {wanted}, not {value!r}.") from error
    if choices and converted not in choices:
        raise ConfigError(f"{flag_name(name)}: {unknown_name('choice', str(converted), choices)}")
    return converted


def _to_bool(value: Any) -> bool:
    if str(value).lower() not in BOOL_WORDS:
        raise ValueError(value)
    return BOOL_WORDS[str(value).lower()]


def _to_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    converted = kind(value)
    if math.isnan(converted):
        raise ValueError(value)
    return converted
