"""The proof of a merge: it sees what is wrong, and says nothing where nothing is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_megatron import base_of, save
from test_megatron_lora import TARGETS, adapter_of
from test_merge_folder import KINDS, make_adapter

from finerank.checkpoints.formats import hf, peft
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.merge import merged_model, plan_merge
from finerank.checkpoints.proof import compare
from finerank.checkpoints.weights import BaseModel
from finerank.cli import main
from tiny import save_tiny, tiny_model


def merged_folder(base: BaseModel, adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    hf.write(merged_model(base, plan_merge(base, adapter)), folder)
    return folder


@pytest.mark.parametrize(
    "kind,family",
    [
        *[(kind, "qwen2") for kind in ("all-linear", "dora", "bias", "modules_to_save")],
        *[(kind, "llama_tied") for kind in ("embedding", "head")],
    ],
)
def test_a_right_merge_shows_no_difference(kind: str, family: str, tmp_path: Path) -> None:
    base = hf.read(save_tiny(tmp_path / "base", family))
    make_adapter(tiny_model(family), tmp_path / "adapter", **KINDS[kind])
    adapter = peft.read_adapter(tmp_path / "adapter")
    proof = compare(base, adapter, merged_folder(base, adapter, tmp_path / "merged"))
    assert proof["reference"].startswith("base with the adapter's branch")
    assert proof["num_prompts"] == 32 and proof["num_positions"] >= 500
    assert proof["mean_kl"] < 1e-9 and proof["max_logit_difference"] < 1e-4
    assert proof["greedy_agreement"] > 0.99


def wrong_scale(adapter: Adapter) -> Adapter:
    return replace(adapter, factors={n: replace(f, scale=1.5 * f.scale) for n, f in adapter.factors.items()})


def forgotten(adapter: Adapter) -> Adapter:
    return replace(adapter, factors=dict(list(adapter.factors.items())[1:]))


def swapped(adapter: Adapter) -> Adapter:
    q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    return replace(adapter, factors={**adapter.factors, q: adapter.factors[o], o: adapter.factors[q]})


@pytest.mark.parametrize("fault", [wrong_scale, forgotten, swapped])
def test_a_wrong_merge_shows(fault: Any, tmp_path: Path) -> None:
    base = hf.read(save_tiny(tmp_path / "base"))
    make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    adapter = peft.read_adapter(tmp_path / "adapter")
    proof = compare(base, adapter, merged_folder(base, fault(adapter), tmp_path / "merged"))
    assert proof["mean_kl"] > 1e-4 and proof["max_logit_difference"] > 1e-2


def test_without_a_tokenizer_random_rows_are_compared(tmp_path: Path) -> None:
    base = base_of("qwen3")
    adapter = adapter_of(base, TARGETS["all"], alpha=0.1)
    proof = compare(base, adapter, merged_folder(base, adapter, tmp_path / "merged"))
    assert "random tokens" in proof["prompts"] and proof["num_positions"] == 32 * 24
    assert 0 < proof["mean_kl"] < 1e-3, "bf16 rounding is seen, and small"


def test_experts_are_compared_with_exact_sums(tmp_path: Path) -> None:
    """The library holds experts fused, so no branch can stand beside them."""
    base = base_of("mixtral")
    adapter = adapter_of(base, ["w1", "w2", "q_proj"], alpha=0.1)
    proof = compare(base, adapter, merged_folder(base, adapter, tmp_path / "merged"))
    assert proof["reference"] == "exact fp32 sums as weights"
    assert proof["mean_kl"] < 1e-2


def command(tmp_path: Path, *flags: str, alpha: float = 0.5) -> tuple[int, dict[str, Any]]:
    base = save(base_of("llama"), tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    peft.write_adapter(adapter_of(hf.read(base), TARGETS["all"], alpha=alpha), tmp_path / "adapter")
    argv = ["merge", "--load", str(base), "--lora-load", str(tmp_path / "adapter"), "--save-dir", str(tmp_path / "out")]
    status = main([*argv, *flags])
    return status, json.loads((tmp_path / "out" / "merge_report.json").read_text())


def test_the_report_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = command(tmp_path)
    assert status == 0
    weights, answers = report["weights"], report["answers"]
    assert 0.9 < weights["share_of_weights_changed"] <= 1
    assert 0 < weights["mean_rounding_error"] < weights["max_rounding_error"] < 0.01
    assert answers["mean_kl"] <= report["bound"]["max_mean_kl"] == 0.01
    assert len(report["tensors"]) == 14 and report["notes"] == []
    printed = capsys.readouterr().out
    assert "32 prompts" in printed and "rounding error" in printed


def test_over_the_bound_is_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = command(tmp_path, "--max-kl", "1e-12")
    assert status == 3 and report["answers"]["mean_kl"] > 1e-12
    assert "NOT PROVEN: the mean KL" in capsys.readouterr().out


def test_a_change_below_the_base_dtype_is_status_3(tmp_path: Path) -> None:
    status, report = command(tmp_path, "--proof", "weights", alpha=1e-9)
    assert status == 3 and report["weights"]["num_weights_changed"] == 0
    assert report["answers"] is None and report["answers_skipped"] == "--proof weights"
