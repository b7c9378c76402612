"""Megatron checkpoints as base models and adapters: what `formats/mcore.py` and `formats/legacy.py` share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finerank.checkpoints import packing
from finerank.checkpoints.layout import Layout
from finerank.checkpoints.megatron_args import args_of, config_of
from finerank.checkpoints.megatron_read import MegatronCheckpoint, weights_of
from finerank.checkpoints.megatron_write import entries_of_base, write_megatron
from finerank.checkpoints.weights import BaseModel
from finerank.errors import ConfigError
from finerank.models.families import Dims, Family, dims_of, family_of


@dataclass(frozen=True, kw_only=True)
class Target:
    """How a Megatron checkpoint is to be cut."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    layers_per_virtual_stage: int | None = None
    num_layer_list: Sequence[int] | None = None
    noop_layers: Sequence[int] = ()
    schedules_method: str | None = None
    divisible_by: int = 1
    """The vocabulary is padded to a multiple of this times tp."""
    te_norms: bool = False
    """Name the first norm as transformer engine does."""
    dtype: torch.dtype | None = None
    """Cast floating tensors; None keeps what the model has."""

    def layout(self, dims: Dims) -> Layout:
        """The layout for a model. Raises ConfigError."""
        if dims.num_experts % self.ep or (self.ep > 1 and not dims.num_experts):
            raise ConfigError(
                f"--target-expert-parallel-size {self.ep} does not divide the {dims.num_experts} experts of this model."
            )
        return Layout.make(
            num_layers=dims.num_layers,
            tp=self.tp,
            pp=self.pp,
            ep=self.ep,
            layers_per_virtual_stage=self.layers_per_virtual_stage,
            num_layer_list=self.num_layer_list,
            noop_layers=self.noop_layers,
            schedules_method=self.schedules_method,
        )


def read_base(
    folder: Path,
    *,
    hf_config: dict[str, Any] | None = None,
    hf_folder: Path | None = None,
    family: Family | None = None,
) -> BaseModel:
    """Open a checkpoint as a base model.

    Args:
        hf_config: its Hugging Face config; taken from the checkpoint's args when None.
        hf_folder: folder with tokenizer files to take along.
        family: what it is, where neither config nor args say so.

    Raises:
        CheckpointError: something is missing, torn, or does not fit the config.
    """
    checkpoint = MegatronCheckpoint.open(folder)
    config = dict(hf_config) if hf_config is not None else config_of(checkpoint.args, family=family, source=str(folder))
    if family is not None and hf_config is None and family_of(config).name != family.name:
        raise ConfigError(f"--model-type-hf names {family.name}, but {folder} holds a {family_of(config).name}.")
    is_tied = config.get("tie_word_embeddings")
    if is_tied is None:
        is_tied = not checkpoint.args.get("untie_embeddings_and_output_weights", False)
    weights = weights_of(checkpoint, family_of(config), dims_of(config), is_tied=bool(is_tied))
    return BaseModel(config={**config, "tie_word_embeddings": bool(is_tied)}, weights=weights, folder=hf_folder)


def write_base(model: BaseModel, folder: Path, *, legacy: bool, target: Target | None = None) -> None:
    """Write a base model, cut as `target` says, into an existing empty folder. Raises ConfigError, CheckpointError."""
    target = target or Target()
    family, dims = family_of(model.config), dims_of(model.config)
    layout = target.layout(dims)
    entries = list(entries_of_base(model, family, dims, layout, divisible_by=target.divisible_by, dtype=target.dtype))
    write_megatron(
        folder,
        layout,
        entries,
        base_args(model, target, layout),
        legacy=legacy,
        te_norms=target.te_norms and not legacy,
    )


def base_args(model: BaseModel, target: Target, layout: Layout) -> dict[str, Any]:
    """The `args` of a checkpoint of this model."""
    family, dims = family_of(model.config), dims_of(model.config)
    names = set(model.weights)
    return args_of(
        model.config,
        family,
        dims,
        layout,
        padded_vocab_size=packing.padded_vocab_size(dims.vocab_size, tp=target.tp, divisible_by=target.divisible_by),
        te_norms=target.te_norms,
        has_qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        has_qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
        is_tied=model.is_tied,
    )
