"""Files that MindSpeed-LLM's preprocessing wrote come out the same, byte for byte, from the same command lines."""

import shlex
from pathlib import Path

import pytest

from finerank.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "prep"
CASES = [
    "alpaca_empty",
    "alpaca_llama2",
    "alpaca_llama2_mapkeys",
    "alpaca_qwen3",
    "alpaca_qwen_pack128",
    "pairwise_llama2",
    "sharegpt_qwen",
    "think_qwen3_false",
    "think_qwen3_none",
    "think_qwen3_true",
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_bytes_equal_the_recorded_files(case: str, workers: int, smollm2: Path, tmp_path: Path):
    golden = GOLDEN / case
    command = (golden / "command.txt").read_text(encoding="utf-8").strip()
    before, marked, keys = command.partition("--map-keys ")
    words = shlex.split(before) + (["--map-keys", keys] if marked else [])
    words[words.index("--input") + 1] = str(GOLDEN / words[words.index("--input") + 1])
    words += ["--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", str(smollm2)]
    words += ["--output-prefix", str(tmp_path / "a"), "--workers", str(workers)]
    assert main(["preprocess", *words]) == 0
    recorded = sorted(golden.glob("a_packed_*"))
    assert recorded
    for path in recorded:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in tmp_path.glob("a_packed_*")} == {p.name for p in recorded}
