"""Settings of the adapters; defaults only here."""

from dataclasses import dataclass

from finerank.config import setting

LR_DECAY_STYLES = ("cosine", "linear", "constant", "inverse-square-root", "WSD")
"""Shapes of a learning rate after the warm-up; see `train.schedule`."""


@dataclass(kw_only=True)
class LocalSettings:
    """LU-LoRA: the adapters of layers 0 to K learn by a rule that backpropagates few rows through them, or none."""

    lu_lora_final_layer_index: int | None = setting(None, help="LU-LoRA: the last local layer K, counted from 0")
    lu_lora_rule: str = setting(
        "sampled",
        choices=("feedback", "sampled", "mindspeed", "oja", "frozen"),
        help="LU-LoRA: how local layers learn; sampled backpropagates a part of the rows through them, frozen gives "
        "them no adapter",
    )
    lu_lora_r: int | None = setting(
        None, help="LU-LoRA: rank of the local adapters; default: 64 under the feedback rule, else as the others"
    )
    lu_lora_lr: float | None = setting(
        None,
        help="LU-LoRA: learning rate of local lora_A; default 1.25e-6, --lr under the feedback rule, three times --lr "
        "under the sampled rule",
    )
    lu_lora_lr_decay_style: str | None = setting(
        None,
        choices=LR_DECAY_STYLES,
        help="LU-LoRA: shape of the local learning rates after the warm-up; default: cosine under the sampled rule, "
        "else --lr-decay-style",
    )
    lu_lora_lr_ratio: float | None = setting(
        None,
        help="LU-LoRA: learning rate of local lora_B over lu_lora_lr; default 24, 3 under the feedback rule, 1 under "
        "the sampled rule",
    )
    lu_lora_sample: float | None = setting(
        None, help="LU-LoRA, sampled rule: share of a step's rows that teach the local layers; default 0.375"
    )
    lu_lora_freeze_after: int | None = setting(None, help="LU-LoRA: steps after which the local layers stop learning")
    cache_boundary: bool = setting(
        False,
        help="LU-LoRA: once the local layers no longer learn, keep on disk what leaves them, and skip them in later "
        "epochs",
    )


@dataclass(kw_only=True)
class AdapterSettings(LocalSettings):
    """LoRA: `y = W x + scale * B A x` with `scale = alpha / r` (rsLoRA: `alpha / sqrt(r)`)."""

    lora_target_modules: list[str] = setting(
        ["all-linear"],
        help="all-linear, HF names (q_proj v_proj), Megatron names (linear_qkv linear_fc1) or legacy names",
    )
    lora_modules_to_save: list[str] = setting(
        [],
        help="modules that are trained whole beside the adapters, e.g. embed_tokens lm_head",
        flags=("--modules-to-save",),
    )
    ensure_weight_tying: bool = setting(
        False, help="what is trained on a tied embedding or head changes both alike, so they stay tied"
    )
    lora_r: int = setting(16, help="rank of the adapters", flags=("--lora-rank",))
    lora_alpha: float = setting(32.0, help="scale: the change is multiplied by alpha / r")
    lora_dropout: float = setting(0.0, help="dropout on the adapters' input")
    use_rslora: bool = setting(False, help="rank-stabilised scale alpha / sqrt(r)")
    use_dora: bool = setting(False, help="DoRA: train each output feature's magnitude apart from its direction")
    lora_rank_pattern: dict[str, int] = setting({}, help="rank by module name or regular expression, e.g. down_proj=32")
    lora_alpha_pattern: dict[str, float] = setting({}, help="alpha by module name or regular expression")
    init_lora_weights: str = setting(
        "default", help="how adapters start: default, gaussian, orthogonal, pissa, pissa_niter_16, olora or eva"
    )
    eva_rho: float | None = setting(None, help="EVA: highest rank of a layer over the one it is given; default 2")
    loraplus_lr_ratio: float | None = setting(None, help="LoRA+: learning rate of lora_B over that of lora_A, e.g. 16")
    loraplus_lr_embedding: float | None = setting(
        None, help="LoRA+: learning rate of an embedding's factors; default 1e-6"
    )
    lora_load: str | None = setting(None, help="adapter to continue from, or to use", flags=("--lora-weights",))
