"""Gemma 3, text only: q/k norms and four norms a layer; `post_attention_layernorm` follows attention here.

The norms' weights are stored as Hugging Face has them (applied as 1 + w).
"""

from finerank.models.families import Family, TensorRule
from finerank.models.families._blocks import ATTENTION, INPUT_NORM, MLP, QK_NORMS

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    layer_rules=(
        INPUT_NORM,
        TensorRule("post_attn_norm", ("post_attention_layernorm",)),
        TensorRule("pre_mlp_layernorm", ("pre_feedforward_layernorm",)),
        TensorRule("post_mlp_layernorm", ("post_feedforward_layernorm",)),
        *ATTENTION,
        *QK_NORMS,
        *MLP,
    ),
)
