"""A low-rank adapter as files hold it, whatever their format: factors by Hugging Face module name.

    W' = W + scale * B A                                      LoRA, rsLoRA, LU-LoRA
    W' = m * (W + scale * B A) / ||W + scale * B A||_row      DoRA; m is `magnitude`

Shapes: O out_features, I in_features, R rank. `scale` is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA; rank and
alpha may differ by module (`rank_pattern`, `alpha_pattern`). What was trained whole (`modules_to_save`, biases) is in
`whole`, the rows of new tokens (`trainable_token_indices`) are in `rows`.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The low-rank change of one module's weight."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None
    """DoRA's row lengths."""
    is_embedding: bool = False
    """The weight is an embedding [V, D]: its change is `scale * (B A)^T`, with A [R, V] and B [D, R]."""
    is_transposed: bool = False
    """The weight is stored [I, O], as Conv1D does (`fan_in_fan_out`)."""
    num_experts: int = 0
    """E of a fused parameter [E, O, I], with A [E R, I] and B [O, R E]; 0 for one weight."""

    @property
    def rank(self) -> int:
        """Rank R."""
        return self.a_RI.shape[0] // max(self.num_experts, 1)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight in its file."""
        O, I = self.b_OR.shape[0], self.a_RI.shape[1]  # noqa: E741
        return (I, O) if self.is_embedding or self.is_transposed else (O, I)


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding or of a head that take the place of the base's, or lie beyond them."""

    ids: tuple[int, ...]
    values_ND: Tensor


@dataclass
class Adapter:
    """An adapter read from any format."""

    config: dict[str, Any]
    """PEFT's LoraConfig as JSON values."""
    factors: dict[str, Factors]
    """By Hugging Face module name, e.g. `model.layers.0.self_attn.q_proj`; fused experts by parameter name."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors trained whole, by Hugging Face tensor name, e.g. `lm_head.weight`."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """Trained rows, by Hugging Face module name; those of the embedding are a tied head's too."""
    source: str = "adapter"
    """Where it came from, for messages."""

    @property
    def base_model_name(self) -> str | None:
        """Name of the base model it was trained on, as the adapter's config has it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def is_dora(self) -> bool:
        """Any module has a magnitude."""
        return any(f.magnitude_O is not None for f in self.factors.values())
