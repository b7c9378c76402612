"""A base model's tokenizer, without the model: `load_tokenizer(settings, new_tokens=["<tool>"])`.

`AutoTokenizer` knows which of many classes a tokenizer is of, and importing it imports PyTorch and modelling code:
300 MB and seconds that preparing rows has no use for. So where PyTorch is not in this process yet, `AutoTokenizer` runs
in another one, without PyTorch, and says which class it chose; that class alone reads the same files here, and what
comes out is compared with what the other process had.
"""

import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from finerank.errors import ConfigError, ModelError, first_line
from finerank.models.find import TOKENIZER_FILES, find_tokenizer
from finerank.models.settings import SourceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(settings: SourceSettings, *, new_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """The tokenizer of `--tokenizer-name-or-path`, else the one beside the model, with new tokens put into it.

    A missing pad token becomes eos. Raises ConfigError, ModelError when there is none.
    """
    found = find_tokenizer(settings)
    tokenizer = read_tokenizer(found.folder, found.name, settings)
    if new_tokens:
        add_tokens(tokenizer, new_tokens)
    return tokenizer


def read_tokenizer(folder: Path, name: str, settings: SourceSettings) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder, which messages call `name`. Raises ModelError."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"There is no tokenizer with {name}; name one with --tokenizer-name-or-path FOLDER.")
    tokenizer = None
    if "torch" not in sys.modules and not settings.trust_remote_code:
        tokenizer = _without_torch(folder)
    if tokenizer is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        except Exception as error:
            raise ModelError(f"Cannot load the tokenizer of {name}: {first_line(error)}; restore its files.") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _without_torch(folder: Path) -> Any | None:
    """The folder's tokenizer, made without PyTorch; None where that cannot be done, whatever the reason."""
    code = f"from {__name__} import tell_class; tell_class()"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),  # "" is the current folder
        "PYTHONSAFEPATH": "1",  # which is not to come first for the other process alone
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # it would say that there is no PyTorch
        "TRANSFORMERS_VERBOSITY": "error",  # what there is to say is said here
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is this process's to handle
            check=True,
        )
        told = json.loads(done.stdout)
        if told["module"].partition(".")[0] != "transformers":
            return None
        tokenizer = getattr(importlib.import_module(told["module"]), told["class"]).from_pretrained(folder)
        return tokenizer if _digest(tokenizer) == told["digest"] else None
    except Exception:  # a damaged tokenizer or one of a rare kind: what there is to say about it is said here
        return None


def tell_class() -> None:
    """What the other process does: say what `AutoTokenizer` makes of the folder in its arguments."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get in between
    sys.modules["torch"] = None  # type: ignore[assignment]  # to Python: there is no such module
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        kind = type(tokenizer)
        with output:
            json.dump({"module": kind.__module__, "class": kind.__name__, "digest": _digest(tokenizer)}, output)
    except Exception:
        sys.exit(1)  # the asking process tries it by itself, and says what is wrong


def _digest(tokenizer: Any) -> str:
    """SHA-256 of what decides a tokenizer's ids and prompts."""
    told = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.model_max_length,
        tokenizer.padding_side,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[int]:
    """Put tokens into a tokenizer and give their ids; one that it has already keeps its id.

    They are ordinary tokens, so answers show them, and they are found anywhere in a text.

    Raises ConfigError for a token that is empty, blank or named twice.
    """
    for token in tokens:
        if not token.strip() or list(tokens).count(token) > 1:
            raise ConfigError(f"--add-tokens: {token!r} is blank or given twice; name each new token once.")
    known = tokenizer.get_vocab()
    if old := [token for token in tokens if token in known]:
        logger.warning("%s is in the vocabulary already: its row is trained, and no new one is made", ", ".join(old))
    fresh = [AddedToken(token, normalized=False, special=False) for token in tokens if token not in known]
    tokenizer.add_tokens(fresh)  # type: ignore[arg-type]
    ids: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    if any(i is None or tokenizer.convert_ids_to_tokens(i) != t for t, i in zip(tokens, ids, strict=True)):
        raise ConfigError(f"--add-tokens: this model's tokenizer does not take {' '.join(tokens)}; use other names.")
    return [int(i) for i in ids]
