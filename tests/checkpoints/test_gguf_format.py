"""GGUF: base models and LoRA adapters read back with the `gguf` package, and answered by llama.cpp itself."""

from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from test_megatron import assert_same, base_of, save
from test_megatron_lora import TARGETS, adapter_of, same_factors
from transformers import AutoModelForCausalLM, AutoTokenizer

from finerank.checkpoints.formats import gguf, hf, peft
from finerank.checkpoints.weights import BaseModel
from finerank.cli import main
from finerank.errors import AdapterError, CheckpointError, ConfigError
from tiny import tiny_tokenizer

FAMILIES = ["llama", "llama_tied", "qwen2", "qwen3", "mistral"]


def stored(folder: Path, family: str, **options: Any) -> BaseModel:
    return hf.read(save(base_of(family, **options), folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_come_back_bit_equal(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = stored(tmp_path / "hf", family, dtype=dtype)
    (tmp_path / "g").mkdir()
    gguf.write(model, tmp_path / "g")
    assert gguf.matches(tmp_path / "g")
    again = gguf.read(tmp_path / "g")
    assert_same(again.weights, model.weights)
    assert again.folder is not None
    text = "Hello 你好 1234 <|im_end|>\n\n  def f():"
    assert AutoTokenizer.from_pretrained(again.folder)(text).input_ids == tiny_tokenizer()(text).input_ids
    assert AutoTokenizer.from_pretrained(again.folder).chat_template == tiny_tokenizer().chat_template


def test_llama_3_frequencies_survive(tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    model = stored(tmp_path / "hf", "llama", rope_parameters=rope)
    (tmp_path / "g").mkdir()
    gguf.write(model, tmp_path / "g")
    assert gguf.read(tmp_path / "g").config["rope_parameters"] == rope


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_come_back(family: str, tmp_path: Path) -> None:
    model = base_of(family)
    adapter = adapter_of(model, TARGETS["all"])
    gguf.write_adapter(adapter, tmp_path, base=model)
    same_factors(gguf.read_adapter(tmp_path, hf_config=model.config), adapter)


def test_the_stored_adapter_is_what_llama_cpp_multiplies(tmp_path: Path) -> None:
    """alpha / rank of each module times lora_b lora_a, against the base's rows as GGUF has them."""
    base = stored(tmp_path / "hf", "llama")
    pattern = {"v_proj": 5, "layers.0.mlp.up_proj": 1}
    adapter = adapter_of(base, TARGETS["all"], alpha=5, use_rslora=True, alpha_pattern=pattern)
    from finerank.adapters.shapes import shape_of
    from finerank.checkpoints.lora import Factors
    from finerank.checkpoints.merge import merged_model, plan_merge

    for name, f in adapter.factors.items():
        adapter.factors[name] = Factors(f.a_RI, f.b_OR, shape_of(adapter.config, name).scale)
    for folder in ("lora", "base", "merged"):
        (tmp_path / folder).mkdir()
    notes = gguf.write_adapter(adapter, tmp_path / "lora", base=base)
    assert "folded" in notes[0]
    gguf.write(base, tmp_path / "base", dtype=torch.float32)
    from dataclasses import replace

    from finerank.checkpoints.weights import CastWeights

    exact = replace(base, weights=CastWeights(base.weights, torch.float32))
    gguf.write(merged_model(exact, plan_merge(exact, adapter)), tmp_path / "merged")
    lora, plain, merged = (package.GGUFReader(next((tmp_path / f).glob("*.gguf"))) for f in ("lora", "base", "merged"))
    alpha = lora.get_field("adapter.lora.alpha").contents()
    factors = {t.name: t.data for t in lora.tensors}
    weights, expected = ({t.name: t.data for t in reader.tensors} for reader in (plain, merged))
    seen = 0
    for name, weight in weights.items():
        if f"{name}.lora_a" in factors:
            a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
            weight = weight + np.float32(alpha / a.shape[0]) * (b @ a)
            seen += 1
        assert np.abs(weight - expected[name]).max() < 1e-5, name
    assert seen == len(adapter.factors)


def test_what_llama_cpp_cannot_apply_is_refused(tmp_path: Path) -> None:
    model = base_of("llama")
    adapter = adapter_of(model, ["q_proj"])
    adapter.whole["lm_head.weight"] = torch.zeros(384, 32)
    with pytest.raises(AdapterError, match=r"llama\.cpp"):
        gguf.write_adapter(adapter, tmp_path, base=model)
    with pytest.raises(ConfigError, match="gemma3"):
        gguf.write(base_of("gemma3"), tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 50)
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        gguf.read_adapter(tmp_path, hf_config=model.config)


@pytest.mark.slow
def test_llama_cpp_answers_like_the_merged_model(tmp_path: Path) -> None:
    """llama.cpp itself: base with adapter and merged model give the same tokens; the base gives the library's."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp to run llama.cpp itself")
    from llama_cpp_answers import PROMPT, greedy

    base = stored(tmp_path / "hf", "llama", dtype=torch.float32)
    adapter = adapter_of(base, TARGETS["all"], alpha=0.5)
    (tmp_path / "adapter").mkdir()
    peft.write_adapter(adapter, tmp_path / "adapter")
    common = ["--load", str(tmp_path / "hf"), "--lora-load", str(tmp_path / "adapter"), "--proof", "weights"]
    for to in ("gguf", "gguf-lora"):
        assert main(["export", *common, "--to", to, "--save-dir", str(tmp_path / to)]) == 0
    (tmp_path / "base").mkdir()
    gguf.write(base, tmp_path / "base")
    lora = tmp_path / "gguf-lora" / "adapter.gguf"
    merged = greedy(xllamacpp, tmp_path / "gguf" / "model.gguf")
    with_adapter = greedy(xllamacpp, tmp_path / "base" / "model.gguf", lora=lora)
    plain = greedy(xllamacpp, tmp_path / "base" / "model.gguf")
    assert merged == with_adapter != plain
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([PROMPT])
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, library(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = iter(ids[0, len(PROMPT) :].tolist())
    assert all(token in expected for token in plain[1]), "llama.cpp's tokens are not the library's, in order"
    assert len(plain[1]) >= 3
