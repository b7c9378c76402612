"""Lazy weights: a mapping from Hugging Face tensor names to tensors that are read when asked for, one at a time.

    model = hf.read(folder)               # reads headers only
    model.weights.info("lm_head.weight")  # TensorInfo(shape=(49152, 576), dtype=torch.bfloat16)
    model.weights["lm_head.weight"]       # reads this tensor and nothing else

Every format reader gives a `BaseModel` whose weights have Hugging Face names, every writer takes one; a conversion is a
reader, perhaps a `Weights` around it that changes tensors as they pass (`merge.MergedWeights`), and a writer. So a
checkpoint larger than memory converts with the memory of its largest tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finerank.errors import CheckpointError, unknown_name

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory and in a file."""
        return self.numel * self.dtype.itemsize


class Weights(ABC, Mapping[str, Tensor]):
    """Tensors by name, read when asked for. Every read gives fresh memory that the caller may change in place."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype without reading the tensor. Raises CheckpointError for an unknown name."""

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self)


class LazyWeights(Weights):
    """Weights from a table of (info, function that makes the tensor)."""

    def __init__(self, entries: Mapping[str, tuple[TensorInfo, Callable[[], Tensor]]], *, source: str = "weights"):
        self._entries = dict(entries)
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        info, make = self._entry(name)
        tensor = make()
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, (name, tensor.shape, info)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype without reading the tensor."""
        return self._entry(name)[0]

    def _entry(self, name: str) -> tuple[TensorInfo, Callable[[], Tensor]]:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self._source}: {unknown_name('tensor', name, self._entries)}") from None


class WeightsOver(Weights):
    """Weights made from others with the same names; a subclass says what becomes of a tensor."""

    def __init__(self, weights: Weights):
        self._weights = weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def info(self, name: str) -> TensorInfo:
        """As that of the weights below."""
        return self._weights.info(name)


class CastWeights(WeightsOver):
    """Weights whose floating tensors are cast as they are read."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        super().__init__(weights)
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self.info(name).dtype)

    def info(self, name: str) -> TensorInfo:
        """Shape, and the dtype after the cast."""
        info = self._weights.info(name)
        return TensorInfo(info.shape, self._dtype) if info.dtype.is_floating_point else info


def in_memory(tensors: Mapping[str, Tensor]) -> LazyWeights:
    """Weights over tensors that are in memory already; each read is a copy."""
    return LazyWeights({name: (TensorInfo(tuple(t.shape), t.dtype), t.clone) for name, t in tensors.items()})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits; unlike `torch.equal`, NaN equals itself and 0 differs from -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) if a.numel() else True


@dataclass
class BaseModel:
    """A base model as any format holds it."""

    config: dict[str, Any]
    """What Hugging Face's config.json holds."""
    weights: Weights
    """Tensors under Hugging Face names."""
    folder: Path | None = None
    """Folder with tokenizer, chat template and generation config to copy; None when there is none."""
    is_in_folder: bool = False
    """`folder` holds these very weights in Hugging Face's format."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to tell the user."""

    @property
    def is_tied(self) -> bool:
        """The output layer is the embedding. Where the config does not say so, a missing output layer does."""
        return bool(self.config.get("tie_word_embeddings", HEAD not in self.weights))

    @property
    def embedding_name(self) -> str | None:
        """Name of the embedding's tensor; None when there is none that is known."""
        names = [n for n in self.weights if n.endswith(_EMBEDDINGS)]
        return names[0] if len(names) == 1 else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have, by bytes."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.weights:
            info = self.weights.info(name)
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda d: sizes[d]) if sizes else torch.float32
