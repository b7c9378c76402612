"""Settings: a dataclass, over it a YAML file, over that the command line. Strict, and saved resolved.

A setting has one name everywhere: `lora_r` in Python and YAML, `--lora-r` (or `--lora_r`) on the command line. Where
Megatron, MindSpeed-LLM or alpaca-lora has another name for the same thing, it is a further flag of the same setting:

    @dataclass(kw_only=True)
    class OptimSettings:
        lr: float = setting(2e-4, help="peak learning rate", flags=("--learning-rate",))

Settings of several parts are joined by inheritance, so the namespace stays flat. `parse` adds `--config FILE.yaml` and
`--dry-run` to every verb. Unknown keys and flags are refused with the nearest name.
"""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finerank.errors import ConfigError, unknown_name

T = TypeVar("T")


def setting(
    default: Any = MISSING,
    *,
    help: str,
    flags: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field with what the command line needs.

    Args:
        default: value when neither YAML nor flag sets it; a list or dict is copied for each instance.
        help: one line for `--help`; say the unit.
        flags: further flag names for the same setting, as other programs spell it, e.g. `("--learning-rate",)`.
        choices: the allowed values of a string setting.
        positional: taken without a flag name (at most one a verb).
    """
    metadata = {"help": help, "flags": tuple(flags), "choices": choices, "positional": positional}
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
    accepted with a warning on stderr, with or without values.

    Raises:
        ConfigError: an unknown flag or key (with the nearest name), a value of the wrong type, a missing setting.
        SystemExit: `--help` was asked for.
    """
    argv = _spell_flags(argv)
    argv = _drop_ignored(argv, getattr(settings_class, "IGNORED_FLAGS", ()), verb)
    parser = _parser(settings_class, verb, help)
    namespace, unknown = parser.parse_known_args(_settle_switches(argv, parser))
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        kind = "flag" if unknown[0].startswith("-") else "argument"
        raise ConfigError(unknown_name(f"{kind} of finerank {verb}", unknown[0].split("=")[0], known))
    values = vars(namespace)
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
        _flag(name)
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
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spell_flags(argv: Sequence[str]) -> list[str]:
    """`--lora_r=8` -> `--lora-r=8`: flags may be written with underscores, as alpaca-lora does. Values stay."""
    spelled = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        spelled.append(word)
    return spelled


def _settle_switches(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`--greedy TEXT` -> `--greedy= TEXT`: a switch takes the next word only when that is true, false or the like."""
    switches = {flag for action in parser._actions if isinstance(action, _OnOff) for flag in action.option_strings}
    settled = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        alone = word in switches and not _is_bool_word(following)
        settled.append(f"{word}=" if alone else word)
    return settled


def _is_bool_word(word: str) -> bool:
    try:
        _to_bool(word)
    except ValueError:
        return False
    return True


def _drop_ignored(argv: list[str], ignored: Sequence[str], verb: str) -> list[str]:
    kept: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("--"):
            skipping = word.split("=")[0] in ignored
            if skipping:
                print(
                    f"warning: {word.split('=')[0]} changes nothing in finerank {verb} and is ignored", file=sys.stderr
                )
        if not skipping:
            kept.append(word)
    return kept


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigError, so that the program has one way to fail."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"finerank {self.prog.split()[-1]}: {message}. See finerank {self.prog.split()[-1]} --help.")


class _OnOff(argparse.Action):
    """`--pack`, `--no-pack`, `--pack true`, `--pack False`. An alias may itself begin with `--no-` and mean true."""

    negative: typing.ClassVar[frozenset[str]] = frozenset()

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        negative = option_string in self.negative
        if negative and values:
            parser.error(f"{option_string} takes no value")
        setattr(namespace, self.dest, values or not negative)


def _parser(settings_class: type, verb: str, help: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"finerank {verb}",
        description=help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings file; flags win over it")
    parser.add_argument("--dry-run", action="store_true", help="check, print the resolved settings, touch no file")
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        _add_argument(parser, field, hints[field.name])
    return parser


def _add_argument(parser: argparse.ArgumentParser, field: Field, hint: Any) -> None:
    inner = _inner(hint)
    options: dict[str, Any] = {"help": _help(field).replace("%", "%%")}
    if field.metadata.get("positional"):
        nargs = "*" if typing.get_origin(inner) is list else "?"
        parser.add_argument(field.name, nargs=nargs, **options)
        return
    flags = [_flag(field.name), *field.metadata.get("flags", ())]
    options["dest"] = field.name
    if inner is bool:
        negative = [f"--no-{flag[2:]}" for flag in flags if not flag.startswith("--no-")]
        action = parser.add_argument(*flags, *negative, action=_OnOff, nargs="?", metavar="true|false", **options)
        action.negative = frozenset(negative)  # type: ignore[attr-defined]
        return
    if typing.get_origin(inner) in (list, dict):
        options["nargs"] = "+"
    options["metavar"] = field.name.split("_")[-1].upper()
    parser.add_argument(*flags, **options)


def _help(field: Field) -> str:
    text = field.metadata.get("help", "")
    if choices := field.metadata.get("choices"):
        text += f" ({', '.join(choices)})"
    if field.default is not MISSING and field.default is not None:
        text += f" [{field.default}]"
    elif field.default_factory is not MISSING and (made := field.default_factory()):
        text += f" [{' '.join(map(str, made))}]"
    return text


def _inner(hint: Any) -> Any:
    """`X | None` -> `X`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _convert(name: str, value: Any, hint: Any, field: Field) -> Any:
    optional = type(None) in typing.get_args(hint)
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if optional:
            return None
        raise ConfigError(f"{_flag(name)} needs a value.")
    inner = _inner(hint)
    origin = typing.get_origin(inner)
    if origin is list:
        item = typing.get_args(inner)[0]
        return [_scalar(name, v, item, field) for v in _items(value)]
    if origin is dict:
        return _pairs(name, value, typing.get_args(inner)[1], field)
    return _scalar(name, value, inner, field)


def _items(value: Any) -> list[Any]:
    """A list from YAML, from `a b`, from `a,b`, or from the `[a, b]` that fire-style programs take."""
    words = value if isinstance(value, list | tuple) else [value]
    items: list[Any] = []
    for word in words:
        if isinstance(word, str) and not Path(word).exists():  # a file's name may hold a comma
            items += [part.strip(" '\"") for part in word.strip("[] ").split(",") if part.strip(" '\"")]
        else:
            items.append(word)
    return items


def _pairs(name: str, value: Any, kind: Any, field: Field) -> dict[str, Any]:
    """A mapping from YAML, from JSON text, or from `key=value` words."""
    if isinstance(value, list) and len(value) == 1 and str(value[0]).lstrip().startswith("{"):
        value = value[0]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{_flag(name)}: {value!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        words = _items(value)
        broken = [w for w in words if "=" not in str(w)]
        if broken:
            raise ConfigError(f"{_flag(name)}: write key=value, not {broken[0]!r}.")
        value = dict(str(w).split("=", 1) for w in words)
    if kind is Any:
        return {str(k): v for k, v in value.items()}
    return {str(k): _scalar(name, v, kind, field) for k, v in value.items()}


def _scalar(name: str, value: Any, kind: Any, field: Field) -> Any:
    if isinstance(value, list | dict):
        raise ConfigError(f"{_flag(name)} takes one value, not {value!r}.")
    try:
        converted = (
            _to_bool(value) if kind is bool else _to_number(value, kind) if kind in (int, float) else kind(value)
        )
    except (ValueError, TypeError) as error:
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{_flag(name)} needs {words.get(kind, kind.__name__)}, not {value!r}.") from error
    choices = field.metadata.get("choices")
    if choices and converted not in choices:
        raise ConfigError(f"{_flag(name)}: {unknown_name('choice', str(converted), choices)}")
    return converted


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def _to_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return kind(value)
