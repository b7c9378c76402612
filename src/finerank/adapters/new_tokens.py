"""Some rows of the vocabulary, trained whole: those of new tokens. PEFT's `trainable_token_indices`.

    --add-tokens '<tool>' '</tool>'

The rows take the place of the embedding's and of the head's at these ids; all others stay frozen, and nothing of the
vocabulary's size is kept or given a gradient. A tied head uses the embedding's rows.

    ....embed_tokens.token_adapter.trainable_tokens_delta      [number of ids, D], the rows themselves

Reference: `peft.tuners.trainable_tokens.layer.TrainableTokensLayer`, which calls a replaced row a delta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.embedding import embed_scale
from finerank.errors import AdapterError

ROWS = "token_adapter.trainable_tokens_delta"


class TrainedRows(AdaptedModule):
    """An embedding or a head with trained rows, in fp32 whatever the base's precision.

    Args:
        base_layer: `nn.Embedding` or `nn.Linear` over the vocabulary.
        ids: whose rows are trained.
        rows: parameter [len(ids), D] to share with the other side of a tied pair; None for one that starts as the base.
        trainable: whether an own parameter gets gradients.
    """

    ids: Tensor
    slots: Tensor

    def __init__(
        self, base_layer: nn.Module, ids: Sequence[int], *, rows: nn.Parameter | None = None, trainable: bool = True
    ):
        super().__init__(base_layer)
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        index = torch.tensor(list(ids), device=weight.device)
        slots = torch.full((weight.shape[0],), -1, device=weight.device)
        slots[index] = torch.arange(len(index), device=weight.device)
        self.register_buffer("ids", index, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.follows = rows is not None
        if rows is None:
            copy = weight.detach()[index].to(torch.promote_types(weight.dtype, torch.float32))
            rows = nn.Parameter(copy, requires_grad=trainable)
        self.rows = rows

    def trained(self) -> dict[str, nn.Parameter]:
        """The rows, unless they are the other side's."""
        return {} if self.follows else {ROWS: self.rows}

    def forward(self, x: Tensor) -> Tensor:
        """Embedding: ids [...] -> [..., D]; head: [..., D] -> [..., V]."""
        y = self.base_layer(x)
        if not self.is_active:
            return y
        if not isinstance(self.base_layer, nn.Embedding):
            columns = F.linear(x, self.rows.to(x.dtype))
            bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
            return y.index_copy(-1, self.ids, columns if bias is None else columns + bias[self.ids])
        slot = self.slots[x]
        frozen = self.base_layer.padding_idx  # a padding row gets no gradient, here as in the base
        padding = None if frozen is None or int(self.slots[frozen]) < 0 else int(self.slots[frozen])
        rows = F.embedding(slot.clamp(min=0), self.rows, padding).to(y.dtype) * embed_scale(self.base_layer)
        return torch.where((slot >= 0)[..., None], rows, y)

    @torch.no_grad()
    def merge_(self) -> None:
        """The rows take the place of the base's, rounded once."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        weight[self.ids] = self.rows.to(weight.dtype)
        self.is_active = False


def rows_by_module(
    indices: Any, names: Sequence[str], *, embedding: str | None, source: str
) -> dict[str, tuple[int, ...]]:
    """Full module name -> ids, of a config's `trainable_token_indices` (a list means the embedding).

    Args:
        indices: the config's value, checked here.
        names: of the model's modules.
        embedding: name of the input embedding.
        source: of the config, for messages.

    Raises AdapterError for a value of another kind, or a module that is not there.
    """
    if not indices:
        return {}
    by_name: Mapping[str, Any] = indices if isinstance(indices, dict) else {embedding or "embed_tokens": indices}
    found = {}
    for suffix, ids in by_name.items():
        full = next((name for name in names if name == suffix or name.endswith(f".{suffix}")), None)
        is_ids = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == len(ids)
        if full is None or not is_ids or not ids:
            raise AdapterError(f"{source}: trainable_token_indices has no usable ids for {suffix}; copy it again.")
        found[full] = tuple(ids)
    return found


def peft_token_indices(rows: Mapping[str, Sequence[int]]) -> list[int] | dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: a list for the embedding alone, else by the last part of a module's name."""
    if len(rows) == 1:
        return list(next(iter(rows.values())))
    return {name.rpartition(".")[2]: list(ids) for name, ids in rows.items()}
