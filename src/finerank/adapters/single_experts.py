"""Adapters of single experts, made where each expert was a linear of its own, for a model that holds them fused.

    ....block_sparse_moe.experts.3.w1.lora_A.weight  ->  rows of ....mlp.experts.base_layer.lora_A.weight   (mixtral)

Such files come from PEFT before `transformers` fused experts, and from Megatron's local experts. Gate and up become one
product: with one A for both they keep it; factors of their own become blocks of twice the rank at the same scale, as in
PEFT's `transformers_weight_conversion`. The change is the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finerank.adapters.experts import PARAMETERS, experts_modules, flat, leaf
from finerank.adapters.file_tensors import FileTensors
from finerank.adapters.shapes import Shape, shape_of
from finerank.errors import AdapterError, ModelError
from finerank.models.families import family_of


def join_single_experts(
    model: nn.Module, found: FileTensors, config: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Replace factors of single experts in `found` by those of fused ones; the config that describes the result.

    Raises AdapterError for experts that are not all adapted alike, which no fused form can say.
    """
    joined: dict[str, Shape] = {}
    for module, parts in _single(model, found).items():
        shapes, pairs = {}, {}
        for parameter, names in parts.items():
            E = getattr(model.get_submodule(module), parameter).shape[0]
            members = [_member(config, found.linears, [n.replace("{expert}", str(e)) for n in names]) for e in range(E)]
            if None in members or len({(a.shape, b.shape, s) for a, b, s in members}) > 1:  # type: ignore[misc]
                raise AdapterError(
                    f"{folder} does not adapt all experts of {module} alike, and this model holds them fused; merge it "
                    "into the base, and load the merged model."
                )
            factors = [m for m in members if m is not None]
            pairs[parameter] = flat(torch.stack([a for a, _, _ in factors]), torch.stack([b for _, b, _ in factors]))
            shapes[parameter] = Shape(factors[0][0].shape[0], factors[0][2])
            for name in (n.replace("{expert}", str(e)) for n in names for e in range(E)):
                del found.linears[name]
        for parameter, (a, b) in pairs.items():
            where = f"{module}.{leaf(parameter, pairs)}".removesuffix(".")
            found.linears[where] = {"lora_A": a, "lora_B": b}
            joined[f"{module}.{parameter}"] = shapes[parameter]
    return _described(config, found, joined) if joined else dict(config)


def _single(model: nn.Module, found: FileTensors) -> dict[str, dict[str, list[str]]]:
    """Names of single experts that `found` has, with `{expert}` in them, by fused module and parameter."""
    try:
        rules = [r for r in family_of(model.config.to_dict()).layer_rules if r.is_expert]  # type: ignore[union-attr, operator]
    except (ModelError, AttributeError):
        return {}
    single: dict[str, dict[str, list[str]]] = {}
    for module in experts_modules(model):
        layer = module.removesuffix("mlp.experts")
        for parameter, rule in zip(PARAMETERS, rules, strict=True):
            names = [layer + part for part in rule.hf]
            patterns = [re.escape(n).replace(re.escape("{expert}"), r"\d+") for n in names]
            if any(re.fullmatch(p, n) for n in found.linears for p in patterns):
                single.setdefault(module, {})[parameter] = names
    return single


def _member(
    config: Mapping[str, Any], linears: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scale of one expert's product out of its parts; None where they cannot be one."""
    parts = [linears.get(name, {}) for name in names]
    shapes = {shape_of(config, name) for name in names}
    if len(shapes) > 1 or any(set(part) != {"lora_A", "lora_B"} for part in parts):
        return None
    a, b = [part["lora_A"] for part in parts], [part["lora_B"] for part in parts]
    scale = shapes.pop().scale
    if all(t.shape == a[0].shape and torch.equal(t, a[0]) for t in a):
        return a[0], torch.cat(b), scale
    return torch.cat(a), torch.block_diag(*b), scale


def _described(config: Mapping[str, Any], found: FileTensors, joined: Mapping[str, Shape]) -> dict[str, Any]:
    """PEFT's config of the joined factors: their own ranks in front, where PEFT looks first."""
    root = bool(config.get("use_rslora"))
    ranks = {name: shape.rank for name, shape in joined.items()}
    alphas = {name: shape.scale * (math.sqrt(shape.rank) if root else shape.rank) for name, shape in joined.items()}
    owners = {name.rpartition(".")[0] for name in joined}
    linears = [name for name in found.linears if name.replace(".base_layer", "") not in owners]
    return {
        **config,
        "target_modules": sorted({*linears, *found.embeddings}),
        "target_parameters": sorted(joined),
        "rank_pattern": {**ranks, **(config.get("rank_pattern") or {})},
        "alpha_pattern": {
            **{name: int(a) if float(a).is_integer() else a for name, a in alphas.items()},
            **(config.get("alpha_pattern") or {}),
        },
    }
