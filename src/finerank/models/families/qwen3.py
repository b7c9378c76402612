"""Qwen3: norms on the heads of q and k, no biases; heads x head size usually differs from hidden_size."""

from finerank.models.families import Family
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP, MLP_NORM, QK_NORMS

FAMILY = Family(name="qwen3", model_types=("qwen3",), layer_rules=(INPUT_NORM, MLP_NORM, *ATTENTION, *QK_NORMS, *MLP))
