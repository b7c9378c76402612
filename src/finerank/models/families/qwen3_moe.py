"""Qwen3 MoE: Qwen3's attention; layers have experts, or one dense MLP (`mlp_only_layers`, `decoder_sparse_step`)."""

from finerank.models.families import Family
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP, MLP_NORM, QK_NORMS, experts

_EXPERT = "mlp.experts.{expert}"

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    layer_rules=(
        INPUT_NORM,
        MLP_NORM,
        *ATTENTION,
        *QK_NORMS,
        *MLP,
        *experts(f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj", f"{_EXPERT}.down_proj", router="mlp.gate"),
    ),
)
