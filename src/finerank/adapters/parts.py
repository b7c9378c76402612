"""What is adapted beside the linears of the decoder: chosen, checked against each other, and put in place.

    chosen = choose(model, targets, settings)          # targets and whole modules, tied pairs made one
    parts = place_parts(model, chosen.targets, chosen.saved, chosen.rows, config, seed=1234, trainable=True)

With `ensure_weight_tying` a tied pair is adapted on the embedding's side, and the head follows, as in PEFT.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.adapter_set import put_module
from finerank.adapters.embedding import (
    LoRAEmbedding,
    LoRATiedHead,
    check_embedding,
    embedding_and_head,
    is_tied,
)
from finerank.adapters.experts import check_experts, fresh_experts
from finerank.adapters.new_tokens import TrainedRows
from finerank.adapters.saved_modules import SavedModule, find_saved
from finerank.adapters.seeding import named_generator
from finerank.adapters.settings import AdapterSettings
from finerank.adapters.shapes import shape_of
from finerank.adapters.targets import ALL_LINEAR, Target, layer_index
from finerank.errors import AdapterError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What the settings name."""

    targets: tuple[Target, ...]
    """Modules that get a low-rank change."""
    saved: tuple[str, ...] = ()
    """Modules that are trained whole."""
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Embedding, and head where it is not tied, with the ids whose rows are trained."""
    ties: bool = False
    """What is trained on the embedding changes the head alike."""


def choose(
    model: nn.Module, targets: Sequence[Target], settings: AdapterSettings, *, token_ids: Sequence[int] = ()
) -> Chosen:
    """Targets, modules to save and rows, checked against each other; a tied pair is named by its embedding.

    Raises:
        AdapterError: a module is named twice, or the model cannot take what is asked for.
        ConfigError: settings that exclude each other or have no effect.
    """
    saved = find_saved(model, settings.lora_modules_to_save)
    twice = [target.name for target in targets if target.name in saved]
    if twice and any(name.lower() != ALL_LINEAR for name in settings.lora_target_modules):
        raise AdapterError(f"{twice[0]} is in --lora-target-modules and in --lora-modules-to-save; name it once.")
    chosen = Chosen(tuple(target for target in targets if target.name not in saved), tuple(saved))
    if settings.use_dora and (found := [t.name for t in chosen.targets if t.kind != "linear"]):
        raise ConfigError(f"--use-dora is for linears and cannot be put on {found[0]}; leave one of them out.")
    if experts := [t.name for t in chosen.targets if t.kind == "experts"]:
        if twice := [name for name in experts if name.rpartition(".")[0] in saved]:
            raise AdapterError(f"{twice[0]} is adapted and in --lora-modules-to-save; name it once.")
        if settings.lora_dropout:
            raise ConfigError(f"--lora-dropout cannot be applied to {experts[0]}, nor can PEFT; leave one of them out.")
        if settings.init_lora_weights != "default":
            start = settings.init_lora_weights
            raise ConfigError(f"--init-lora-weights {start} is no start for {experts[0]}; leave one of them out.")
    chosen = _with_rows(model, _tie(model, chosen, settings), token_ids)
    _refuse_below_local(model, chosen, settings)
    return chosen


def _tie(model: nn.Module, chosen: Chosen, settings: AdapterSettings) -> Chosen:
    embedding, head = pair_names(model)
    tied = is_tied(model)
    names = {target.name for target in chosen.targets}
    named = [name for name in (embedding, head) if name in names or name in chosen.saved]
    if not settings.ensure_weight_tying:
        if tied and named and not (embedding in chosen.saved and head in chosen.saved and len(named) == 2):
            logger.warning(
                "%s shares its weights with %s: what is trained on one side unties them, and a merged model has both; "
                "--ensure-weight-tying changes both alike",
                *(named if len(named) == 2 else (named[0], head if named[0] == embedding else embedding)),
            )
        return chosen
    if not tied or not named:
        why = "names neither embedding nor head" if tied else "is for a tied embedding and head, and they are not here"
        raise ConfigError(f"--ensure-weight-tying has no effect: the setting {why}; leave it out.")
    if any(name in chosen.saved for name in named) and any(name in names for name in named):
        raise ConfigError("--ensure-weight-tying needs embedding and head trained alike; name only one of them.")
    assert embedding is not None
    if named[0] in chosen.saved:
        return replace(chosen, saved=(embedding, *(n for n in chosen.saved if n not in named)), ties=True)
    kept = tuple(target for target in chosen.targets if target.name not in named)
    return replace(chosen, targets=(Target(embedding, kind="embedding"), *kept), ties=True)


def _with_rows(model: nn.Module, chosen: Chosen, token_ids: Sequence[int]) -> Chosen:
    """Rows of new tokens, where the matrix is not trained whole anyway."""
    if not token_ids:
        return chosen
    embedding, head = pair_names(model)
    if embedding is None or head is None:
        raise AdapterError("--add-tokens needs a model with an embedding and a head; this one lacks one of them.")
    for target in chosen.targets:
        if target.name in (embedding, head):
            raise ConfigError(f"--add-tokens trains rows of {target.name}, which cannot have a low-rank adapter too.")
    whole = [name for name in (embedding, head) if name in chosen.saved]
    tied = is_tied(model)
    if tied and head in whole and embedding not in whole:
        raise ConfigError(f"--add-tokens with {head} trained whole needs {embedding} trained whole too; name both.")
    if tied and whole:  # the head follows the embedding, or has a copy of its own
        sides = [] if len(whole) == 2 or chosen.ties else [head]
    else:
        sides = [name for name in ([embedding] if tied else [embedding, head]) if name not in whole]
    return replace(chosen, rows={name: tuple(token_ids) for name in sides})


def pair_names(model: nn.Module) -> tuple[str | None, str | None]:
    """Names of the input and the output embedding; None for one that the model does not have."""
    modules = embedding_and_head(model)
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(modules[0])), names.get(id(modules[1]))


def _refuse_below_local(model: nn.Module, chosen: Chosen, settings: AdapterSettings) -> None:
    last = settings.lu_lora_final_layer_index
    if last is None:
        return
    embedding, _ = pair_names(model)
    for name in (*chosen.saved, *chosen.rows, *(t.name for t in chosen.targets if t.kind != "linear")):
        index = layer_index(name)
        if name == embedding or (index is not None and index <= last):
            raise ConfigError(
                f"--lu-lora-final-layer-index {last} leaves {name} to the local rule, which cannot train it; "
                "leave one of them out."
            )


def place_parts(
    model: nn.Module,
    targets: Sequence[Target],
    saved: Sequence[str],
    rows: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    *,
    seed: int,
    trainable: bool,
) -> dict[str, AdaptedModule]:
    """Put everything that is no low-rank change of a linear into the model; by name.

    Args:
        model: frozen; the modules are replaced in place.
        targets: those of another kind than `linear`.
        saved: modules to train whole.
        rows: modules with the ids whose rows are trained.
        config: PEFT's LoraConfig.
        seed: of fresh factors.
        trainable: whether what is put in place gets gradients.
    """
    embedding, head = pair_names(model)
    tied = is_tied(model)
    follows = bool(config.get("ensure_weight_tying")) and tied
    modules = dict(model.named_modules())
    parts: dict[str, AdaptedModule] = {}
    for name, parameters in _by_module(t for t in targets if t.kind == "experts").items():
        check_experts(modules[name], name)
        parts[name] = fresh_experts(modules[name], name, parameters, config, seed=seed, trainable=trainable)
    for target in (t for t in targets if t.kind == "embedding"):
        base = modules[target.name]
        check_embedding(base, target.name)
        part = _fresh_embedding(base, target.name, config, seed=seed, trainable=trainable)  # type: ignore[arg-type]
        parts[target.name] = part
        if follows and target.name == embedding and head is not None:
            dropout = float(config.get("lora_dropout") or 0.0)
            parts[head] = LoRATiedHead(modules[head], part, dropout=dropout)  # type: ignore[arg-type]
    for name in saved:
        parts[name] = SavedModule(modules[name], trainable=trainable)
        if follows and name == embedding and head is not None:
            shared = {"weight": parts[name].trained()["weight"]}
            parts[head] = SavedModule(modules[head], trainable=trainable, weights=shared)
    for name, ids in rows.items():
        parts[name] = trained = TrainedRows(modules[name], ids, trainable=trainable)
        if tied and name == embedding and head is not None and head not in parts:
            parts[head] = TrainedRows(modules[head], ids, rows=trained.rows)
    for name, placed in parts.items():
        placed.train(modules[name].training)
        put_module(model, name, placed)
    return parts


def _by_module(targets: Iterable[Target]) -> dict[str, list[str]]:
    """Parameters by the module that holds them."""
    found: dict[str, list[str]] = {}
    for target in targets:
        module, _, parameter = target.name.rpartition(".")
        found.setdefault(module, []).append(parameter)
    return found


def _fresh_embedding(
    base: nn.Embedding, name: str, config: Mapping[str, Any], *, seed: int, trainable: bool
) -> LoRAEmbedding:
    shape, (V, D) = shape_of(config, name), base.weight.shape
    fresh_DR = torch.randn(D, shape.rank, generator=named_generator(seed, name)).to(base.weight.device)
    lora_A = nn.Parameter(torch.zeros(shape.rank, V, device=base.weight.device), requires_grad=trainable)
    lora_B = nn.Parameter(fresh_DR, requires_grad=trainable)
    return LoRAEmbedding(base, lora_A, lora_B, scale=shape.scale)
