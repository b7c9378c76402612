"""Adapters of fused experts in files: merged as PEFT merges them, and to Megatron's local experts and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.combine import Part, combine
from finerank.checkpoints.expert_factors import expand_experts
from finerank.checkpoints.formats import hf, peft
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.merge import merged_model, plan_merge
from finerank.checkpoints.open import open_base
from finerank.checkpoints.preflight import fold, preflight
from finerank.cli import main
from finerank.errors import AdapterError
from tiny import save_tiny, tiny_model

IDS = torch.arange(48).reshape(2, 24) * 7 % 384
FAMILIES = ["mixtral", "qwen3_moe"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj"], "target_parameters": BOTH, "r": 4, "lora_alpha": 6},
    "down": {"target_modules": [], "target_parameters": BOTH[1:], "r": 3, "lora_alpha": 6},
    "patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": BOTH,
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 2},
        "alpha_pattern": {"experts.down_proj": 3},
    },
}


def by_peft(folder: Path, family: str, **config: Any) -> Any:
    """A PEFT model whose factors are all random, saved to `folder`."""
    import peft as library

    model = library.get_peft_model(tiny_model(family), library.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_logits_equal_peft(tmp_path: Path, family: str, kind: str) -> None:
    save_tiny(tmp_path / "base", family)
    theirs = by_peft(tmp_path / "adapter", family, **CONFIGS[kind])
    base = open_base(str(tmp_path / "base"))
    merged = merged_model(base, plan_merge(base, peft.read_adapter(tmp_path / "adapter")))
    (tmp_path / "merged").mkdir()
    hf.write(merged, tmp_path / "merged")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        wanted, plain = theirs(IDS).logits, tiny_model(family)(IDS).logits
        assert (ours(IDS).logits - wanted).abs().max() < 1e-4
        assert (plain - wanted).abs().max() > 0.05
    assert merged.weights.report.totals()["share_of_weights_changed"] > 0.9  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_read_is_written_bit_equal(tmp_path: Path, kind: str) -> None:
    by_peft(tmp_path / "a", "mixtral", **CONFIGS[kind])
    first = peft.read_adapter(tmp_path / "a")
    (tmp_path / "b").mkdir()
    peft.write_adapter(first, tmp_path / "b")
    again = peft.read_adapter(tmp_path / "b")
    assert first.factors.keys() == again.factors.keys()
    for name, f in first.factors.items():
        g = again.factors[name]
        assert torch.equal(f.a_RI, g.a_RI) and torch.equal(f.b_OR, g.b_OR)
        assert (f.scale, f.rank, f.num_experts) == (g.scale, g.rank, g.num_experts)
    assert {f.num_experts for n, f in first.factors.items() if "experts" in n} == {4}


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_factors_are_the_same_change(tmp_path: Path, family: str) -> None:
    model = by_peft(tmp_path / "a", family, **CONFIGS["patterns"])
    adapter = peft.read_adapter(tmp_path / "a")
    expanded = expand_experts(adapter, tiny_model(family).config.to_dict())
    assert not any(f.num_experts for f in expanded.factors.values())
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    where = "block_sparse_moe" if family == "mixtral" else "mlp"
    outer = model.base_model.model.model.layers[1].mlp.experts
    for wrapper, parts in ((outer.base_layer, names[:2]), (outer, names[2:])):
        delta_EOI = wrapper.get_delta_weight("default")
        for e in range(4):
            found = [expanded.factors[f"model.layers.1.{where}.experts.{e}.{part}"] for part in parts]
            ours = torch.cat([f.scale * f.b_OR @ f.a_RI for f in found])
            torch.testing.assert_close(ours, delta_EOI[e], rtol=1e-5, atol=1e-6)
    # the config beside them gives the same scales: what PEFT of other versions, and Megatron's record, go by
    from finerank.adapters.shapes import shape_of

    for name, f in expanded.factors.items():
        shape = shape_of(expanded.config, name)
        assert shape.rank == f.rank and shape.scale == pytest.approx(f.scale, rel=1e-12)


def same_change(one: Adapter, other: Adapter) -> None:
    assert one.factors.keys() == other.factors.keys()
    for name, f in one.factors.items():
        g = other.factors[name]
        torch.testing.assert_close(f.scale * f.b_OR @ f.a_RI, g.scale * g.b_OR @ g.a_RI, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [[], ["--target-tensor-parallel-size", "2"], ["--target-expert-parallel-size", "2"]])
def test_megatrons_local_experts_and_back(tmp_path: Path, family: str, split: list[str]) -> None:
    save_tiny(tmp_path / "base", family)
    by_peft(tmp_path / "a", family, **CONFIGS["both"])
    flags = ["--load", str(tmp_path / "base"), "--lora-load", str(tmp_path / "a"), "--save-dir", str(tmp_path / "m")]
    assert main(["export", *flags, "--to", "mcore", *split]) == 0
    from finerank.checkpoints.open import open_adapter

    config = hf.read_json(tmp_path / "base" / "config.json")
    same_change(
        expand_experts(peft.read_adapter(tmp_path / "a"), config), open_adapter(tmp_path / "m", hf_config=config)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_finerank_merge_proves_itself(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base", family)
    by_peft(tmp_path / "a", family, **CONFIGS["both"])
    flags = ["--load", str(tmp_path / "base"), "--lora-load", str(tmp_path / "a"), "--save-dir", str(tmp_path / "m")]
    assert main(["merge", *flags]) == 0, capsys.readouterr()
    answers = hf.read_json(tmp_path / "m" / "merge_report.json")["answers"]
    assert answers["reference"] == "base with the adapter's branch beside it, fp32"
    assert answers["mean_kl"] < 1e-6 and answers["greedy_agreement"] == 1


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    by_peft(tmp_path / "a", "mixtral", **CONFIGS["both"])
    adapter = peft.read_adapter(tmp_path / "a")
    save_tiny(tmp_path / "base", "llama")
    llama = open_base(str(tmp_path / "base"))
    with pytest.raises(AdapterError, match="of 4 experts and the base has no experts of that kind"):
        plan_merge(llama, adapter)
    with pytest.raises(AdapterError, match="adapts parameters of fused experts"):
        combine([Part(adapter, 1.0), Part(adapter, 0.5)], "cat")
    with pytest.raises(AdapterError, match="--fold cannot change"):
        fold(adapter)
    for engine, to in (("vllm", "peft"), ("llama.cpp", "gguf-lora")):
        assert any("fused experts" in f.what for f in preflight(adapter, llama, engine=engine, to=to))


def test_ours_merges_as_it_runs(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "qwen3_moe")
    by_peft(tmp_path / "a", "qwen3_moe", **CONFIGS["both"])
    model = tiny_model("qwen3_moe")
    adapters = load_adapter(model, tmp_path / "a")
    save_adapter(adapters, tmp_path / "b", base_model_name="tiny")
    adapters.merge_()
    base = open_base(str(tmp_path / "base"))
    merged = merged_model(base, plan_merge(base, peft.read_adapter(tmp_path / "b")))
    (tmp_path / "m").mkdir()
    hf.write(merged, tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


def test_dense_layers_beside_experts(tmp_path: Path) -> None:
    """PEFT 0.21 takes `down_proj` on such a model for the experts alone, so the reference is the model in memory."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[0]).requires_grad_(False)
    model.save_pretrained(tmp_path / "base")
    settings = AdapterSettings(lora_r=4, lora_target_modules=["up_proj", "gate_up_proj", "down_proj"])
    adapters = inject_adapters(model, settings, seed=1)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
        wanted = model(IDS).logits
    assert {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"} == set(adapters.layers)
    assert set(adapters.parts) == {"model.layers.1.mlp.experts"}
    save_adapter(adapters, tmp_path / "a", base_model_name="tiny")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    load_adapter(again, tmp_path / "a")
    base = open_base(str(tmp_path / "base"))
    (tmp_path / "m").mkdir()
    hf.write(merged_model(base, plan_merge(base, peft.read_adapter(tmp_path / "a"))), tmp_path / "m")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        assert (again(IDS).logits - wanted).abs().max() < 1e-5
        assert (merged(IDS).logits - wanted).abs().max() < 1e-4
