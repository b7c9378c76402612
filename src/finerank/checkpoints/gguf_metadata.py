"""The metadata of a GGUF base model: sizes, rotary frequencies and the tokenizer, from a Hugging Face folder.

The counterpart of `finerank.models.gguf_file` and `gguf_tokenizer`, which read them; keys as llama.cpp's
convert_hf_to_gguf.py writes them.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from finerank.checkpoints.formats.hf import read_json
from finerank.checkpoints.weights import BaseModel
from finerank.errors import ConfigError
from finerank.models.families import Dims
from finerank.models.gguf_tokenizer import PRE_TOKENIZERS


def add_metadata(writer: gguf.GGUFWriter, model: BaseModel, dims: Dims, *, file_type: int) -> None:
    """Sizes and tokenizer of a model. Raises ConfigError for a rope or a tokenizer that GGUF cannot name."""
    config = model.config
    rope = _rope(config)
    writer.add_name(str(config.get("_name_or_path") or (model.folder.name if model.folder else "model")))
    writer.add_block_count(dims.num_layers)
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(dims.hidden_size)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(dims.num_attention_heads)
    writer.add_head_count_kv(dims.num_key_value_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(dims.vocab_size)
    writer.add_file_type(file_type)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if model.folder is None or not (model.folder / "tokenizer.json").is_file():
        raise ConfigError("A GGUF model needs the tokenizer beside its weights: give a base with a tokenizer.json.")
    _add_tokenizer(writer, model.folder, config, dims.vocab_size)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ConfigError(f"GGUF export does not know rope_type {rope['rope_type']!r}; use hf or mg.")
    return rope


def rope_factors(config: dict[str, Any], dims: Dims) -> Tensor | None:
    """Llama 3's frequency factors [d / 2], which GGUF stores as a tensor; None for other models."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    steps = torch.arange(0, dims.head_dim, 2, dtype=torch.float64) / dims.head_dim
    frequencies = float(rope["rope_theta"]) ** -steps
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], vocab_size: int) -> None:
    stored = read_json(folder / "tokenizer.json")
    model = stored.get("model") or {}
    rule = _rule_of(stored.get("pre_tokenizer"))
    if model.get("type") != "BPE" or rule is None:
        raise ConfigError(
            f"{folder / 'tokenizer.json'} splits text by a rule without a known GGUF name; use --to gguf-lora or hf."
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, number in model["vocab"].items():
        if number < vocab_size:
            tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in stored.get("added_tokens", []):
        if added["id"] < vocab_size:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model["merges"]])
    _add_special_tokens(writer, folder, config, tokens)


def _rule_of(pre_tokenizer: Any) -> str | None:
    """The name of a splitting rule, found by comparing with the rules we read."""
    for name, make in PRE_TOKENIZERS.items():
        if _normal_form(json.loads(make().__getstate__())) == _normal_form(pre_tokenizer):
            return name
    return None


def _normal_form(rule: Any) -> Any:
    """A pre-tokenizer's JSON without fields that do not change what it does."""
    if isinstance(rule, dict):
        steps = rule.get("pretokenizers")
        if rule.get("type") == "Sequence" and isinstance(steps, list) and len(steps) == 1:
            return _normal_form(steps[0])
        return {k: _normal_form(v) for k, v in rule.items() if k != "trim_offsets"}
    return [_normal_form(v) for v in rule] if isinstance(rule, list) else rule


def _add_special_tokens(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < len(tokens):
            add(number)
    ids = tokenizer("x").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
