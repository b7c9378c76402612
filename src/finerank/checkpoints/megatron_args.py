"""The `args` of a Megatron checkpoint: written so that Megatron, MindSpeed-LLM and we find our way, and read back.

MindSpeed-LLM's reader goes by `num_key_value_heads`, Megatron by `num_query_groups`: both are stored. `vocab_size` is
the true one, `padded_vocab_size` the rows that are stored.
"""

import json
from collections.abc import Mapping
from typing import Any

from finerank.checkpoints.layout import Layout
from finerank.errors import CheckpointError
from finerank.models.families import Dims, Family, dims_of

_SCALARS = (str, int, float, bool)


def args_of(
    config: Mapping[str, Any],
    family: Family,
    dims: Dims,
    layout: Layout,
    *,
    padded_vocab_size: int,
    te_norms: bool,
    has_qkv_bias: bool,
    has_qk_norm: bool,
    is_tied: bool,
) -> dict[str, Any]:
    """Attributes of the `args` namespace of a converted checkpoint."""
    args = {k: v for k, v in config.items() if _is_plain(v)}
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    args.update(
        # the whole config as text, so that no nested field of it (rope scaling, layer types) is lost
        finerank_hf_config=json.dumps(config, sort_keys=True),
        model_type_hf=(family.aliases or (family.name,))[0],
        num_layers=sum(len(chunk) for stage in layout.chunks for chunk in stage),
        hidden_size=dims.hidden_size,
        num_attention_heads=dims.num_attention_heads,
        num_key_value_heads=dims.num_key_value_heads,
        num_query_groups=dims.num_key_value_heads,
        group_query_attention=dims.num_key_value_heads != dims.num_attention_heads,
        kv_channels=dims.head_dim,
        vocab_size=dims.vocab_size,
        padded_vocab_size=padded_vocab_size,
        untie_embeddings_and_output_weights=not is_tied,
        add_qkv_bias=has_qkv_bias,
        qk_layernorm=has_qk_norm,
        rotary_base=theta,
        transformer_impl="transformer_engine" if te_norms else "local",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        add_bias_linear=False,
        normalization="RMSNorm",
        swiglu=True,
        use_rotary_position_embeddings=True,
    )
    if "intermediate_size" in config:
        args["ffn_hidden_size"] = config["intermediate_size"]
    if "rms_norm_eps" in config:
        args["norm_epsilon"] = config["rms_norm_eps"]
    if dims.num_experts:
        args["num_experts"] = dims.num_experts
    args.update(_pipeline_args(layout))
    return args


def _pipeline_args(layout: Layout) -> dict[str, Any]:
    counts = [[len(chunk) for chunk in stage] for stage in layout.chunks]
    args: dict[str, Any] = {}
    if layout.is_v_shaped:
        args["schedules_method"] = "dualpipev"
    elif layout.num_chunks > 1:
        args["num_layers_per_virtual_pipeline_stage"] = counts[0][0]
    elif len({tuple(c) for c in counts}) > 1:
        args["num_layer_list"] = ",".join(str(c[0]) for c in counts)
    flat = [slot for v in range(layout.num_chunks) for stage in layout.chunks for slot in stage[v]]
    if noops := [i for i, slot in enumerate(flat) if slot is None]:
        args["noop_layers"] = noops
    return args


def _is_plain(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, list) and all(isinstance(v, _SCALARS) for v in value))


def config_of(args: Mapping[str, Any], *, family: Family | None, source: str) -> dict[str, Any]:
    """A Hugging Face config from a checkpoint's args.

    Ours hold the config as it was; MindSpeed-LLM's converted ones hold its plain fields; trained ones hold Megatron's
    names, which describe the shapes once the family is known.

    Raises:
        CheckpointError: the args do not describe a model; the message asks for --hf-cfg-dir.
    """
    text = args.get("finerank_hf_config")
    if isinstance(text, str):
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source}: the config in its args is damaged; give --hf-cfg-dir.") from error
        if isinstance(config, dict):
            return config
    if isinstance(args.get("model_type"), str) and isinstance(args.get("architectures"), list):
        config = _library_fields(args)
    elif family is not None:
        config = _from_megatron(args, family)
    else:
        raise CheckpointError(
            f"{source} does not say what model it is; give --hf-cfg-dir FOLDER (its config.json) or --model-type-hf."
        )
    config["num_key_value_heads"] = _key_value_heads(args, config)
    if "untie_embeddings_and_output_weights" in args:
        config["tie_word_embeddings"] = not args["untie_embeddings_and_output_weights"]
    dims_of(config)
    return config


def _key_value_heads(args: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """`num_key_value_heads`, else `num_query_groups` of a group-query model, else the config's, else one a head."""
    if isinstance(args.get("num_key_value_heads"), int):
        return args["num_key_value_heads"]
    if args.get("group_query_attention") and isinstance(args.get("num_query_groups"), int):
        return args["num_query_groups"]
    return config.get("num_key_value_heads") or config.get("num_attention_heads")


def _library_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the library's config class for this model type, out of everything in the args."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = args["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"The checkpoint's model_type {model_type!r} is not known; give --hf-cfg-dir.")
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    config = {key: args[key] for key in defaults if key in args and _is_plain(args[key])}
    config["model_type"] = model_type
    config["num_hidden_layers"] = args.get("num_hidden_layers", args.get("num_layers"))
    theta = args.get("rope_theta") or args.get("rotary_base")
    if theta and "rope_parameters" in defaults:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    return config


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def _from_megatron(args: Mapping[str, Any], family: Family) -> dict[str, Any]:
    model_type = family.model_types[0]
    noops = args.get("noop_layers")
    num_noops = len(noops) if isinstance(noops, list) else len(str(noops).split(",")) if noops else 0
    layers = args.get("num_layers")
    config = {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "num_hidden_layers": layers - num_noops if isinstance(layers, int) else None,
        "hidden_size": args.get("hidden_size"),
        "intermediate_size": args.get("ffn_hidden_size"),
        "num_attention_heads": args.get("num_attention_heads"),
        "head_dim": args.get("kv_channels"),
        "vocab_size": args.get("vocab_size") or args.get("padded_vocab_size"),
        "rms_norm_eps": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.get("rotary_base") or 10000.0)},
        "num_experts": args.get("num_experts"),
        "moe_intermediate_size": args.get("moe_ffn_hidden_size"),
    }
    if "mixtral" in family.name:
        config["num_local_experts"] = config.pop("num_experts")
    return {key: value for key, value in config.items() if value is not None}
