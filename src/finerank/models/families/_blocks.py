"""Rules that several families share."""

from finerank.models.families import TensorRule

INPUT_NORM = TensorRule("input_layernorm", ("input_layernorm",))
MLP_NORM = TensorRule("pre_mlp_layernorm", ("post_attention_layernorm",))

ATTENTION = (
    TensorRule(
        "self_attention.linear_qkv",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        packing="qkv",
        split="column",
        suffixes=(".weight", ".bias"),
    ),
    TensorRule("self_attention.linear_proj", ("self_attn.o_proj",), split="row", suffixes=(".weight", ".bias")),
)

QK_NORMS = (
    TensorRule("self_attention.q_layernorm", ("self_attn.q_norm",)),
    TensorRule("self_attention.k_layernorm", ("self_attn.k_norm",)),
)

MLP = (
    TensorRule(
        "mlp.linear_fc1",
        ("mlp.gate_proj", "mlp.up_proj"),
        packing="gate_up",
        split="column",
        suffixes=(".weight", ".bias"),
    ),
    TensorRule("mlp.linear_fc2", ("mlp.down_proj",), split="row", suffixes=(".weight", ".bias")),
)


def experts(gate: str, up: str, down: str, router: str) -> tuple[TensorRule, ...]:
    """Router and experts under the Hugging Face names of a family; `{expert}` is the expert's number."""
    local = "mlp.experts.local_experts.{expert}"
    return (
        TensorRule("mlp.router", (router,)),
        TensorRule(f"{local}.linear_fc1", (gate, up), packing="gate_up", split="column"),
        TensorRule(f"{local}.linear_fc2", (down,), split="row"),
    )
