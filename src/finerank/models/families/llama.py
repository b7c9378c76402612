"""Llama 2, 3.x and what shares its tensors (SmolLM2): no q/k norm; grouped-query attention; tied or not."""

from finerank.models.families import Family
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP, MLP_NORM

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    aliases=("llama2", "llama3", "llama31", "llama32", "smollm2"),
    layer_rules=(INPUT_NORM, MLP_NORM, *ATTENTION, *MLP),
)
