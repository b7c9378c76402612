"""Spellings of tensor names in Megatron checkpoints, all brought to one: mcore's local spelling.

module.decoder.layers.0.mlp.linear_fc1.layer_norm_weight     -> decoder.layers.0.pre_mlp_layernorm.weight
language_model.encoder.layers.0.self_attention.dense.weight  -> decoder.layers.0.self_attention.linear_proj.weight
    ...mlp.experts.linear_fc1.weight3                            -> ...mlp.experts.local_experts.3.linear_fc1.weight
"""

import re
from typing import Any

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")

LEGACY_MODULES = {
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
    "input_norm": "input_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "final_norm": "final_layernorm",
}
_OLDER_LEGACY = {"post_attention_layernorm": "pre_mlp_layernorm"}  # before core 0.6; the other names are mcore's
_TO_LEGACY = {new: old for old, new in LEGACY_MODULES.items()}
_TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_TE_GROUPED = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight(\d{1,6})")


def is_legacy(names: list[str]) -> bool:
    """Names of the legacy layout."""
    return any(name.removeprefix("module.").startswith("language_model.") for name in names)


def to_mcore(name: str) -> str:
    """One name of any Megatron layout in mcore's local spelling; the dots of nested dicts are already joined."""
    name = name.removeprefix("module.")
    if name.startswith("language_model."):
        name = _legacy_to_mcore(name.removeprefix("language_model."))
    elif name == "word_embeddings_for_head.weight":
        name = OUTPUT
    match = LAYER.fullmatch(name)
    if match and match[2] in _TE_NORMS:
        return f"decoder.layers.{match[1]}.{_TE_NORMS[match[2]]}"
    if grouped := _TE_GROUPED.fullmatch(name):
        return f"{grouped[1]}.local_experts.{grouped[3]}.{grouped[2]}.weight"
    return name.replace(".lora_a.", ".lora_A.").replace(".lora_b.", ".lora_B.")


def _legacy_to_mcore(name: str) -> str:
    part, _, rest = name.partition(".")
    if part in ("encoder", "transformer"):
        words = [LEGACY_MODULES.get(w, _OLDER_LEGACY.get(w, w)) for w in rest.split(".")]
        return "decoder." + ".".join(words)
    return f"{part}.{rest}"


def with_te_norms(name: str) -> str:
    """The transformer-engine spelling that MindSpeed-LLM writes: only the first norm is fused."""
    return re.sub(r"\.input_layernorm\.weight$", ".self_attention.linear_qkv.layer_norm_weight", name)


def to_legacy(tensors: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of the legacy layout from flat mcore names."""
    language_model: dict[str, Any] = {}
    nested: dict[str, Any] = {"language_model": language_model}
    for name, value in tensors.items():
        if name.startswith("decoder."):
            words = [_TO_LEGACY.get(w, w) for w in name.removeprefix("decoder.").split(".")]
            language_model.setdefault("encoder", {})[".".join(words)] = value
        elif name == EMBEDDING:
            language_model["embedding"] = {"word_embeddings": {"weight": value}}
        elif name == TIED_OUTPUT:
            nested["word_embeddings_for_head"] = {"weight": value}
        else:
            assert name == OUTPUT, name
            language_model["output_layer"] = {"weight": value}
    return nested


TIED_OUTPUT = "tied:" + OUTPUT
"""Plan name of a tied embedding's copy on the last stage; stored as `OUTPUT`, in legacy under a name of its own."""


def to_flat(tensors: dict[str, Any], *, te_norms: bool) -> dict[str, Any]:
    """The flat dict of the mcore layout."""
    flat = {OUTPUT if name == TIED_OUTPUT else name: value for name, value in tensors.items()}
    return {with_te_norms(name): value for name, value in flat.items()} if te_norms else flat
