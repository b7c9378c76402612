"""Megatron mcore checkpoints: `iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` and the tracker file.

    decoder.layers.0.self_attention.linear_qkv.weight     q, k and v by key-value group
    decoder.layers.0.mlp.linear_fc1.weight                gate rows, then up rows
    decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight      a LoRA checkpoint

Layer numbers restart in every stage. See `docs/formats.md`.
"""

from pathlib import Path
from typing import Any

from finerank.checkpoints import megatron, megatron_lora
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.megatron_names import is_legacy
from finerank.checkpoints.megatron_read import TRACKER, first_names
from finerank.checkpoints.weights import BaseModel

HOLDS = ("base", "adapter")


def matches(folder: Path) -> bool:
    """True for a folder with Megatron's tracker file whose model is not of the legacy layout."""
    return (folder / TRACKER).is_file() and not is_legacy(first_names(folder))


def read(folder: Path, **options: Any) -> BaseModel:
    """A base model; see `megatron.read_base` for the options."""
    return megatron.read_base(folder, **options)


def write(model: BaseModel, folder: Path, **options: Any) -> None:
    """Write a base model; see `megatron.write_base` for the options."""
    megatron.write_base(model, folder, legacy=False, **options)


def holds_adapter(folder: Path) -> bool:
    """The checkpoint has LoRA tensors: a LoRA checkpoint, or a base and its adapter together."""
    return any(".lora_a." in name.lower() for name in first_names(folder))


def read_adapter(folder: Path, **options: Any) -> Adapter:
    """A LoRA checkpoint as an adapter; see `megatron_lora.read_lora` for the options."""
    return megatron_lora.read_lora(folder, **options)


def write_adapter(adapter: Adapter, folder: Path, **options: Any) -> tuple[str, ...]:
    """Write an adapter as a LoRA checkpoint; see `megatron_lora.write_lora` for the options."""
    return megatron_lora.write_lora(adapter, folder, legacy=False, **options)
