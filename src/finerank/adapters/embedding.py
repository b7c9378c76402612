"""LoRA on an embedding, and on a head that is tied to it.

    y = (W + scale * (B A)^T)[ids]          lora_embedding_A [R, V]    lora_embedding_B [D, R]    of W [V, D]

`A` starts at zero and `B` normal, as in PEFT. `lora_dropout` has no effect on an embedding, nor has it in PEFT. A head
that is tied to the embedding keeps its own weights unless `ensure_weight_tying` is set: then the same factors change
both, and a merged model stays tied. PEFT writes them a second time as the head's, `lora_A = B^T` and `lora_B = A^T`.

Reference: `peft.tuners.lora.layer.Embedding`, `peft.tuners.lora.model.LoraModel._add_targets_to_tie`.

Shapes: V vocabulary, D hidden, R rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.low_rank import Member, adapted_linear
from finerank.errors import AdapterError


class LoRAEmbedding(AdaptedModule):
    """A frozen embedding with a low-rank change.

    Args:
        base_layer: the embedding; what it does beyond looking up is only Gemma's `embed_scale`.
        lora_A: [R, V].
        lora_B: [D, R].
        scale: factor of `B A`.
    """

    def __init__(self, base_layer: nn.Embedding, lora_A: nn.Parameter, lora_B: nn.Parameter, *, scale: float):
        super().__init__(base_layer)
        self.lora_embedding_A, self.lora_embedding_B, self.scale = lora_A, lora_B, scale

    def trained(self) -> dict[str, nn.Parameter]:
        """Both factors; PEFT gives them no `.weight`."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]"""
        y = self.base_layer(ids)
        if not self.is_active:
            return y
        h = F.embedding(ids, self.lora_embedding_A.T, self.base_layer.padding_idx)  # type: ignore[arg-type]
        branch = embed_scale(self.base_layer).to(h.dtype) * (h @ self.lora_embedding_B.T).mul(self.scale)
        return (y + branch).to(y.dtype)

    @torch.no_grad()
    def merge_(self) -> None:
        """`W + scale * (B A)^T`: fp32 arithmetic, one rounding."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        work = torch.promote_types(weight.dtype, torch.float32)
        change_VD = (self.lora_embedding_B.to(work) @ self.lora_embedding_A.to(work)).T
        weight.copy_(torch.add(weight.to(work), change_VD, alpha=self.scale))
        self.is_active = False


class LoRATiedHead(AdaptedModule):
    """The head of an embedding that has a LoRA, changed by the same factors."""

    def __init__(self, base_layer: nn.Linear, embedding: LoRAEmbedding, *, dropout: float):
        super().__init__(base_layer)
        self.lora_embedding_A, self.lora_embedding_B = embedding.lora_embedding_A, embedding.lora_embedding_B
        self.scale, self.dropout = embedding.scale, dropout

    def trained(self) -> dict[str, nn.Parameter]:
        """The embedding's, and so none of its own."""
        return {}

    def file_tensors(self) -> dict[str, Tensor]:
        """As PEFT writes the factors of a tied linear."""
        return {
            "lora_A.weight": self.lora_embedding_B.detach().T.contiguous(),
            "lora_B.weight": self.lora_embedding_A.detach().T.contiguous(),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        if not self.is_active:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        member = Member(self.base_layer, self.scale, 0)
        return adapted_linear(x, [member], [self.lora_embedding_B.T], [self.lora_embedding_A.T], dropout)[0]

    def merge_(self) -> None:
        """The embedding's merge changed the weight that both share."""
        self.is_active = False


def embed_scale(base: nn.Module) -> Tensor:
    """What the embedding multiplies its rows with, as it rounds it; a scalar."""
    scale = getattr(base, "embed_scale", None)
    if scale is None:
        return base.weight.new_ones(())  # type: ignore[operator, union-attr]
    return torch.as_tensor(scale, device=base.weight.device).to(base.weight.dtype)  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def check_embedding(base: nn.Module, name: str) -> None:
    """Raise AdapterError for an embedding that does more than look up and scale, on which ours would be wrong."""
    if isinstance(base, nn.Embedding) and base.max_norm is None:
        ids = torch.arange(min(8, base.num_embeddings), device=base.weight.device)
        if torch.equal(base(ids), F.embedding(ids, base.weight) * embed_scale(base)):
            return
    raise AdapterError(f"{name} does more than look up rows, so it cannot be adapted; leave it out.")


def is_tied(model: nn.Module) -> bool:
    """The head's weight is the embedding's."""
    embedding, head = embedding_and_head(model)
    return embedding is not None and head is not None and weight_of(head) is weight_of(embedding)


def untie_(model: nn.Module) -> None:
    """Give a tied head weights of its own, equal to the embedding's, and let the model's config say so."""
    _, head = embedding_and_head(model)
    assert head is not None
    while isinstance(base := getattr(head, "base_layer", None), nn.Module):
        head = base
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # type: ignore[operator, union-attr]
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def embedding_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The model's input and output embeddings; None for one that it does not have."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, getter, None)
        found.append(get() if get is not None else None)
    return found[0], found[1]


def weight_of(module: nn.Module) -> Tensor | None:
    """The base weight of a module, whatever is put on it."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return getattr(module, "weight", None)
