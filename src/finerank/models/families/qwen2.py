"""Qwen2 and Qwen2.5: Llama's tensors with biases on q, k and v."""

from finerank.models.families import Family
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP, MLP_NORM

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    aliases=("qwen25", "qwen2.5"),
    layer_rules=(INPUT_NORM, MLP_NORM, *ATTENTION, *MLP),
)
