"""The program `finerank`: one verb per recipe.

A verb is a module in `finerank.recipes` with a docstring (its first line is the help), a dataclass `Settings` and a
function `run(settings)`. Nothing heavy is imported before the flags are checked.
"""

import ast
import contextlib
import errno
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finerank import __version__, config, registry
from finerank.errors import ConfigError, FinerankError, unknown_name

RECIPES = "finerank.recipes"
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors of the user are one sentence on stderr, ours keep a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _print_any_text()
    try:
        status = _dispatch(argv)
        sys.stdout.flush()  # here, so that a reader that went away is noticed here
        _forget_unwritten(sys.stderr)
        return status
    except FinerankError as error:
        _tell(f"finerank: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _tell("finerank: interrupted")
        return 130
    except BrokenPipeError:
        # what is still buffered has nowhere to go; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if os.environ.get("FINERANK_TRACEBACK") or (error.filename is None and error.errno not in _UNWRITABLE):
            raise
        reason = (error.strerror or type(error).__name__).lower()
        if error.filename is None:
            _forget_unwritten(sys.stdout)
            _tell(f"finerank: the output cannot be written: {reason}; send it elsewhere")
            return 5
        _tell(f"finerank: {error.filename}: {reason}; check the path, its permissions and the disk")
        return 5
    except (MemoryError, RuntimeError) as error:
        # torch's allocators say it by a RuntimeError; asking torch itself would import it
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        if os.environ.get("FINERANK_TRACEBACK"):
            raise
        _tell(
            "finerank: out of memory; take a smaller model or --dtype, in training a lower --micro-batch-tokens or "
            "--seq-length (FINERANK_TRACEBACK=1 shows where it ran out)"
        )
        return 3


def _tell(message: str) -> None:
    """A line on stderr, if it can be written; the exit status says the same."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    _forget_unwritten(sys.stderr)


def _forget_unwritten(stream: Any) -> None:
    """What cannot be written to a full disk or a closed pipe would make Python leave with a status of its own."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_any_text() -> None:
    """Let a terminal that is not UTF-8 show what it can instead of failing on a Chinese answer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("--version", "-V", "version"):
        print(f"finerank {__version__}")
        return 0
    verb = argv[0]
    if verb.replace("-", "_") not in registry.names(RECIPES):
        raise ConfigError(unknown_name("verb", verb, registry.names(RECIPES)))
    recipe = registry.load(RECIPES, verb, "verb")
    parsed = config.parse(recipe.Settings, argv[1:], verb=verb, help=recipe.__doc__ or "")
    if parsed.dry_run:
        print(config.to_yaml(parsed.settings), end="")
        return 0
    with log_to_stderr():
        return recipe.run(parsed.settings) or 0


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show what finerank logs, from INFO up, on stderr; under torchrun on the first rank only."""
    handler: logging.Handler = logging.StreamHandler() if os.environ.get("RANK", "0") == "0" else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("finerank")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def usage() -> str:
    """The list of verbs with the first line of each recipe's docstring, read without importing it."""
    lines = ["usage: finerank VERB [--config FILE.yaml] [--dry-run] [flags]", ""]
    for name in registry.names(RECIPES):
        lines.append(f"  {name:<12}{_first_line(name)}")
    lines += ["", "finerank VERB --help shows the flags of a verb."]
    return "\n".join(lines)


def _first_line(verb: str) -> str:
    spec = importlib.util.find_spec(f"{RECIPES}.{verb}")
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0]
