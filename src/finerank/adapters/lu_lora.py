"""LU-LoRA: the adapters of the lower layers learn by a cheaper rule, with little backpropagation or none.

    adapters = inject_adapters(model, settings, seed=1234)                     # --lu-lora-final-layer-index K
    local = start_local_learning(adapters, settings, lr=2e-4, seed=1234, passes=...)
    ...see `adapters.local_learning`...

Layers 0 to K are local. Their adapters run without a graph, so no activation is kept and no gradient flows below layer
K + 1; under the sampled rule this holds for all rows but the sample's.

Rules are in `adapters/local_rules`. All that they learn is in the factors (fp32), so checkpoints need nothing else. A
rule may look at the run's first rows before it starts (`passes`); the forward passes for that end at layer K.
"""

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finerank import registry
from finerank.adapters.initial import Pass
from finerank.adapters.local_learning import LocalLearning
from finerank.adapters.local_rules._rule import LocalRule
from finerank.adapters.lora import LoRALinear
from finerank.adapters.low_rank import weight_OI
from finerank.adapters.settings import LocalSettings
from finerank.adapters.targets import GROUPS, Target
from finerank.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from finerank.adapters.inject import AdapterSet

logger = logging.getLogger(__name__)

_INTO_RESIDUAL = GROUPS["linear_proj"] + GROUPS["linear_fc2"]
DEFAULT_LR = 1.25e-6
"""Of `lora_A` under the Hebbian rules, as MindSpeed-LLM has it."""
DEFAULT_SAMPLE_SHARE = 0.375


def local_targets(
    model: nn.Module, targets: Sequence[Target], settings: LocalSettings
) -> tuple[list[Target], dict[str, int]]:
    """The targets that get an adapter, and the ranks of the local ones that have one of their own, by name.

    Under rules that reach only some linears (feedback, frozen) the others of the local layers are left out.

    Raises:
        ConfigError: settings that have no effect, or K leaves no layer above or names none.
        AdapterError: the model's layers or targets do not allow local learning.
    """
    last = settings.lu_lora_final_layer_index
    if last is None:
        _refuse_without_effect(settings)
        return list(targets), {}
    layers = _decoder_layers(model, [t.name for t in targets])
    _check_range(last, len(layers))
    rule = _rule_class(settings)
    kept = [t for t in targets if not _is_local(t.name, last) or _can_learn(model, t.name, settings)]
    if not any(_layer_index(t.name) is not None and not _is_local(t.name, last) for t in kept):
        raise AdapterError(
            f"--lora-target-modules has no linear above layer {last}, so nothing would be backpropagated; add some."
        )
    local = [t for t in kept if _is_local(t.name, last)]
    if not local and settings.lu_lora_rule != "frozen":
        wanted = " or ".join(("o_proj", "down_proj")) if rule.only_into_residual else "a linear"
        raise AdapterError(
            f"--lora-target-modules has no linear of layers 0 to {last} that --lu-lora-rule {settings.lu_lora_rule} "
            f"can teach; add {wanted}, or use --lu-lora-rule frozen."
        )
    return kept, {t.name: rank for t in local if (rank := _local_rank(model, t.name, settings)) is not None}


def _local_rank(model: nn.Module, name: str, settings: LocalSettings) -> int | None:
    """The rank of a local linear's adapter; None: as the others."""
    num_out, num_in = weight_OI(_base_of(model, name)).shape
    rank, rule = settings.lu_lora_r, _rule_class(settings)
    if rank is None:
        return None if rule.default_rank is None else min(rule.default_rank, num_out, num_in)
    if rank < 1:
        raise ConfigError(f"--lu-lora-r is {rank}; a rank must be at least 1, e.g. 64.")
    if rank > num_in and rule.default_rank is not None:
        raise ConfigError(
            f"--lu-lora-r is {rank}, and {name} has only {num_in} input features to find components of; lower it."
        )
    return rank


def local_patterns(
    local_ranks: Mapping[str, int], given: Mapping[str, float], *, r: int, alpha: float, use_rslora: bool
) -> tuple[dict[str, int], dict[str, float]]:
    """The rank and alpha patterns of local adapters: ranks of their own do not change their scale.

    Args:
        local_ranks: by name, as `local_targets` gives them.
        given: the user's rank patterns, which go before.
        r, alpha, use_rslora: of the other adapters.
    """
    ranks = {
        re.escape(name): rank
        for name, rank in local_ranks.items()
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for pattern in given)
    }
    return ranks, {p: alpha * (math.sqrt(rank / r) if use_rslora else rank / r) for p, rank in ranks.items()}


def _refuse_without_effect(settings: LocalSettings) -> None:
    for name, field in LocalSettings.__dataclass_fields__.items():
        if getattr(settings, name) != field.default:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect without --lu-lora-final-layer-index; give that too."
            )


def sample_share(settings: LocalSettings) -> float | None:
    """The share of a step's rows that are backpropagated through the local layers; None where the rule takes none.

    Raises:
        ConfigError: a share given to a rule that takes none, or out of range.
    """
    share = settings.lu_lora_sample
    if settings.lu_lora_final_layer_index is None:
        return None
    if not _rule_class(settings).learns_from_sample:
        if share is not None:
            raise ConfigError(
                f"--lu-lora-sample has no effect with --lu-lora-rule {settings.lu_lora_rule}; leave it out."
            )
        return None
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--lu-lora-sample is {share:g}; it must be above 0 and at most 1, e.g. 0.375.")
    return DEFAULT_SAMPLE_SHARE if share is None else share


def _rule_class(settings: LocalSettings) -> type[LocalRule]:
    return registry.load("finerank.adapters.local_rules", settings.lu_lora_rule, "local rule").RULE


def _check_range(last: int, num_layers: int) -> None:
    if num_layers < 2:
        raise AdapterError("LU-LoRA needs a model of at least 2 layers; leave --lu-lora-final-layer-index away.")
    allowed = "0" if num_layers == 2 else f"0 to {num_layers - 2}"
    if last == num_layers - 1:
        raise ConfigError(
            f"--lu-lora-final-layer-index {last} makes all {num_layers} layers local and leaves nothing to "
            f"backpropagate; give {allowed}."
        )
    if not 0 <= last < num_layers:
        raise ConfigError(
            f"--lu-lora-final-layer-index {last} is no layer of this model of {num_layers} layers; give {allowed}."
        )


def _layer_index(name: str) -> int | None:
    """`model.layers.3.mlp.up_proj` -> 3; None outside the decoder layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _is_local(name: str, last: int) -> bool:
    index = _layer_index(name)
    return index is not None and index <= last


def _decoder_layers(model: nn.Module, names: Sequence[str]) -> nn.ModuleList:
    """The list of decoder layers that the named linears are in."""
    lists = {re.split(r"\.\d+\.", name)[0] for name in names if _layer_index(name) is not None}
    found = [model.get_submodule(name) for name in lists]
    if len(found) != 1 or not isinstance(found[0], nn.ModuleList):
        raise AdapterError(
            f"LU-LoRA needs one list of decoder layers, and the adapted linears are in {len(found)}; choose other "
            "--lora-target-modules."
        )
    return found[0]


def _can_learn(model: nn.Module, name: str, settings: LocalSettings) -> bool:
    if settings.lu_lora_rule == "frozen":
        return False
    if not _rule_class(settings).only_into_residual:
        return True
    hidden_size = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    return name.rpartition(".")[2] in _INTO_RESIDUAL and weight_OI(_base_of(model, name)).shape[0] == hidden_size


def _base_of(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base_layer if isinstance(module, LoRALinear) else module


def start_local_learning(
    adapters: "AdapterSet",
    settings: LocalSettings,
    *,
    lr: float,
    seed: int,
    passes: Callable[[], Iterator[Pass]] | None = None,
) -> LocalLearning | None:
    """Make layers 0 to K of an adapted model local; None without `--lu-lora-final-layer-index`.

    Args:
        adapters: fresh or loaded; the local factors stop being backpropagated into.
        settings: K, rule, learning rates.
        lr: the run's peak learning rate.
        seed: of a fresh `lora_B` under rules that cannot start from zero.
        passes: begins the training rows, without end, for rules whose fresh factors start from the data; None leaves
            the factors as they are, e.g. for a checkpoint's to come.

    Raises:
        ConfigError, AdapterError: as `local_targets`.
    """
    last = settings.lu_lora_final_layer_index
    if last is None:
        _refuse_without_effect(settings)
        return None
    decoder = _decoder_layers(adapters.model, list(adapters.layers))
    _check_range(last, len(decoder))
    _check_values(settings)
    local = {name: layer for name, layer in adapters.layers.items() if _is_local(name, last)}
    taught = [layer for name, layer in local.items() if _can_learn(adapters.model, name, settings)]
    rule = _rule_class(settings)(taught)
    ratio = settings.lu_lora_lr_ratio if settings.lu_lora_lr_ratio is not None else rule.default_ratio
    default = rule.default_lr_share * lr if rule.learns_by_optimizer else DEFAULT_LR
    base = settings.lu_lora_lr if settings.lu_lora_lr is not None else default
    parameters = {p for layer in local.values() for p in (layer.lora_A, layer.lora_B)}
    learning = LocalLearning(
        rule,
        parameters,
        lr_a=base,
        lr_b=base * ratio,
        freeze_after=settings.lu_lora_freeze_after,
        lr_decay_style=settings.lu_lora_lr_decay_style or rule.default_decay_style,
        layers=list(decoder)[: last + 1],
    )
    for name, layer in local.items():
        layer.local = learning
        layer.lora_A.requires_grad_(rule.learns_from_sample)
        layer.lora_B.requires_grad_(rule.learns_by_optimizer and layer in taught)
        if rule.start_std and not layer.lora_B.any():
            _start_B(layer.lora_B, f"{seed} {name} lora_B", std=rule.start_std)
        if layer.dropout:
            layer.dropout = 0.0
            logger.warning("--lora-dropout does not apply to local layers: %s", name)
    decoder[last].register_forward_hook(learning.at_boundary)
    for name, layer in local.items() if rule.learns_by_optimizer else ():
        if layer in taught:
            depth = last - (_layer_index(name) or 0)
            share = math.exp(-rule.decay_by_depth * depth)
            adapters.lr_ratios[layer.lora_B] = share * learning.lr_b / lr if lr else 0.0
            if rule.learns_from_sample:
                adapters.lr_ratios[layer.lora_A] = share * learning.lr_a / lr if lr else 0.0
    if passes is not None:
        _start_from_data(adapters.model, learning, passes())
    logger.info(
        "LU-LoRA: layers 0 to %d of %d are local, %d linears learn by the %s rule",
        last,
        len(decoder),
        len(taught),
        settings.lu_lora_rule,
    )
    return learning


class _Enough(Exception):
    """The local layers have been passed."""


def _start_from_data(model: nn.Module, learning: LocalLearning, passes: Iterator[Pass]) -> None:
    """Show the first rows to the rule: forward through layers 0 to K only, nothing kept for a backward pass."""

    def stop(*_args: Any) -> None:
        raise _Enough

    def up_to_boundary(one: Pass) -> Pass:
        def run() -> None:
            handle = learning.layers[-1].register_forward_hook(stop)
            try:
                with contextlib.suppress(_Enough):
                    one.run()
            finally:
                handle.remove()

        return replace(one, run=run)

    was_training = model.training
    model.eval()
    try:
        learning.rule.start(up_to_boundary(one) for one in passes)
    finally:
        model.train(was_training)


_OF_LEARNING = ("lu_lora_r", "lu_lora_lr", "lu_lora_lr_decay_style", "lu_lora_lr_ratio", "lu_lora_freeze_after")


def _check_values(settings: LocalSettings) -> None:
    given = [name for name in _OF_LEARNING if getattr(settings, name) is not None]
    if given and settings.lu_lora_rule == "frozen":
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect with --lu-lora-rule frozen, where nothing local learns; "
            "leave it out."
        )
    for name in ("lu_lora_lr", "lu_lora_lr_ratio"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 0, not {value}.")
    if settings.lu_lora_freeze_after is not None and settings.lu_lora_freeze_after < 0:
        raise ConfigError(f"--lu-lora-freeze-after must be at least 0, not {settings.lu_lora_freeze_after}.")
    if settings.cache_boundary and settings.lu_lora_rule != "frozen" and settings.lu_lora_freeze_after is None:
        raise ConfigError(
            "--cache-boundary needs local layers that no longer learn; add --lu-lora-freeze-after, or use "
            "--lu-lora-rule frozen."
        )
    sample_share(settings)


@torch.no_grad()
def _start_B(lora_B: nn.Parameter, key: str, *, std: float) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    lora_B.copy_(torch.randn(lora_B.shape, generator=generator).mul_(std))
