"""Merging adapters on embeddings, heads and whole modules, as finerank trains them: same answers, tied or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finerank.adapters.files import save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.formats import hf
from finerank.checkpoints.formats.peft import read_adapter
from finerank.checkpoints.merge import merged_model, plan_merge
from finerank.checkpoints.proof import compare
from finerank.models.vocabulary import grow_vocabulary
from tiny import save_tiny

IDS = torch.arange(48).reshape(2, 24) * 7 % 384
BOTH = ["embed_tokens", "lm_head"]
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"lora_modules_to_save": BOTH},
    "whole tied": {"lora_modules_to_save": BOTH, "ensure_weight_tying": True},
    "head": {"lora_modules_to_save": ["lm_head", "model.norm"]},
    "low": {"lora_target_modules": ["q_proj", *BOTH]},
    "low tied": {"lora_target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True},
    "low embedding": {"lora_target_modules": ["embed_tokens"]},
    "rows": {"token_ids": (5, 300)},
    "new rows": {"token_ids": (7, 384, 385)},
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapt(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """A random adapter in `folder`; the logits of base and adapter."""
    model, token_ids = load(base), settings.pop("token_ids", ())
    if token_ids:
        grow_vocabulary(model, max(384, max(token_ids) + 1), num_known=384)
    values = {"lora_r": 4, "lora_target_modules": ["q_proj"], **settings}
    adapters = inject_adapters(model, AdapterSettings(**values), seed=1, token_ids=token_ids)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
        save_adapter(adapters, folder, base_model_name=str(base))
        return model(IDS).logits


def merge(base: Path, adapter: Path, out: Path) -> Any:
    out.mkdir()
    source, read = hf.read(base), read_adapter(adapter)
    merged = merged_model(source, plan_merge(source, read))
    hf.write(merged, out)
    return compare(source, read, out)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
def test_merged_answers_as_trained(kind: str, family: str, tmp_path: Path) -> None:
    settings = dict(SETTINGS[kind])
    if family == "llama" and "ensure_weight_tying" in settings:
        pytest.skip("its head is not tied")
    base = save_tiny(tmp_path / "base", family)
    want = adapt(base, tmp_path / "adapter", **settings)
    proof = merge(base, tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert proof["reference"].startswith("base with the adapter's branch") and proof["max_logit_difference"] < 1e-4
    assert proof["greedy_agreement"] == 1.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (family != "llama" and ("tied" in kind or "rows" in kind))
    assert config["vocab_size"] == (386 if kind == "new rows" else 384)


def test_over_bf16_there_is_one_rounding(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "fp32", "llama_tied")
    load(base).bfloat16().save_pretrained(tmp_path / "base")
    adapt(
        tmp_path / "base", tmp_path / "adapter", lora_target_modules=["embed_tokens"], lora_modules_to_save=["lm_head"]
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    adapter, before = read_adapter(tmp_path / "adapter"), hf.read(tmp_path / "base").weights
    after = hf.read(tmp_path / "out").weights
    f = adapter.factors["model.embed_tokens"]
    exact = before["model.embed_tokens.weight"].float() + f.scale * (f.b_OR @ f.a_RI).T
    assert torch.equal(after["model.embed_tokens.weight"], exact.bfloat16())
    assert torch.equal(after["lm_head.weight"], adapter.whole["lm_head.weight"].bfloat16())
