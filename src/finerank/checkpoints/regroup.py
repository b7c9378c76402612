"""Adapters between PEFT's separate modules and Megatron's grouped ones, exactly.

    q_proj, k_proj, v_proj  <->  linear_qkv           gate_proj, up_proj  <->  linear_fc1

A Megatron module has one A for all its parts, one rank and one alpha for the whole checkpoint. Parts that share A keep
it. Parts with factors of their own become blocks of a larger rank:

    A = [A_q; A_k; A_v]      B = [[B_q 0 0], [0 B_k 0], [0 0 B_v]]      alpha / r unchanged

Smaller ranks are filled up with zeros; scales that differ (alpha patterns, rsLoRA) are folded into B. What was done is
recorded in the checkpoint's args, so that the way back gives the original bits where nothing was trained in between.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints import packing
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.weights import same_bits
from finerank.errors import AdapterError
from finerank.models.families import Dims, Family, TensorRule

_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
Place = tuple[int, str]
"""(layer, Megatron module with the global number of an expert)."""


@dataclass
class GroupedAdapter:
    """A LoRA checkpoint in Megatron's form, unsplit."""

    modules: dict[Place, tuple[TensorRule, Tensor, Tensor]]
    """(rule, A [R, I], B packed [O, R]) by place."""
    rank: int
    alpha: float
    record: dict[str, Any] | None = None
    """How it was made from a PEFT adapter: its config, and by module (offset, rank, folded ratio, dtype)."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    rule: TensorRule
    parts: list[Factors | None]
    names: list[str]


def group_adapter(
    adapter: Adapter, family: Family, dims: Dims, shapes: Mapping[str, tuple[int, ...]]
) -> GroupedAdapter:
    """A PEFT-style adapter in Megatron's form.

    Args:
        shapes: of the base's weights by Hugging Face module, for parts of a group that have no adapter.

    Raises:
        AdapterError: something that Megatron's form cannot hold; the message says how to fold it.
    """
    if adapter.is_dora:
        raise AdapterError(
            f"{adapter.source} is a DoRA adapter, which Megatron LoRA cannot hold; merge it into its base."
        )
    if adapter.whole or adapter.rows:
        name = next(iter((*adapter.whole, *adapter.rows)))
        raise AdapterError(f"{adapter.source} trained {name} whole, which Megatron LoRA cannot hold; merge it instead.")
    groups = _groups(adapter, family, dims)
    offsets = {place: _offsets(group) for place, group in groups.items()}
    rank = max(width for _, width in offsets.values())
    alpha, scale = _common_scale([f.scale for f in adapter.factors.values()], rank)
    modules, record, inexact = {}, {}, 0
    for place, group in groups.items():
        columns, _ = offsets[place]
        modules[place] = (group.rule, *_build(group, columns, rank, scale, dims, shapes))
        for name, factors, offset in zip(group.names, group.parts, columns, strict=True):
            if factors is not None:
                ratio = factors.scale / scale
                record[name] = [offset, factors.rank, ratio, str(factors.b_OR.dtype)]
                inexact += not _is_power_of_two(ratio)
    notes = []
    if rank > max(f.rank for f in adapter.factors.values()):
        notes.append(f"separate factors become blocks: rank {rank}, alpha {alpha:g}")
    if inexact:
        notes.append(f"the scale of {inexact} modules is folded into lora_B, rounded once")
    return GroupedAdapter(modules, rank, alpha, {"config": adapter.config, "modules": record}, tuple(notes))


def _groups(adapter: Adapter, family: Family, dims: Dims) -> dict[Place, _Group]:
    left = dict(adapter.factors)
    groups: dict[Place, _Group] = {}
    for layer in range(dims.num_layers):
        for rule in family.layer_rules:
            for expert in range(dims.num_experts) if rule.is_expert else [None]:
                hf = [f"model.layers.{layer}.{h}".replace("{expert}", str(expert)) for h in rule.hf]
                parts = [left.pop(name, None) for name in hf]
                if any(parts):
                    groups[layer, rule.megatron.replace("{expert}", str(expert))] = _Group(rule, parts, hf)
    if left:
        raise AdapterError(
            f"{adapter.source} adapts {next(iter(left))}, for which Megatron has no LoRA module; merge it instead."
        )
    for group in groups.values():
        if group.rule.split is None:
            raise AdapterError(f"{adapter.source} adapts {group.names[0]}, which is no linear of Megatron; merge it.")
    return groups


def _offsets(group: _Group) -> tuple[list[int], int]:
    """(first column of each part in B, width): all 0 when the parts share A, blocks otherwise."""
    present = [p for p in group.parts if p is not None]
    if all(same_bits(present[0].a_RI, p.a_RI) for p in present):
        return [0] * len(group.parts), present[0].rank
    columns, width = [], 0
    for part in group.parts:
        columns.append(width)
        width += part.rank if part is not None else 0
    return columns, width


def _common_scale(scales: list[float], rank: int) -> tuple[float, float]:
    """(alpha, scale) of the checkpoint: alpha is a whole number, as Megatron's flag wants; most modules keep theirs."""
    usual = Counter(scales).most_common(1)[0][0]
    alpha = max(1, round(usual * rank))
    return float(alpha), alpha / rank


def _build(
    group: _Group, columns: list[int], rank: int, scale: float, dims: Dims, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    present = next(p for p in group.parts if p is not None)
    ratios = [p.scale / scale for p in group.parts if p is not None]
    is_exact = all(_is_power_of_two(r) for r in ratios)
    b_dtype = present.b_OR.dtype if is_exact else torch.float32
    a = torch.zeros(rank, present.a_RI.shape[1], dtype=present.a_RI.dtype)
    blocks = []
    for name, part, column in zip(group.names, group.parts, columns, strict=True):
        num_rows = part.b_OR.shape[0] if part is not None else shapes[name][0]
        block = torch.zeros(num_rows, rank, dtype=b_dtype)
        if part is not None:
            a[column : column + part.rank] = part.a_RI
            block[:, column : column + part.rank] = scaled(part.b_OR, part.scale / scale)
        blocks.append(block)
    return a, packing.pack(group.rule.packing, blocks, dims)


def scaled(b: Tensor, ratio: float) -> Tensor:
    """lora_B with a factor folded in: exact for powers of two, otherwise in fp32, rounded once."""
    if _is_power_of_two(ratio):
        return b if ratio == 1 else b * ratio
    return (b.double() * ratio).float()


def _is_power_of_two(ratio: float) -> bool:
    return math.frexp(ratio)[0] == 0.5


def ungroup_adapter(grouped: GroupedAdapter, dims: Dims, *, source: str) -> Adapter:
    """A Megatron-form adapter as PEFT's: the recorded original where it still holds, else parts that share A."""
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for (layer, module), (rule, a, b) in grouped.modules.items():
        expert = module.split("local_experts.")[1].split(".")[0] if rule.is_expert else ""
        for hf, part in zip(rule.hf, packing.unpack(rule.packing, b, dims), strict=True):
            shared[f"model.layers.{layer}.{hf}".replace("{expert}", expert)] = (a, part)
    if grouped.record is not None:
        original = _original(shared, grouped.record)
        if original is not None:
            return Adapter(config=grouped.record["config"], factors=original, source=source)
    scale = grouped.alpha / grouped.rank
    factors = {name: Factors(a, b.contiguous(), scale) for name, (a, b) in sorted(shared.items())}
    return Adapter(config=lora_config(grouped.rank, grouped.alpha, factors), factors=factors, source=source)


def _original(shared: dict[str, tuple[Tensor, Tensor]], record: dict[str, Any]) -> dict[str, Factors] | None:
    """The blocks that `group_adapter` put together; None when the tensors are no longer those blocks."""
    from finerank.adapters.shapes import shape_of

    factors = {}
    for name, (a, b) in sorted(shared.items()):
        offset, rank, ratio, dtype = record["modules"].get(name, (0, 0, 1.0, ""))
        outside = torch.cat([b[:, :offset], b[:, offset + rank :]], dim=1)
        if outside.count_nonzero():
            return None
        if rank:
            block = b[:, offset : offset + rank]
            scale = shape_of(record["config"], name).scale
            b_OR = scaled(block, 1 / ratio).to(_DTYPES[dtype])  # undoes a fold of 16-bit factors exactly
            factors[name] = Factors(a[offset : offset + rank].clone(), b_OR.contiguous(), scale)
    return factors if set(factors) == set(record["modules"]) else None


def lora_config(rank: int, alpha: float, factors: Mapping[str, Factors], **more: Any) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON values, with its defaults for what is not given."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in factors}),
    }
    return {**config, **more}


def read_record(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of `group_adapter` from a checkpoint's args; None when there is none or it is not understood."""
    text = args.get("finerank_lora")
    try:
        record = json.loads(text) if isinstance(text, str) else None
        if not isinstance(record, dict) or not isinstance(record["config"], dict):
            return None
        for name, (offset, rank, ratio, dtype) in record["modules"].items():
            whole = dtype in _DTYPES and type(offset) is int and type(rank) is int and offset >= 0 and rank > 0
            if not isinstance(name, str) or not whole or not math.isfinite(ratio) or ratio == 0:
                return None
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return None
    return record
