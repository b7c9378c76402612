"""The command line of a verb: one flag for each field of its settings, and the other spellings users bring along.

    values = read_flags(Settings, ["--lora_r=8", "--no-pack", "--data-path", "a.json,b.json"], verb="tune", help="...")
    {"lora_r": "8", "pack": False, "data_path": ["a.json", "b.json"]}

Values stay text here; `finerank.config` checks and converts them.
"""

import argparse
import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field
from typing import Any

from finerank.errors import ConfigError, unknown_name

BOOL_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def read_flags(settings_class: type, argv: Sequence[str], *, verb: str, help: str) -> dict[str, Any]:
    """What was given, by setting name; `config` and `dry_run` too. Raises ConfigError; SystemExit after `--help`."""
    argv = _drop_ignored(_spell_flags(argv), getattr(settings_class, "IGNORED_FLAGS", ()), verb)
    parser = _parser(settings_class, verb, help)
    namespace, unknown = parser.parse_known_args(_settle_switches(argv, parser))
    if unknown and not unknown[0].startswith("-"):
        raise ConfigError(f"finerank {verb} cannot place {unknown[0]!r}; put the flag it belongs to in front of it.")
    if unknown:
        name = unknown[0].split("=")[0]
        if (instead := getattr(settings_class, "REPLACED_FLAGS", {}).get(name)) is not None:
            raise ConfigError(f"finerank {verb} has no {name}: {instead}.")
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(unknown_name(f"flag of finerank {verb}", name, known))
    return {name: value for name, value in vars(namespace).items() if name != "_given"}


def flag_name(name: str) -> str:
    """`lora_r` -> `--lora-r`."""
    return "--" + name.replace("_", "-")


def inner_type(hint: Any) -> Any:
    """`X | None` -> `X`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def split_items(words: Sequence[Any]) -> list[Any]:
    """The items of `a b`, of `a,b`, or of the `[a, b]` that fire-style programs take."""
    items: list[Any] = []
    for word in words:
        if isinstance(word, str) and not os.path.exists(word):  # a file's name may hold a comma
            items += [part.strip(" '\"") for part in word.strip("[] ").split(",") if part.strip(" '\"")]
        else:
            items.append(word)
    return items


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
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        alone = word in switches and following.lower() not in BOOL_WORDS
        settled.append(f"{word}=" if alone else word)
    return settled


def _drop_ignored(argv: list[str], ignored: Sequence[str], verb: str) -> list[str]:
    kept: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("--"):
            skipping = word.split("=")[0] in ignored
            if skipping:
                flag = word.split("=")[0]
                print(f"warning: {flag} changes nothing in finerank {verb} and is ignored", file=sys.stderr)
        if not skipping:
            kept.append(word)
    return kept


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each spelling of a flag once, the value once: `--lr, --learning-rate LR`; of a switch its two sides."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            return super()._format_action_invocation(action)
        if isinstance(action, _OnOff):
            return ", ".join(flag for flag in action.option_strings if flag not in action.negative) + " | --no-..."
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(action.option_strings) + value


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigError, so that the program has one way to fail."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help.")


class _Once(argparse.Action):
    """Store a value; refuse a second, different one for the same setting, whatever its flag is called."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        _set_once(parser, namespace, self.dest, values, option_string)


class _OnceSplit(_Once):
    """The same for a list whose items may be written `a,b`."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, namespace, split_items(values), option_string)


def _set_once(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace, name: str, value: Any, flag: str | None
) -> None:
    given = namespace.__dict__.setdefault("_given", {})
    if name in given and given[name][1] != value:
        both = " and ".join(
            f"{f} {' '.join(map(str, v if isinstance(v, list) else [v]))}" for f, v in (given[name], (flag, value))
        )
        parser.error(f"{both} set the same thing; keep one")
    given[name] = (flag, value)
    setattr(namespace, name, value)


class _OnOff(argparse.Action):
    """`--pack`, `--no-pack`, `--pack true`, `--pack False`. An alias may itself begin with `--no-` and mean true."""

    negative: typing.ClassVar[frozenset[str]] = frozenset()

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        negative = option_string in self.negative
        if negative and values:
            parser.error(f"{option_string} takes no value")
        value = BOOL_WORDS.get(str(values).lower(), values) if values else not negative
        _set_once(parser, namespace, self.dest, value, option_string)


def _parser(settings_class: type, verb: str, help: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"finerank {verb}",
        usage=f"finerank {verb} [--config FILE.yaml] [--dry-run] [flags]",
        description=help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings file; flags win over it")
    parser.add_argument("--dry-run", action="store_true", help="check, print the resolved settings, touch no file")
    hints = typing.get_type_hints(settings_class)
    groups = {
        c: parser.add_argument_group((c.__doc__ or "").split("\n")[0].rstrip(".")) for c in settings_class.__mro__
    }
    for field in dataclasses.fields(settings_class):
        owner = next(c for c in settings_class.__mro__ if field.name in inspect.get_annotations(c))
        _add_argument(groups[owner], field, hints[field.name])
    return parser


def _add_argument(parser: argparse._ArgumentGroup, field: Field, hint: Any) -> None:
    inner = inner_type(hint)
    options: dict[str, Any] = {"help": _help(field).replace("%", "%%")}
    if field.metadata.get("positional"):
        nargs = "*" if typing.get_origin(inner) is list else "?"
        parser.add_argument(field.name, nargs=nargs, **options)
        return
    flags = [flag_name(field.name), *field.metadata.get("flags", ())]
    options["dest"] = field.name
    if inner is bool:
        negative = [f"--no-{flag[2:]}" for flag in flags if not flag.startswith("--no-")]
        action = parser.add_argument(*flags, *negative, action=_OnOff, nargs="?", metavar="true|false", **options)
        action.negative = frozenset(negative)  # type: ignore[attr-defined]
        return
    if typing.get_origin(inner) in (list, dict):
        options["nargs"] = "+"
    split = typing.get_origin(inner) is list and field.metadata.get("split", True)
    options["metavar"] = field.name.split("_")[-1].upper()
    parser.add_argument(*flags, action=_OnceSplit if split else _Once, **options)


def _help(field: Field) -> str:
    text = field.metadata.get("help", "")
    if choices := field.metadata.get("choices"):
        text += f" ({', '.join(choices)})"
    if field.default is not MISSING and field.default is not None:
        text += f" [{field.default}]"
    elif field.default_factory is not MISSING and (made := field.default_factory()):
        text += f" [{' '.join(map(str, made))}]"
    return text
