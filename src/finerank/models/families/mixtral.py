"""Mixtral: every layer has a router and experts; w1 is the gate, w3 the up and w2 the down projection."""

from finerank.models.families import Family
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP_NORM, experts

_EXPERT = "block_sparse_moe.experts.{expert}"

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    layer_rules=(
        INPUT_NORM,
        MLP_NORM,
        *ATTENTION,
        *experts(f"{_EXPERT}.w1", f"{_EXPERT}.w3", f"{_EXPERT}.w2", router="block_sparse_moe.gate"),
    ),
)
