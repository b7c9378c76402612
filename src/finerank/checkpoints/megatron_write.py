"""Write Megatron checkpoints: one `.pt` a rank, all ranks of a stage at once, tensor by tensor.

    write_megatron(folder, layout, entries_of_base(model, family, dims, layout, ...), args, legacy=False)

An entry is one Megatron tensor: where it goes, the shapes of its shards, and a function that reads and cuts it. Plans
of a base, of a LoRA checkpoint and of both together are lists of entries; the writer does not know what they hold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints import megatron_names as names
from finerank.checkpoints import packing
from finerank.checkpoints.layout import Layout
from finerank.checkpoints.megatron_read import FILE, TRACKER
from finerank.checkpoints.torch_file import TorchWriter, namespace
from finerank.checkpoints.weights import HEAD, BaseModel, TensorInfo
from finerank.errors import CheckpointError
from finerank.models.families import Dims, Family, TensorRule


@dataclass(frozen=True)
class Entry:
    """One tensor of a Megatron checkpoint."""

    name: str
    """mcore name with the local layer index."""
    stage: int
    chunk: int
    infos: list[TensorInfo]
    """Of the shard on each tensor-parallel rank."""
    make: Callable[[], list[Tensor]]
    ep_rank: int | None = None
    """Expert rank that holds it; None for all."""


def make_entry(
    name: str,
    at: tuple[int, int],
    rule: TensorRule,
    dim: int | None,
    tp: int,
    meta: Tensor,
    read: Callable[[], Tensor],
    ep_rank: int | None = None,
) -> Entry:
    """An entry of a packed tensor: `meta` has its shape and dtype, `read` makes it."""
    shards = packing.split(rule, meta, tp, dim=dim)
    infos = [TensorInfo(tuple(s.shape), s.dtype) for s in shards]
    return Entry(name, *at, infos, lambda: packing.split(rule, read(), tp, dim=dim), ep_rank)


def entries_of_base(
    model: BaseModel,
    family: Family,
    dims: Dims,
    layout: Layout,
    *,
    divisible_by: int = 1,
    dtype: torch.dtype | None = None,
    base_layer_of: Callable[[int, str], bool] = lambda layer, module: False,
) -> Iterator[Entry]:
    """The entries of a whole model.

    Args:
        divisible_by: the vocabulary is padded to a multiple of this times tp.
        dtype: cast floating tensors to it; None keeps what the model has.
        base_layer_of: does a layer's Megatron module have an adapter, so that its weight is a `base_layer`?

    Raises:
        CheckpointError: a tensor of the model has no place in the family's table.
        ConfigError: a size does not divide.
    """
    rows = packing.padded_vocab_size(dims.vocab_size, tp=layout.tp, divisible_by=divisible_by)
    embedding, final_norm = "model.embed_tokens.weight", "model.norm.weight"
    used = {embedding, final_norm, HEAD}
    yield _outer(model, embedding, names.EMBEDDING, (0, 0), layout, dtype, rows)
    for stage, chunks in enumerate(layout.chunks):
        for chunk, slots in enumerate(chunks):
            for local, layer in enumerate(slots):
                if layer is None:
                    continue
                for rule, module, hf, ep_rank in layer_modules(family, dims, layout, layer):
                    for suffix in rule.suffixes:
                        sources = [f"model.layers.{layer}.{h}{suffix}" for h in hf]
                        present = [s in model.weights for s in sources]
                        if not any(present):
                            continue
                        _require(model, sources, present)
                        used.update(sources)
                        infix = ".base_layer" if base_layer_of(layer, module) else ""
                        name = f"decoder.layers.{local}.{module}{infix}{suffix}"
                        yield _packed(model, sources, name, (stage, chunk), rule, suffix, dims, layout, dtype, ep_rank)
    yield _outer(model, final_norm, names.FINAL_NORM, layout.head_at, layout, dtype, None)
    if not model.is_tied:
        yield _outer(model, HEAD, names.OUTPUT, layout.head_at, layout, dtype, rows)
    elif layout.head_at[0] != 0:  # the last stage cannot see the first one's embedding
        yield _outer(model, embedding, names.TIED_OUTPUT, layout.head_at, layout, dtype, rows)
    left = [n for n in model.weights if n not in used and not n.endswith("rotary_emb.inv_freq")]
    if left:
        raise CheckpointError(
            f"The model's tensor {left[0]} has no place in a Megatron checkpoint of the family {family.name}"
            f"{f' (and {len(left) - 1} more)' if len(left) > 1 else ''}; nothing was written."
        )


def layer_modules(
    family: Family, dims: Dims, layout: Layout, layer: int
) -> Iterator[tuple[TensorRule, str, list[str], int | None]]:
    """(rule, Megatron module, Hugging Face modules, expert rank) of a layer; names relative to the layer."""
    del layer  # every layer of a family may have every rule; what it lacks is skipped by the tensors' names
    for rule in family.layer_rules:
        if not rule.is_expert:
            yield rule, rule.megatron, list(rule.hf), None
            continue
        count = dims.num_experts // layout.ep
        for j in range(dims.num_experts):
            hf = [h.replace("{expert}", str(j)) for h in rule.hf]
            yield rule, rule.megatron.replace("{expert}", str(j % count)), hf, j // count


def _require(model: BaseModel, sources: Sequence[str], present: Sequence[bool]) -> None:
    for name, there in zip(sources, present, strict=True):
        if not there:
            raise CheckpointError(f"The model has no tensor {name}, which belongs with {sources[present.index(True)]}.")


def _packed(
    model: BaseModel,
    sources: list[str],
    name: str,
    at: tuple[int, int],
    rule: TensorRule,
    suffix: str,
    dims: Dims,
    layout: Layout,
    dtype: torch.dtype | None,
    ep_rank: int | None,
) -> Entry:
    dim = packing.split_dim(rule, suffix)
    metas = [_meta(model.weights.info(s), dtype) for s in sources]
    if len({m.dtype for m in metas}) != 1:
        raise CheckpointError(f"{sources[0]} and the tensors packed with it differ in dtype; give --params-dtype.")
    packing.check_shapes(rule, suffix, metas, sources, dims, layout.tp)

    def read() -> Tensor:
        return packing.pack(rule.packing, [_cast(model.weights[s], dtype) for s in sources], dims)

    meta = packing.pack(rule.packing, metas, dims)
    return make_entry(name, at, rule, dim, layout.tp, meta, read, ep_rank)


def _outer(
    model: BaseModel,
    source: str,
    name: str,
    at: tuple[int, int],
    layout: Layout,
    dtype: torch.dtype | None,
    rows: int | None,
) -> Entry:
    meta = _meta(model.weights.info(source), dtype)
    rule = TensorRule(name, (source,))
    if rows is None:
        return make_entry(name, at, rule, None, layout.tp, meta, lambda: _cast(model.weights[source], dtype))
    if meta.shape[0] > rows:
        raise CheckpointError(f"{source} has {meta.shape[0]} rows, more than the vocab_size of config.json.")

    def read() -> Tensor:
        return packing.pad_vocab(_cast(model.weights[source], dtype), rows)

    return make_entry(name, at, rule, 0, layout.tp, packing.pad_vocab(meta, rows), read)


def _meta(info: TensorInfo, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    return torch.empty(info.shape, dtype=wanted, device="meta")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor


def write_megatron(
    folder: Path,
    layout: Layout,
    entries: Sequence[Entry],
    args: Mapping[str, Any],
    *,
    legacy: bool,
    te_norms: bool = False,
) -> None:
    """Write the ranks of an iteration 1 and the tracker file into an existing empty folder."""
    iteration = folder / "iter_0000001"
    for stage in range(layout.pp):
        at_stage = [e for e in entries if e.stage == stage]
        with ExitStack() as stack:
            writers = {}
            for t in range(layout.tp):
                for e in range(layout.ep):
                    path = iteration / layout.folder(t, stage, e) / FILE
                    path.parent.mkdir(parents=True)
                    mine = [x for x in at_stage if x.ep_rank in (None, e)]
                    content = _content(mine, t, layout, args, legacy=legacy, te_norms=te_norms)
                    writers[t, e] = stack.enter_context(TorchWriter(path, content))
            for entry in sorted(at_stage, key=lambda x: x.chunk):
                shards = entry.make()
                for (t, e), writer in writers.items():
                    if entry.ep_rank in (None, e):
                        writer.write(shards[t])
    (folder / TRACKER).write_text("1", encoding="utf-8")


def _content(
    entries: list[Entry], tp_rank: int, layout: Layout, args: Mapping[str, Any], *, legacy: bool, te_norms: bool
) -> dict[str, Any]:
    content: dict[str, Any] = {"args": namespace(dict(args)), "checkpoint_version": 3.0, "iteration": 1}
    for chunk in range(layout.num_chunks):
        tensors = {e.name: e.infos[tp_rank] for e in entries if e.chunk == chunk}
        nested = names.to_legacy(tensors) if legacy else names.to_flat(tensors, te_norms=te_norms)
        content[layout.model_key(chunk)] = nested
    return content
