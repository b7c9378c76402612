"""The whole way on a tiny model: tune, evaluate, merge, answer with both, report; and what is printed is there."""

import json
import re
from pathlib import Path

import pytest

from finerank import cli
from finerank.recipes.quickstart import PROMPTS


def test_quickstart_leaves_what_it_prints(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "q"
    argv = [
        "quickstart",
        "--load",
        str(tiny_folder),
        "--output-dir",
        str(out),
        "--num-epochs",
        "0.5",
        "--device",
        "cpu",
    ]
    assert cli.main([*argv, "--lr", "1e-2"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "adapter" / "results.json").read_text(encoding="utf-8"))
    assert results["after_eval_loss"] < results["before_eval_loss"] - 0.1
    assert f"{results['before_eval_loss']:.3f} before, {results['after_eval_loss']:.3f} after" in printed
    named = re.findall(r"^  (?:adapter|loss curve|merged model|report) +(\S+)$", printed, flags=re.M)
    assert len(named) == 4 and all(Path(path).exists() for path in named)
    report = json.loads((out / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert report["adapter"] == str(out / "adapter")
    answers = json.loads((out / "adapter" / "answers.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in answers] == list(PROMPTS)
    assert all({"base model", "tuned model"} <= set(row) for row in answers)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in (*PROMPTS, "about_finerank.json", "data:image/png;base64,"))


def test_quickstart_can_be_run_again_in_its_place(tmp_path: Path, tiny_folder: Path):
    argv = ["quickstart", "--load", str(tiny_folder), "--output-dir", str(tmp_path / "q"), "--num-epochs", "0.05"]
    assert cli.main(argv) == 0
    first = (tmp_path / "q" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert cli.main(argv) == 0
    assert (tmp_path / "q" / "adapter" / "adapter_model.safetensors").read_bytes() == first
