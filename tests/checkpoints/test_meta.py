"""Meta's format: logits of a straightforward Llama with interleaved rotary pairs, and round trips."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_megatron import assert_same, base_of

from finerank.checkpoints.formats import hf, meta
from finerank.checkpoints.weights import BaseModel
from finerank.cli import main
from finerank.errors import CheckpointError, ConfigError


def meta_logits(tensors: dict[str, torch.Tensor], params: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Meta's `llama/model.py`, plainly: rotary embedding on neighbouring pairs of channels."""
    w = {name: t.float() for name, t in tensors.items()}
    heads, groups = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    d, T = params["dim"] // heads, len(ids)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotate(x_THK: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(T)[:, None] * params["rope_theta"] ** (-torch.arange(0, d, 2) / d)
        pairs = torch.view_as_complex(x_THK.reshape(T, -1, d // 2, 2)) * torch.polar(torch.ones(1), angles)[:, None]
        return torch.view_as_real(pairs).reshape(T, -1, d)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((T, T), -math.inf).triu(1)
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (F.linear(h, w[f"{p}attention.w{n}.weight"]).reshape(T, -1, d) for n in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(d) + mask
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(T, -1)
        x = x + F.linear(mixed, w[p + "attention.wo.weight"])
        h = norm(x, w[p + "ffn_norm.weight"])
        gate = F.silu(F.linear(h, w[p + "feed_forward.w1.weight"])) * F.linear(h, w[p + "feed_forward.w3.weight"])
        x = x + F.linear(gate, w[p + "feed_forward.w2.weight"])
    return F.linear(norm(x, w["norm.weight"]), w["output.weight"])


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_plain_implementation_of_metas_model_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    model = base_of(family, dtype=torch.float32)
    meta.write(model, tmp_path / "meta")
    tensors = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert meta.ffn_size(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == 64
    ids = torch.arange(1, 21)
    (tmp_path / "hf").mkdir()
    hf.write(model, tmp_path / "hf")
    library = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = library(ids[None]).logits[0]
    assert (meta_logits(tensors, params, ids) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral"])
def test_comes_back_bit_equal_from_any_number_of_shards(family: str, num_shards: int, tmp_path: Path) -> None:
    model = base_of(family, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    meta.write(model, tmp_path, num_shards=num_shards)
    assert len(list(tmp_path.glob("consolidated.*.pth"))) == num_shards
    again = meta.read(tmp_path)
    assert_same(again.weights, model.weights)
    (tmp_path / "config.json").unlink()  # as Meta ships it
    bare = meta.read(tmp_path)
    assert_same(bare.weights, model.weights)
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert bare.config[key] == model.config[key], key


def test_large_vocabularies_share_rows_as_llama_3_does(tmp_path: Path) -> None:
    model = base_of("llama", vocab_size=100_002, hidden_size=8, head_dim=2, num_hidden_layers=1)
    meta.write(model, tmp_path, num_shards=2)
    shard = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    assert shard["tok_embeddings.weight"].shape == (50_001, 8)
    assert_same(meta.read(tmp_path).weights, model.weights)


@given(st.integers(1, 64).map(lambda n: 8 * n), st.integers(1, 400))
def test_the_mlp_size_is_what_metas_code_computes(dim: int, ffn: int) -> None:
    params = meta._ffn_params(dim, ffn)
    assert meta.ffn_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == ffn


@pytest.mark.parametrize("dim,ffn,multiple_of", [(4096, 11008, 256), (5120, 13824, 256), (4096, 14336, 1024)])
def test_published_sizes(dim: int, ffn: int, multiple_of: int) -> None:
    multiplier = 1.3 if ffn == 14336 else None
    assert meta.ffn_size(dim, multiple_of, multiplier) == ffn
    params = meta._ffn_params(dim, ffn)
    assert meta.ffn_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == ffn


def test_the_command_writes_and_reads_it(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    hf.write(base_of("llama"), source)
    argv = ["convert", "--load-dir", str(source), "--save-model-type", "meta", "--save-dir", str(tmp_path / "meta")]
    assert main([*argv, "--target-tensor-parallel-size", "2"]) == 0
    argv = ["convert", "--load-model-type", "meta", "--load-dir", str(tmp_path / "meta")]
    assert main([*argv, "--save-dir", str(tmp_path / "back")]) == 0
    assert_same(hf.read(tmp_path / "back").weights, hf.read(source).weights)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3"):
        meta.write(base_of("qwen3"), tmp_path)
    with pytest.raises(ConfigError, match="does not divide into 3 shards"):
        meta.write(base_of("llama"), tmp_path, num_shards=3)
    wide: BaseModel = base_of("mistral", head_dim=16)
    with pytest.raises(ConfigError, match="head_dim"):
        meta.write(wide, tmp_path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    meta.write(base_of("llama"), tmp_path, num_shards=2)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match="without gaps"):
        meta.read(tmp_path)
