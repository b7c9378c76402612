"""Mistral: Llama's tensors; head size may differ from hidden_size / heads."""

from finerank.models.families import Family
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP, MLP_NORM

FAMILY = Family(name="mistral", model_types=("mistral",), layer_rules=(INPUT_NORM, MLP_NORM, *ATTENTION, *MLP))
