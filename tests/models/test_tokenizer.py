"""Tokenizers loaded without PyTorch are those that `AutoTokenizer` makes, and preparing rows never imports PyTorch."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from finerank.models import tokenizer
from tiny import FAMILIES, save_tiny

CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer", None)
TEXTS = ["Hello there", "<|im_start|>user\nIt's  12 + 345<|im_end|>\n", " \u00e9t\u00e9\t\u4f60\u597d \U0001f600", ""]


def facts(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """All that decides what a tokenizer does."""
    return {
        "class": type(tokenizer).__name__,
        "backend": json.loads(tokenizer.backend_tokenizer.to_str()),
        "special": tokenizer.special_tokens_map,
        "added": {str(i): repr(token) for i, token in sorted(tokenizer.added_tokens_decoder.items())},
        "ids": tokenizer(texts).input_ids,
        "template": tokenizer.chat_template,
        "longest": tokenizer.model_max_length,
    }


LOAD = f"""
import json, sys
from typing import Any
from finerank.models.settings import SourceSettings
from finerank.models.tokenizer import load_tokenizer

{inspect.getsource(facts)}
for folder in sys.argv[1:]:
    tokenizer = load_tokenizer(SourceSettings(tokenizer_name_or_path=folder))
    print(json.dumps(facts(tokenizer, {TEXTS!r})))
print(json.dumps("torch" in sys.modules))
"""

RUN = """
import sys
from finerank.cli import main
status = main(sys.argv[1:])
heavy = [m for m in sys.modules if m.partition(".")[0] == "torch" or m.startswith("transformers.model")]
print("HEAVY", sorted(heavy))
sys.exit(status)
"""


def clean_process(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a Python that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, encoding="utf-8", env=os.environ
    )


def test_other_process_gives_what_auto_tokenizer_gives(tmp_path: Path):
    folders = []
    for family, declared in zip(FAMILIES, itertools.cycle(CLASSES), strict=False):
        folder = save_tiny(tmp_path / f"{family}-{declared}", family)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["tokenizer_class"]
        if declared is not None:
            config["tokenizer_class"] = declared
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        folders.append(folder)
    done = clean_process(LOAD, *map(str, folders))
    assert done.returncode == 0, done.stderr
    *made, has_torch = map(json.loads, done.stdout.splitlines())
    assert not has_torch
    for folder, told in zip(folders, made, strict=True):
        assert told == json.loads(json.dumps(facts(AutoTokenizer.from_pretrained(folder), TEXTS))), folder.name
    assert len({told["class"] for told in made}) > 2


@pytest.mark.parametrize("told", ["no JSON", {"module": "os", "class": "path", "digest": ""}, {"digest": "another"}])
def test_an_answer_that_does_not_hold_is_not_used(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, told: Any):
    right = {"module": "transformers", "class": "PreTrainedTokenizerFast"}
    answer = told if isinstance(told, str) else json.dumps(right | told)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer))
    assert tokenizer._without_torch(tiny_folder) is None
    made = AutoTokenizer.from_pretrained(tiny_folder)
    right = {"module": type(made).__module__, "class": type(made).__name__, "digest": tokenizer._digest(made)}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=json.dumps(right)))
    assert facts(tokenizer._without_torch(tiny_folder), TEXTS) == facts(made, TEXTS)


def test_a_damaged_tokenizer_is_named(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    done = clean_process(LOAD, str(tmp_path))
    assert done.returncode != 0 and "ModelError: Cannot load the tokenizer of" in done.stderr


@pytest.mark.parametrize("flags", [("--prompt-type", "qwen"), ("--hf-chat-template", "--workers", "2"), ("--pack",)])
def test_preprocess_imports_no_pytorch(tiny_folder: Path, tmp_path: Path, flags: tuple[str, ...]):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Say {i}.", "output": str(i)} for i in range(600)]))
    words = ["--input", str(rows), "--output-prefix", str(tmp_path / "a"), "--seq-length", "64", "--load"]
    done = clean_process(RUN, "preprocess", *words, str(tiny_folder), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "PyTorch" not in done.stderr


def test_inspect_imports_no_pytorch(tiny_folder: Path, tmp_path: Path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Say.", "output": "It."}]))
    done = clean_process(RUN, "inspect", str(rows), "--load", str(tiny_folder))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "HEAVY []", done.stderr
