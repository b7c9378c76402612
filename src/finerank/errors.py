"""Errors that carry the fix.

Every error a user can cause is a `FinerankError`: one sentence that names the thing and the next step. Each class also
inherits the builtin it refines, so callers that catch `ValueError` keep working. What only our own bug can cause is an
`assert`, and shows as a traceback.

    FinerankError
      ConfigError       (ValueError)       a setting or flag is wrong
      DataError         (ValueError)       rows, indexed files or templates are wrong
      ModelError        (ValueError)       a base model or tokenizer cannot be loaded or used
      AdapterError      (ValueError)       an adapter does not fit its base, or its targets match nothing
      CheckpointError   (ValueError)       a checkpoint is torn, foreign or damaged
      StorageError      (OSError)          the disk is full, read-only or gone
      NumericsError     (ArithmeticError)  a loss or gradient is not finite
      MissingExtraError (ImportError)      an optional package is not installed
      Interrupted                          the user or the scheduler asked to stop; state was saved
"""

import difflib
from collections.abc import Iterable


class FinerankError(Exception):
    """Base of all errors that are shown to the user without a traceback; `exit_code` is the process's status."""

    exit_code = 2


class ConfigError(FinerankError, ValueError):
    """A setting is unknown, has a wrong value, or conflicts with another one."""


class DataError(FinerankError, ValueError):
    """Rows, indexed files or templates cannot be used as given."""


class ModelError(FinerankError, ValueError):
    """A base model or tokenizer cannot be found, loaded or used."""


class AdapterError(FinerankError, ValueError):
    """An adapter does not fit its base model, or its targets match no layer."""


class CheckpointError(FinerankError, ValueError):
    """A checkpoint is torn, damaged, of another format, or does not belong to this run."""


class StorageError(FinerankError, OSError):
    """A file cannot be written: full disk, missing permission, vanished folder."""

    exit_code = 5


class NumericsError(FinerankError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 4


class MissingExtraError(FinerankError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class Interrupted(FinerankError):
    """Stopped by Ctrl-C or SIGTERM after the state was saved."""

    exit_code = 130


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that does not exist: the nearest names first, then what there is.

    >>> unknown_name("template", "qwne", ["qwen", "llama3"])
    "Unknown template 'qwne'. Did you mean 'qwen'? Known: llama3, qwen."
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if len(known) > 40:  # a whole screen of names hides the answer; the nearest few carry it
        known = difflib.get_close_matches(name, known, n=8, cutoff=0.0)
        return f"Unknown {kind} '{name}'.{hint} Nearest: {', '.join(known)}."
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(known)}."


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line without its full stop; the class's name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].rstrip(".")
