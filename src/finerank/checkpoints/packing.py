"""Packing of Hugging Face tensors into Megatron's, and their shares on tensor-parallel ranks; both ways, bit-equal.

    qkv      rows by key-value group: its query heads, its key head, its value head; ranks get whole groups
    gate_up  gate rows, then up rows; a rank gets its share of each: [gate_i; up_i]
    plain    as it is

All functions work on weights [O, I], biases [O] and on lora_B [O, R] alike (dim 0 is the output), and on meta tensors,
which is how shapes are planned without reading.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from finerank.errors import ConfigError
from finerank.models.families import Dims, Packing, TensorRule


def pack(packing: Packing, parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """The Megatron tensor of Hugging Face parts that are in the rule's order."""
    if packing == "plain":
        (part,) = parts
        return part
    if packing == "gate_up":
        return torch.cat(list(parts))
    groups = dims.num_key_value_heads
    rest = parts[0].shape[1:]
    blocks = [part.reshape(groups, -1, *rest) for part in parts]
    return torch.cat(blocks, dim=1).reshape(-1, *rest)


def unpack(packing: Packing, packed: Tensor, dims: Dims) -> list[Tensor]:
    """The Hugging Face parts of a Megatron tensor, in the rule's order. Views where possible."""
    if packing == "plain":
        return [packed]
    if packing == "gate_up":
        return list(packed.chunk(2))
    groups, d = dims.num_key_value_heads, dims.head_dim
    rest = packed.shape[1:]
    queries = dims.num_attention_heads // groups * d
    blocks = packed.reshape(groups, -1, *rest).split([queries, d, d], dim=1)
    return [block.reshape(-1, *rest) for block in blocks]


def split(rule: TensorRule, packed: Tensor, tp: int, *, dim: int | None) -> list[Tensor]:
    """A packed tensor's shares on `tp` ranks, cut along `dim`; None gives every rank the whole tensor."""
    if dim is None or tp == 1:
        return [packed] * tp
    if rule.packing == "gate_up" and dim == 0:
        gate, up = packed.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
    return list(packed.chunk(tp, dim=dim))


def join(rule: TensorRule, shards: Sequence[Tensor], *, dim: int | None) -> Tensor:
    """The packed tensor of all ranks' shares; the inverse of `split`."""
    if dim is None or len(shards) == 1:
        return shards[0]
    if rule.packing == "gate_up" and dim == 0:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(list(shards), dim=dim)


def split_dim(rule: TensorRule, suffix: str) -> int | None:
    """The dimension that ranks share: of `.weight`, `.bias`, `.lora_A` or `.lora_B` of a module."""
    if rule.split is None:
        return None
    if rule.split == "column":
        return None if suffix == ".lora_A" else 0
    return 1 if suffix in (".weight", ".lora_A") else None


def _divisors(number: int) -> str:
    found = [str(n) for n in range(1, min(number, 64) + 1) if number % n == 0]
    return ", ".join(found[:-1]) + f" or {found[-1]}" if len(found) > 1 else found[0]


def padded_vocab_size(vocab_size: int, *, tp: int, divisible_by: int) -> int:
    """Rows of the embedding in a Megatron checkpoint: the next multiple of `divisible_by * tp`."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def pad_vocab(weight: Tensor, rows: int) -> Tensor:
    """Repeat the last row up to `rows`, as Megatron's converters do."""
    missing = rows - weight.shape[0]
    assert missing >= 0
    return torch.cat([weight, weight[-1:].expand(missing, *weight.shape[1:])]) if missing else weight


def check_shapes(
    rule: TensorRule, suffix: str, parts: Sequence[Tensor], sources: Sequence[str], dims: Dims, tp: int
) -> None:
    """Raise ConfigError unless the parts can be packed with these sizes and cut into `tp` shares."""
    if rule.packing == "qkv":
        rows = [dims.num_attention_heads * dims.head_dim] + [dims.num_key_value_heads * dims.head_dim] * 2
        for part, source, expected in zip(parts, sources, rows, strict=True):
            if part.shape[0] != expected:
                raise ConfigError(f"{source} has {part.shape[0]} rows, config.json's heads need {expected}.")
        if dims.num_key_value_heads % tp:
            raise ConfigError(_does_not_divide("num_key_value_heads", dims.num_key_value_heads, tp))
    dim = split_dim(rule, suffix)
    if dim is not None and parts[0].shape[dim] % tp:
        raise ConfigError(_does_not_divide(f"dimension {dim} of {sources[0]}", parts[0].shape[dim], tp))


def _does_not_divide(what: str, size: int, tp: int) -> str:
    return f"{what} ({size}) is not divisible by --target-tensor-parallel-size {tp}; use {_divisors(size)}."
