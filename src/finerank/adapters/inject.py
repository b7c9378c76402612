"""Put adapters into a model: each target linear becomes a LoRALinear, and what is trained is handed back.

    adapters = inject_adapters(model, AdapterSettings(lora_r=16), seed=1234)
    optimizer = AdamW(adapters.parameters())
    with adapters.disabled(): ...          # the base model again
    adapters.merge_()                      # into the base's weights, for good

A fresh adapter changes nothing: `lora_B` is zero. `lora_A` is drawn from a generator seeded by the run's seed and the
layer's name, so it depends neither on the order of layers nor on which other layers have one.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.adapter_set import FILE_PREFIX, AdapterSet, put_module
from finerank.adapters.dora import add_magnitude
from finerank.adapters.experts import experts_modules, peft_target_parameters
from finerank.adapters.lora import LoRALinear, SharedInput
from finerank.adapters.low_rank import weight_OI
from finerank.adapters.lu_lora import local_patterns, local_targets
from finerank.adapters.new_tokens import peft_token_indices
from finerank.adapters.parts import choose, place_parts
from finerank.adapters.saved_modules import peft_modules_to_save
from finerank.adapters.seeding import named_generator
from finerank.adapters.settings import AdapterSettings
from finerank.adapters.shapes import shape_of
from finerank.adapters.targets import (
    SHARED_INPUTS,
    Target,
    expand_patterns,
    find_targets,
    peft_target_modules,
)
from finerank.errors import AdapterError, ConfigError

__all__ = ["FILE_PREFIX", "AdapterSet", "inject_adapters", "new_config", "place_adapters"]

logger = logging.getLogger(__name__)


def inject_adapters(
    model: nn.Module, settings: AdapterSettings, *, seed: int, token_ids: Sequence[int] = ()
) -> AdapterSet:
    """Fresh trainable adapters on the linears that the settings name.

    Args:
        model: frozen; its target linears are replaced in place.
        settings: targets, rank, alpha, dropout and patterns.
        seed: of lora_A; global random state is left alone.
        token_ids: tokens whose rows in the vocabulary are trained whole, e.g. new ones.

    Raises:
        AdapterError: a target or pattern matches nothing, or ranks differ within a shared lora_A.
        ConfigError: a rank, dropout or alpha out of range.
    """
    _check(settings)
    chosen = choose(model, find_targets(model, settings.lora_target_modules), settings, token_ids=token_ids)
    linears, local_ranks = local_targets(model, [t for t in chosen.targets if t.kind == "linear"], settings)
    targets = [*linears, *(t for t in chosen.targets if t.kind != "linear")]
    ranks = expand_patterns(settings.lora_rank_pattern, targets, flag="--lora-rank-pattern")
    alphas = expand_patterns(settings.lora_alpha_pattern, targets, flag="--lora-alpha-pattern")
    own_ranks, own_alphas = local_patterns(
        local_ranks, ranks, r=settings.lora_r, alpha=settings.lora_alpha, use_rslora=settings.use_rslora
    )
    ranks, alphas = ranks | own_ranks, alphas | own_alphas
    modules = dict(model.named_modules())
    _warn_of_fused_experts(model, targets, settings)
    config = new_config(
        r=settings.lora_r,
        lora_alpha=_whole(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=peft_target_modules(model, [t for t in targets if t.kind != "experts"]),
        target_parameters=peft_target_parameters(model, [t.name for t in targets if t.kind == "experts"]) or None,
        modules_to_save=peft_modules_to_save(model, chosen.saved) if chosen.saved else None,
        ensure_weight_tying=settings.ensure_weight_tying,
        trainable_token_indices=peft_token_indices(chosen.rows) if chosen.rows else None,
        rank_pattern={pattern: int(rank) for pattern, rank in ranks.items()},
        alpha_pattern={pattern: _whole(alpha) for pattern, alpha in alphas.items()},
        fan_in_fan_out=any(isinstance(modules.get(target.name), Conv1D) for target in targets),
    )
    return place_adapters(model, targets, config, saved=chosen.saved, rows=chosen.rows, seed=seed, trainable=True)


def _warn_of_fused_experts(model: nn.Module, targets: Sequence[Target], settings: AdapterSettings) -> None:
    """Experts kept as one 3-dimensional tensor are no linears; `all-linear` sounds as if it meant them."""
    fused = list(experts_modules(model))
    adapted = any(target.kind == "experts" for target in targets)
    if fused and not adapted and "all-linear" in (name.lower() for name in settings.lora_target_modules):
        logger.warning(
            "all-linear leaves out the fused experts of %d modules, e.g. %s; gate_up_proj and down_proj name them",
            len(fused),
            fused[0],
        )


def _check(settings: AdapterSettings) -> None:
    for name, rank in {"--lora-r": settings.lora_r, **settings.lora_rank_pattern}.items():
        if rank < 1:
            where = name if name.startswith("--") else f"--lora-rank-pattern {name}"
            raise ConfigError(f"{where} is {rank}; a rank must be at least 1, e.g. 16.")
    for name, alpha in {"--lora-alpha": settings.lora_alpha, **settings.lora_alpha_pattern}.items():
        if not (math.isfinite(alpha) and alpha > 0):
            where = name if name.startswith("--") else f"--lora-alpha-pattern {name}"
            raise ConfigError(f"{where} is {alpha:g}; with it the adapter would change nothing: give e.g. 32.")
    if settings.use_dora and settings.lu_lora_final_layer_index is not None:
        raise ConfigError("--use-dora and --lu-lora-final-layer-index exclude each other; give one of them.")
    if not 0.0 <= settings.lora_dropout < 1.0:
        raise ConfigError(f"--lora-dropout is {settings.lora_dropout:g}; it must be at least 0 and below 1.")


def _whole(number: float) -> float | int:
    """PEFT's files write an alpha of 32 as 32, not 32.0."""
    return int(number) if float(number).is_integer() else number


NEWER_KEYS = ("ensure_weight_tying", "target_parameters", "trainable_token_indices")
"""Written only where they are used: older PEFT versions warn of keys that they do not know."""


def new_config(**values: Any) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON values: what finerank sets, and the defaults that older PEFT versions expect."""
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 32,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 16,
        "rank_pattern": {},
        "revision": None,
        "target_modules": [],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert set(values) <= {*config, *NEWER_KEYS}, set(values) - set(config)
    return config | {key: value for key, value in values.items() if value or key not in NEWER_KEYS}


def place_adapters(
    model: nn.Module,
    targets: Sequence[Target],
    config: dict[str, Any],
    *,
    saved: Sequence[str] = (),
    rows: Mapping[str, Sequence[int]] | None = None,
    seed: int,
    trainable: bool,
) -> AdapterSet:
    """Put fresh adapters on the targets, join the linears that read the same input, and copy what is trained whole."""
    modules = dict(model.named_modules())
    if any(isinstance(module, LoRALinear | AdaptedModule) for module in modules.values()):
        raise AdapterError("The model already has an adapter; remove or merge it first, or load the model anew.")
    layers: dict[str, LoRALinear] = {}
    shared: dict[str, nn.Parameter] = {}
    for target in (t for t in targets if t.kind == "linear"):
        base, shape = modules[target.name], shape_of(config, target.name)
        weight = weight_OI(base)
        lora_A = shared.get(target.group or "")
        if lora_A is None:
            fresh_RI = _fresh_A(target.name, shape.rank, weight.shape[1], seed=seed)
            lora_A = nn.Parameter(fresh_RI.to(weight.device), requires_grad=trainable)
            if target.group:
                shared[target.group] = lora_A
        if lora_A.shape != (shape.rank, weight.shape[1]):
            raise AdapterError(
                f"{target.name} cannot share a lora_A of rank {lora_A.shape[0]} over {lora_A.shape[1]} inputs: it has "
                f"rank {shape.rank} and {weight.shape[1]} inputs; give the members of {target.group} one rank."
            )
        lora_B = nn.Parameter(torch.zeros(weight.shape[0], shape.rank, device=weight.device), requires_grad=trainable)
        layer = LoRALinear(base, lora_A, lora_B, scale=shape.scale, dropout=config["lora_dropout"])
        if config["use_dora"]:
            add_magnitude(layer)
        layer.train(base.training)
        put_module(model, target.name, layer)
        layers[target.name] = layer
    join_shared_inputs(layers)
    groups = sorted({target.group.rpartition(":")[2] for target in targets if target.group})
    others = [target for target in targets if target.kind != "linear"]
    parts = place_parts(model, others, saved, rows or {}, config, seed=seed, trainable=trainable)
    adapters = AdapterSet(model, layers, config, groups, parts)
    logger.info("%s", adapters.describe())
    return adapters


def _fresh_A(name: str, rank: int, in_features: int, *, seed: int) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), as `nn.Linear` and PEFT start: uniform within 1 / sqrt(in_features)."""
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=named_generator(seed, name))


def join_shared_inputs(layers: Mapping[str, LoRALinear]) -> None:
    """Let the linears of one module that read the same input be computed together."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in layers)
    for parent in parents:
        for names in SHARED_INPUTS:
            together = [layers[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in layers]
            together = [layer for layer in together if layer.lora_magnitude_vector is None]
            if len(together) > 1 and len({layer.in_features for layer in together}) == 1:
                SharedInput(together)
