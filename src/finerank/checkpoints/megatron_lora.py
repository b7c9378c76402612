"""LoRA checkpoints in Megatron's form, any TP x PP x VPP x EP split, read and written.

    decoder.layers.0.mlp.linear_fc1.lora_A.default.weight    column-parallel: A on every rank, B split by rows
    decoder.layers.0.mlp.linear_fc2.lora_A.default.weight    row-parallel: A split by columns, B on every rank

*Filtered* checkpoints hold the adapter only; *full* or *unified* ones hold the base too, adapted weights as
`base_layer`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints import packing
from finerank.checkpoints.expert_factors import expand_experts
from finerank.checkpoints.layout import Layout
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.megatron import Target, base_args
from finerank.checkpoints.megatron_args import config_of
from finerank.checkpoints.megatron_names import LEGACY_MODULES
from finerank.checkpoints.megatron_read import MegatronCheckpoint, stored_modules
from finerank.checkpoints.megatron_write import Entry, entries_of_base, layer_modules, make_entry, write_megatron
from finerank.checkpoints.regroup import GroupedAdapter, group_adapter, read_record, ungroup_adapter
from finerank.checkpoints.weights import BaseModel
from finerank.errors import AdapterError, CheckpointError, ConfigError
from finerank.models.families import Dims, Family, dims_of, family_of

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def read_lora(
    folder: Path,
    *,
    hf_config: dict[str, Any] | None = None,
    family: Family | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_target_modules: Sequence[str] | None = None,
) -> Adapter:
    """Read a LoRA checkpoint as one adapter.

    Rank, alpha and targets come from the checkpoint where it has them.

    Raises:
        AdapterError: a flag disagrees with the checkpoint, or the checkpoint does not say its alpha and no flag does.
        CheckpointError: something is missing or torn.
    """
    checkpoint = MegatronCheckpoint.open(folder)
    config = hf_config if hf_config is not None else config_of(checkpoint.args, family=family, source=str(folder))
    dims = dims_of(config)
    modules = _read_modules(checkpoint, family_of(config), dims)
    if not modules:
        raise AdapterError(f"{folder} holds no lora_A or lora_B tensor; it is no LoRA checkpoint.")
    ranks = {a.shape[0] for _, a, _ in modules.values()}
    if len(ranks) != 1:
        raise AdapterError(f"{folder} holds adapters of different ranks {sorted(ranks)}; Megatron has one for all.")
    rank = ranks.pop()
    _agree("--lora-r", lora_r, rank, folder)
    stored_r = checkpoint.args.get("lora_r")
    if isinstance(stored_r, int) and stored_r != rank:
        raise AdapterError(f"{folder}: its args say lora_r {stored_r}, its tensors have rank {rank}; it is damaged.")
    found = sorted({module.rsplit(".", 1)[-1] for _, module in modules})
    if lora_target_modules is not None:
        named = sorted({LEGACY_MODULES.get(m, m) for m in lora_target_modules})
        _agree("--lora-target-modules", " ".join(named), " ".join(found), folder)
    alpha = _alpha(checkpoint, lora_alpha, folder)
    grouped = GroupedAdapter(modules, rank, alpha, read_record(checkpoint.args))
    return ungroup_adapter(grouped, dims, source=str(folder))


def _alpha(checkpoint: MegatronCheckpoint, flag: float | None, folder: Path) -> float:
    stored = checkpoint.args.get("lora_alpha")
    if isinstance(stored, int | float) and not isinstance(stored, bool):
        _agree("--lora-alpha", flag, float(stored), folder)
        return float(stored)
    if flag is None:
        raise AdapterError(f"{folder} does not say its alpha; give --lora-alpha as it was trained with.")
    return flag


def _agree(flag: str, given: Any, stored: Any, folder: Path) -> None:
    if given is not None and given != stored:
        raise AdapterError(f"{flag} {given} disagrees with {folder}, which has {stored}; leave the flag out.")


def _read_modules(checkpoint: MegatronCheckpoint, family: Family, dims: Dims) -> dict[tuple[int, str], Any]:
    layers = checkpoint.layers()
    if len(layers) != dims.num_layers:
        raise CheckpointError(
            f"{checkpoint.folder} has adapters in {len(layers)} layers, the model has {dims.num_layers}; give the "
            "model it was trained on."
        )
    modules = {}
    for layer, (stage, chunk, local) in enumerate(layers):
        for rule, name, hf, ep_rank in stored_modules(checkpoint, family, dims, stage, chunk, local):
            table = checkpoint.chunks[stage][chunk][0, ep_rank]
            if name + _A not in table and name + _B not in table:
                continue
            factors: list[Tensor] = []
            for suffix, key in ((_A, ".lora_A"), (_B, ".lora_B")):
                shards = checkpoint.shards(stage, chunk, name + suffix, ep_rank=ep_rank)
                dim = packing.split_dim(rule, key)
                factors.append(checkpoint.joined(shards, rule, dim, name + suffix))
            a, b = factors
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    f"{checkpoint.folder}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}."
                )
            expert = hf[0].split("experts.")[1].split(".")[0] if rule.is_expert else ""
            modules[layer, rule.megatron.replace("{expert}", expert)] = (rule, a, b)
    return modules


def write_lora(
    adapter: Adapter,
    folder: Path,
    *,
    base: BaseModel,
    legacy: bool,
    target: Target | None = None,
    with_base: bool = False,
) -> tuple[str, ...]:
    """Write an adapter as a LoRA checkpoint into an existing empty folder; returns what the user should know.

    Args:
        base: the model it belongs to; its weights are read only `with_base` (a unified checkpoint).

    Raises:
        AdapterError: Megatron's form cannot hold this adapter; the message says how to fold it.
    """
    target = target or Target()
    family, dims = family_of(base.config), dims_of(base.config)
    layout = target.layout(dims)
    adapter = expand_experts(adapter, base.config)
    shapes = {n.removesuffix(".weight"): base.weights.info(n).shape for n in base.weights if n.endswith(".weight")}
    _check_fits(adapter, shapes)
    grouped = group_adapter(adapter, family, dims, shapes)
    if target.dtype is not None:
        grouped.modules = {k: (r, a.to(target.dtype), b.to(target.dtype)) for k, (r, a, b) in grouped.modules.items()}
    adapted = set(grouped.modules)
    entries: list[Entry] = []
    if with_base:
        entries += entries_of_base(
            base,
            family,
            dims,
            layout,
            divisible_by=target.divisible_by,
            dtype=target.dtype,
            base_layer_of=lambda layer, module: (layer, module) in adapted,
        )
    entries += _entries_of_lora(grouped, family, dims, layout)
    entries = _in_pickle_order(entries)
    targets = sorted({module.rsplit(".", 1)[-1] for _, module in grouped.modules})
    args = {
        **base_args(base, target, layout),
        "lora_r": grouped.rank,
        "lora_alpha": int(grouped.alpha),
        "lora_target_modules": targets,
        "lora_ckpt_filter": not with_base,
        "finerank_lora": json.dumps(grouped.record, sort_keys=True),
    }
    write_megatron(folder, layout, entries, args, legacy=legacy, te_norms=target.te_norms and not legacy)
    return grouped.notes


def _check_fits(adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> None:
    for module, factors in adapter.factors.items():
        if module in shapes and shapes[module] != factors.weight_shape:
            raise AdapterError(
                f"{adapter.source}: {module} is for a weight of shape {list(factors.weight_shape)}, the base has "
                f"{list(shapes[module])}; give the base it was trained on."
            )


def _entries_of_lora(grouped: GroupedAdapter, family: Family, dims: Dims, layout: Layout) -> Iterator[Entry]:
    for stage, chunks in enumerate(layout.chunks):
        for chunk, slots in enumerate(chunks):
            for local, layer in enumerate(slots):
                if layer is None:
                    continue
                for rule, module, hf, ep_rank in layer_modules(family, dims, layout, layer):
                    expert = hf[0].split("experts.")[1].split(".")[0] if rule.is_expert else ""
                    found = grouped.modules.get((layer, rule.megatron.replace("{expert}", expert)))
                    if found is None:
                        continue
                    for suffix, key, tensor in ((_A, ".lora_A", found[1]), (_B, ".lora_B", found[2])):
                        name = f"decoder.layers.{local}.{module}{suffix}"
                        yield _lora_entry(name, (stage, chunk), rule, key, tensor, layout, ep_rank)


def _lora_entry(
    name: str, at: tuple[int, int], rule: Any, key: str, tensor: Tensor, layout: Layout, ep_rank: int | None
) -> Entry:
    dim = packing.split_dim(rule, key)
    if dim is not None and tensor.shape[dim] % layout.tp:
        raise ConfigError(f"{name}: its size {tensor.shape[dim]} is not divisible by tp {layout.tp}.")
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return make_entry(name, at, rule, dim, layout.tp, meta, lambda: tensor, ep_rank)


def _in_pickle_order(entries: list[Entry]) -> list[Entry]:
    """Layer tensors before those outside, as the nested legacy dict is written: embedding, layers, norm, head."""
    place = {"embedding": 0, "decoder": 1, "output_layer": 2}
    return sorted(entries, key=lambda e: place.get(e.name.split(".")[0], 3))
