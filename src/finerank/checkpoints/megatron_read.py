"""Read Megatron checkpoints: folders of ranks, their names and shards, as one model under Hugging Face names.

    checkpoint = MegatronCheckpoint.open(folder)      # reads the pickles of all ranks, no tensor
    weights_of(checkpoint, config)                    # lazy, shards joined and unpacked when read

Which layers a stage holds is told from the tensors that are there, so uneven stages, no-op layers and virtual stages
need no flag. Replicated tensors are taken from rank 0; where ranks disagree `checkpoint.notes` says so.
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints import megatron_names as names
from finerank.checkpoints import packing
from finerank.checkpoints.megatron_nf4 import packed_weights
from finerank.checkpoints.pickles import Inert
from finerank.checkpoints.torch_file import StoredTensor, TorchFile, walk
from finerank.checkpoints.weights import HEAD, LazyWeights, TensorInfo, same_bits
from finerank.errors import CheckpointError
from finerank.models.families import Dims, Family, TensorRule

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
Part = tuple[TensorInfo, Callable[[], Tensor]]


@dataclass
class MegatronCheckpoint:
    """An opened checkpoint: shards by (chunk position, name, tensor rank, expert rank)."""

    folder: Path
    args: dict[str, Any]
    tp: int
    pp: int
    ep: int
    is_legacy: bool
    chunks: list[list[dict[tuple[int, int], dict[str, Part]]]]
    """`chunks[stage][chunk][(tp rank, ep rank)]`: parts by mcore name."""
    notes: set[str] = field(default_factory=set)

    @staticmethod
    def open(folder: Path) -> "MegatronCheckpoint":
        """Open all ranks of the newest iteration. Raises CheckpointError naming the file that is missing or torn."""
        folder = Path(folder)
        iteration = iteration_folder(folder)
        found = {p.name: p / FILE for p in sorted(iteration.iterdir()) if _RANK.fullmatch(p.name)}
        if not found:
            raise CheckpointError(f"{iteration} has no mp_rank_* folder; give the folder above iter_*.")
        files = {name: TorchFile(path) for name, path in found.items()}
        first = next(iter(files.values()))
        args = _args(first)
        _check_version(first)
        ranks = _rank_numbers(list(files), args)
        sizes = [1 + max(r[i] for r in ranks.values()) for i in range(3)]
        wanted = {(t, p, e) for t in range(sizes[0]) for p in range(sizes[1]) for e in range(sizes[2])}
        missing = sorted(wanted - set(ranks.values()))
        if missing:
            raise CheckpointError(f"{iteration} lacks the folder of rank tp {missing[0][0]} pp {missing[0][1]}.")
        chunks: list[list[dict[tuple[int, int], dict[str, Part]]]] = []
        legacy = False
        for stage in range(sizes[1]):
            at_stage = {ranks[n]: f for n, f in files.items() if ranks[n][1] == stage}
            tables = {(t, e): _chunk_tables(file) for (t, _, e), file in at_stage.items()}
            counts = {len(t) for t in tables.values()}
            if len(counts) != 1:
                raise CheckpointError(f"{iteration}: the ranks of stage {stage} hold unequal numbers of model chunks.")
            legacy = legacy or any(t[0][1] for t in tables.values())
            chunks.append([{rank: t[v][0] for rank, t in tables.items()} for v in range(counts.pop())])
        tp, pp, ep = sizes
        return MegatronCheckpoint(folder, args, tp, pp, ep, is_legacy=legacy, chunks=chunks)

    def order(self) -> Iterator[tuple[int, int]]:
        """(stage, chunk) in the order of the model's layers."""
        is_v_shaped = self.args.get("schedules_method") == "dualpipev"
        for chunk in range(len(self.chunks[0])):
            stages = range(self.pp)
            for stage in reversed(stages) if is_v_shaped and chunk % 2 else stages:
                yield stage, chunk

    def layers(self) -> list[tuple[int, int, int]]:
        """(stage, chunk, local index) of each layer of the model; no-op layers have no tensors and are skipped."""
        found = []
        for stage, chunk in self.order():
            parts = self.chunks[stage][chunk][0, 0]
            local = {int(m[1]) for n in parts if (m := names.LAYER.fullmatch(n))}
            found += [(stage, chunk, i) for i in sorted(local)]
        return found

    def find(self, name: str) -> tuple[int, int] | None:
        """(stage, chunk) that holds a tensor outside the layers."""
        for stage, chunk in self.order():
            if name in self.chunks[stage][chunk][0, 0]:
                return stage, chunk
        return None

    def shards(self, stage: int, chunk: int, name: str, *, ep_rank: int = 0) -> list[Part]:
        """A tensor's parts on the tensor-parallel ranks. Raises CheckpointError when a rank lacks it."""
        tables = self.chunks[stage][chunk]
        for t in range(self.tp):
            if name not in tables[t, ep_rank]:
                raise CheckpointError(f"{self.folder}: tensor {name} of stage {stage} is missing on rank tp {t}.")
        return [tables[t, ep_rank][name] for t in range(self.tp)]

    def joined(self, shards: list[Part], rule: TensorRule, dim: int | None, name: str) -> Tensor:
        """The whole packed tensor; replicated ones come from rank 0 and are compared."""
        tensors = [read() for _, read in shards]
        if dim is None and any(not same_bits(tensors[0], t) for t in tensors[1:]):
            note = f"{name} differs between tensor-parallel ranks; rank 0 was taken"
            if note not in self.notes:
                logger.warning("%s: %s", self.folder, note)
            self.notes.add(note)
        return packing.join(rule, tensors, dim=dim)


def iteration_folder(folder: Path) -> Path:
    """The folder of the iteration that the tracker file names. Raises CheckpointError."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{tracker} is missing; give the folder that holds it and iter_*.")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    name = "release" if text == "release" else f"iter_{int(text):07d}" if re.fullmatch(r"\d{1,12}", text) else None
    if name is None:
        raise CheckpointError(f"{tracker} holds {text[:40]!r}; it must hold a step number or 'release'.")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{folder / name} is missing, and {TRACKER} names it.")
    return folder / name


def first_names(folder: Path) -> list[str]:
    """Tensor names of one rank as they are stored, to tell layouts apart. Raises CheckpointError."""
    paths = sorted(p / FILE for p in iteration_folder(folder).iterdir() if _RANK.fullmatch(p.name))
    if not paths:
        raise CheckpointError(f"{folder} has no mp_rank_* folder; give the folder above iter_*.")
    content = TorchFile(paths[0]).content
    models = {k: v for k, v in content.items() if str(k).startswith("model")} if isinstance(content, dict) else {}
    return [name for model in models.values() if isinstance(model, dict) for name, _ in walk(model)]


def _args(file: TorchFile) -> dict[str, Any]:
    args = file.content.get("args") if isinstance(file.content, dict) else None
    if isinstance(args, Inert):
        return args.attributes()
    return dict(args) if isinstance(args, dict) else {}


def _check_version(file: TorchFile) -> None:
    if not isinstance(file.content, dict):
        raise CheckpointError(f"{file.path} holds no Megatron checkpoint: its top level is no dict.")
    version = file.content.get("checkpoint_version", 3.0)
    if not isinstance(version, int | float) or version < 2.0:
        raise CheckpointError(
            f"{file.path} has checkpoint_version {version}, whose QKV order is another; convert it first."
        )


def _rank_numbers(folders: list[str], args: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """(tp, pp, ep) of each folder name. With two numbers the second is pp, or ep when args say there is no pipeline."""
    is_expert = args.get("pipeline_model_parallel_size", 1) == 1 and (args.get("expert_model_parallel_size") or 1) > 1
    ranks = {}
    for name in folders:
        match = _RANK.fullmatch(name)
        assert match
        t, second, third = int(match[1]), int(match[2] or 0), int(match[3] or 0)
        ranks[name] = (t, 0, second) if match[3] is None and is_expert else (t, second, third)
    return ranks


def _chunk_tables(file: TorchFile) -> list[tuple[dict[str, Part], bool]]:
    """(parts by mcore name, is legacy) of `model`, or of `model0`, `model1`, ..."""
    content = file.content
    keys = ["model"] if "model" in content else [f"model{i}" for i in range(len(content)) if f"model{i}" in content]
    if not keys or not all(isinstance(content[k], dict) for k in keys):
        raise CheckpointError(f"{file.path} holds no `model`; it is no Megatron checkpoint.")
    tables = []
    for key in keys:
        leaves = dict(walk(content[key]))
        packed, taken = packed_weights(leaves, file)
        parts: dict[str, Part] = {names.to_mcore(name): part for name, part in packed.items()}
        for name, value in leaves.items():
            if isinstance(value, StoredTensor) and name not in taken:
                for new, part in _expand(names.to_mcore(name), value, file):
                    parts[new] = part
        tables.append((parts, names.is_legacy(list(leaves))))
    return tables


def _expand(name: str, stored: StoredTensor, file: TorchFile) -> Iterator[tuple[str, Part]]:
    """The tensor itself; the stacked experts of grouped GEMM come apart into local experts."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.weight([12])", name)
    if match is None:
        yield name, (stored.info, lambda: file.read(stored))
        return
    if len(stored.info.shape) != 2:
        raise CheckpointError(f"{file.path}: {name} must be a matrix.")
    args = _args(file)
    count = (args.get("num_experts") or 0) // (args.get("expert_model_parallel_size") or 1)
    rows, columns = stored.info.shape
    if not count or (columns if match[2] == "1" else rows) % count:
        raise CheckpointError(f"{file.path}: {name} needs num_experts in the checkpoint's args to be taken apart.")
    # weight1 is [E, h, 2f] reinterpreted as [h, E 2f]; weight2 is [E f, h]; both hold transposed weights
    shape = (count, rows, columns // count) if match[2] == "1" else (count, rows // count, columns)
    info = TensorInfo((shape[2], shape[1]), stored.info.dtype)

    def read(j: int) -> Tensor:
        return file.read(stored).reshape(shape)[j].T.contiguous()

    for j in range(count):
        yield f"{match[1]}.local_experts.{j}.linear_fc{match[2]}.weight", (info, lambda j=j: read(j))  # type: ignore[misc]


class _LastRead:
    """Keeps the last packed tensor, because q, k and v are read one after the other."""

    def __init__(self) -> None:
        self.key: Any = None
        self.value: Tensor | None = None

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key != self.key or self.value is None:
            self.key, self.value = None, None
            self.value = make()
            self.key = key
        return self.value


def weights_of(checkpoint: MegatronCheckpoint, family: Family, dims: Dims, *, is_tied: bool) -> LazyWeights:
    """The model's tensors under Hugging Face names. Raises CheckpointError when layers or tensors are missing."""
    layers = checkpoint.layers()
    if len(layers) != dims.num_layers:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(layers)} layers, the model's config says {dims.num_layers}; the "
            "checkpoint is incomplete or belongs to another model."
        )
    entries: dict[str, Part] = {}
    last = _LastRead()
    entries["model.embed_tokens.weight"] = _outer(checkpoint, names.EMBEDDING, dims.vocab_size)
    for layer, (stage, chunk, local) in enumerate(layers):
        before = len(entries)
        for rule, name, hf, ep_rank in stored_modules(checkpoint, family, dims, stage, chunk, local):
            for suffix in rule.suffixes:
                base = f"{name}.base_layer{suffix}"
                stored = base if base in checkpoint.chunks[stage][chunk][0, ep_rank] else name + suffix
                if stored in checkpoint.chunks[stage][chunk][0, ep_rank]:
                    shards = checkpoint.shards(stage, chunk, stored, ep_rank=ep_rank)
                    hf_names = [f"model.layers.{layer}.{h}{suffix}" for h in hf]
                    entries.update(_unpacked(checkpoint, shards, rule, suffix, dims, hf_names, last))
        if len(entries) == before:
            raise CheckpointError(f"{checkpoint.folder}: layer {layer} holds no tensor of the family {family.name}.")
    entries["model.norm.weight"] = _outer(checkpoint, names.FINAL_NORM, None)
    if not is_tied:
        entries[HEAD] = _outer(checkpoint, names.OUTPUT, dims.vocab_size)
    return LazyWeights(entries, source=str(checkpoint.folder))


def stored_modules(
    checkpoint: MegatronCheckpoint, family: Family, dims: Dims, stage: int, chunk: int, local: int
) -> Iterator[tuple[TensorRule, str, list[str], int]]:
    """(rule, mcore module name, Hugging Face module names, expert rank) of a layer, experts counted out."""
    for rule in family.layer_rules:
        prefix = f"decoder.layers.{local}."
        if not rule.is_expert:
            yield rule, prefix + rule.megatron, list(rule.hf), 0
            continue
        count = dims.num_experts // checkpoint.ep
        for j in range(dims.num_experts):
            name = prefix + rule.megatron.replace("{expert}", str(j % count))
            yield rule, name, [h.replace("{expert}", str(j)) for h in rule.hf], j // count


def _outer(checkpoint: MegatronCheckpoint, name: str, rows: int | None) -> Part:
    """A tensor outside the layers; `rows` cuts the padding of a vocabulary off."""
    place = checkpoint.find(name)
    if place is None:
        raise CheckpointError(f"{checkpoint.folder} lacks {name}; it is no whole model.")
    shards = checkpoint.shards(*place, name)
    rule = TensorRule(name, (name,))
    dim = None if rows is None else 0
    info = shards[0][0]
    if rows is None:
        return info, lambda: checkpoint.joined(shards, rule, dim, name)
    stored_rows = sum(i.shape[0] for i, _ in shards)
    if stored_rows < rows:
        raise CheckpointError(f"{checkpoint.folder}: {name} has {stored_rows} rows, fewer than vocab_size {rows}.")
    shape = (rows, *info.shape[1:])
    return TensorInfo(shape, info.dtype), lambda: checkpoint.joined(shards, rule, dim, name)[:rows].clone()


def _unpacked(
    checkpoint: MegatronCheckpoint,
    shards: list[Part],
    rule: TensorRule,
    suffix: str,
    dims: Dims,
    hf_names: list[str],
    last: _LastRead,
) -> Iterator[tuple[str, Part]]:
    dim = packing.split_dim(rule, suffix)
    meta = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info, _ in shards]
    try:
        parts = packing.unpack(rule.packing, packing.join(rule, meta, dim=dim), dims)
    except RuntimeError as error:
        shape = list(shards[0][0].shape)
        raise CheckpointError(
            f"{checkpoint.folder}: {hf_names[0]} cannot be taken out of shards of shape {shape} with "
            f"{dims.num_attention_heads} heads and {dims.num_key_value_heads} key-value heads; give the right config."
        ) from error

    def read(i: int) -> Tensor:
        packed = last.get(hf_names[0], lambda: checkpoint.joined(shards, rule, dim, hf_names[0]))
        return packing.unpack(rule.packing, packed, dims)[i].clone(memory_format=torch.contiguous_format)

    for i, (hf_name, part) in enumerate(zip(hf_names, parts, strict=True)):
        yield hf_name, (TensorInfo(tuple(part.shape), part.dtype), lambda i=i: read(i))  # type: ignore[misc]
