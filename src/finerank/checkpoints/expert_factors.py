"""Changes of fused experts and of their router, as a base's file and Megatron's local experts have them.

    model.layers.0.mlp.experts.gate_up_proj       ->  model.layers.0.block_sparse_moe.experts.3.w1, .w3    (mixtral)
    model.layers.0.mlp.experts.down_proj          ->  model.layers.0.block_sparse_moe.experts.3.w2
    model.layers.0.mlp.gate.weight                ->  model.layers.0.block_sparse_moe.gate.weight

Gate and up of an expert share their A, and each has its rows of B, so the change is the same, bit for bit.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from finerank.adapters.experts import by_expert
from finerank.checkpoints.lora import Adapter, Factors
from finerank.errors import AdapterError, ModelError
from finerank.models.families import dims_of, families, family_of

_FIRST, _SECOND = "linear_fc1", "linear_fc2"
_FUSED = re.compile(r"(.*layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(.*layers\.\d+\.)mlp\.gate\.weight")


def expand_experts(adapter: Adapter, base_config: Mapping[str, Any]) -> Adapter:
    """The same change without fused experts. An adapter that has none comes back as it is.

    Raises:
        AdapterError: the base has no experts of this kind.
    """
    adapter = replace(adapter, whole=_whole(adapter, base_config))
    fused = {name: f for name, f in adapter.factors.items() if f.num_experts}
    if not fused:
        return adapter
    factors = {name: f for name, f in adapter.factors.items() if not f.num_experts}
    ranks, alphas = {}, {}
    for name, f in fused.items():
        parts = _names(adapter, name, f.num_experts, base_config)
        a_ERI, b_EOR = by_expert(f.a_RI, f.b_OR, f.num_experts)
        for e, (a_RI, b_OR) in enumerate(zip(a_ERI, b_EOR, strict=True)):
            for part, b in zip(parts, b_OR.chunk(len(parts)), strict=True):
                factors[part.replace("{expert}", str(e))] = Factors(a_RI.contiguous(), b.contiguous(), f.scale)
        for part in parts:
            pattern = re.escape(part).replace(re.escape("{expert}"), r"\d+")
            ranks[pattern] = f.rank
            alphas[pattern] = f.scale * (f.rank**0.5 if adapter.config.get("use_rslora") else f.rank)
    config = _config(adapter.config, ranks, alphas, set(factors))
    return replace(adapter, config=config, factors=dict(sorted(factors.items())))


def _whole(adapter: Adapter, base_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What was trained whole, under the names of the base's file."""
    whole: dict[str, Tensor] = {}
    for name, tensor in adapter.whole.items():
        if _FUSED.fullmatch(name):
            parts = _names(adapter, name, len(tensor), base_config)
            for e, weight_OI in enumerate(tensor):
                for part, rows in zip(parts, weight_OI.chunk(len(parts)), strict=True):
                    whole[f"{part.replace('{expert}', str(e))}.weight"] = rows.contiguous()
        elif match := _ROUTER.fullmatch(name):
            rules = [
                r for f in families().values() for r in f.layer_rules if base_config.get("model_type") in f.model_types
            ]
            router = next((r.hf[0] for r in rules if r.megatron == "mlp.router"), "mlp.gate")
            whole[f"{match[1]}{router}.weight"] = tensor
        else:
            whole[name] = tensor
    return whole


def _names(adapter: Adapter, name: str, num_experts: int, base_config: Mapping[str, Any]) -> list[str]:
    """The modules of the base's file that a fused parameter stands for, with `{expert}` in them."""
    match = _FUSED.fullmatch(name)
    try:
        family, dims = family_of(base_config), dims_of(base_config)
    except ModelError as error:
        raise AdapterError(f"{adapter.source} adapts fused experts, which need a known family: {error}") from error
    wanted = _FIRST if match is not None and match[2] == "gate_up_proj" else _SECOND
    rule = next((r for r in family.layer_rules if r.is_expert and r.megatron.endswith(wanted)), None)
    if match is None or rule is None or num_experts != dims.num_experts:
        has = f"{dims.num_experts} experts" if rule is not None else "no experts"
        raise AdapterError(
            f"{adapter.source} adapts {name} of {num_experts} experts and the base has {has} of that kind; give the "
            "base it was trained on."
        )
    return [match[1] + part for part in rule.hf]


def _config(
    config: Mapping[str, Any], ranks: dict[str, int], alphas: dict[str, float], modules: set[str]
) -> dict[str, Any]:
    """PEFT's config for the expanded factors: patterns in front, where PEFT looks first."""
    alpha_pattern = {name: int(a) if float(a).is_integer() else a for name, a in alphas.items()}
    usual = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    needed = [p for p in ranks if ranks[p] != usual["r"] or alpha_pattern[p] != usual["lora_alpha"]]
    return {
        **config,
        "rank_pattern": {p: ranks[p] for p in needed} | dict(config.get("rank_pattern") or {}),
        "alpha_pattern": {p: alpha_pattern[p] for p in needed} | dict(config.get("alpha_pattern") or {}),
        "target_parameters": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
