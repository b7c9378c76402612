"""DoRA: magnitude and direction of each output feature are trained apart.

    V = W + scale * B A        y = m * V x / ||V|| + b        ||V||: length of each row, no gradient through it

`lora_magnitude_vector` m [O] starts at the rows' lengths of W, so a fresh adapter changes nothing. It lies beside
`lora_A` and `lora_B` in PEFT's file, under PEFT's name. With dropout, only the low-rank path's input is dropped.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 4.3 for the missing gradient.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finerank.adapters.low_rank import weight_OI

if TYPE_CHECKING:
    from finerank.adapters.lora import LoRALinear


@torch.no_grad()
def direction_norm(layer: "LoRALinear") -> Tensor:
    """`||W + scale * B A||` for each row, fp32 [O]."""
    # computed at each call: torch's fused AdamW does not count up a parameter's version, so none could tell it is stale
    v_OI = weight_OI(layer.base_layer).float()
    a_RI, b_OR = layer.factors()
    return torch.addmm(v_OI, b_OR.float(), a_RI.float(), alpha=layer.scale).norm(dim=1)


def add_magnitude(layer: "LoRALinear") -> None:
    """Make a LoRA layer a DoRA layer that changes what it changed before."""
    layer.lora_magnitude_vector = nn.Parameter(direction_norm(layer).clone(), requires_grad=layer.lora_B.requires_grad)
