"""Model families as facts: which Hugging Face tensors make which Megatron tensor, and how ranks share it.

    family = family_of(config)                 # by config.json's model_type
    for rule in family.layer_rules: rule.megatron, rule.hf, rule.packing, rule.split

One table of rules per family drives Megatron conversion both ways, the grouping of LoRA targets, tensor parallelism and
pipeline stages. A family is a file in this folder with `FAMILY`; the folder is the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finerank import registry
from finerank.errors import ConfigError, ModelError, unknown_name

PACKAGE = __name__
Packing = Literal["plain", "qkv", "gate_up"]
Split = Literal["column", "row", None]


@dataclass(frozen=True)
class TensorRule:
    """One Megatron module and the Hugging Face modules it is made of.

    Names are relative to a layer (`decoder.layers.{l}.` and `model.layers.{l}.`); `{expert}` stands for an expert's
    number, counted over all expert-parallel ranks.
    """

    megatron: str
    hf: tuple[str, ...]
    packing: Packing = "plain"
    """`qkv`: rows of each key-value group together (its queries, key, value). `gate_up`: gate rows, then up rows."""
    split: Split = None
    """`column`: ranks share the rows of the weight (dim 0). `row`: the columns (dim 1). None: every rank has all."""
    suffixes: tuple[str, ...] = (".weight",)
    """Tensors of the module; those that a model lacks are skipped."""

    @property
    def is_expert(self) -> bool:
        """There is one such module for each expert."""
        return "{expert}" in self.megatron


@dataclass(frozen=True)
class Family:
    """What there is to know about a family of models."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    layer_rules: tuple[TensorRule, ...]
    aliases: tuple[str, ...] = ()
    """Further names for `--model-type-hf`."""

    def rule_of(self, hf_module: str) -> TensorRule | None:
        """The rule that a Hugging Face module within a layer belongs to, e.g. `self_attn.q_proj`."""
        for rule in self.layer_rules:
            if hf_module in rule.hf:
                return rule
        return None

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Megatron's name of each linear -> its Hugging Face modules, last parts only; experts left out.

        >>> family_named("llama").groups()["linear_qkv"]
        ('q_proj', 'k_proj', 'v_proj')
        """
        return {
            rule.megatron.rsplit(".", 1)[-1]: tuple(name.rsplit(".", 1)[-1] for name in rule.hf)
            for rule in self.layer_rules
            if rule.split is not None and not rule.is_expert
        }


@dataclass(frozen=True)
class Dims:
    """The sizes that packing and splitting need."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 0


def families() -> dict[str, Family]:
    """Every family by name."""
    return {name: registry.load(PACKAGE, name, "model family").FAMILY for name in registry.names(PACKAGE)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config. Raises ModelError when there is no facts file for it."""
    model_type = str(config.get("model_type"))
    for family in families().values():
        if model_type in family.model_types:
            return family
    known = [t for f in families().values() for t in f.model_types]
    raise ModelError(f"{unknown_name('model_type', model_type, known)} A family is added as one file of facts.")


def family_named(name: str) -> Family:
    """The family of a `--model-type-hf` name: llama2, llama3, qwen25, qwen3-moe, ... Raises ConfigError."""
    wanted = name.lower().replace("-", "_")
    for family in families().values():
        if wanted in (family.name, *family.model_types, *family.aliases):
            return family
    known = [n for f in families().values() for n in (f.name, *f.aliases)]
    raise ConfigError(f"--model-type-hf: {unknown_name('model family', name, known)}")


def dims_of(config: Mapping[str, Any]) -> Dims:
    """Sizes from a Hugging Face config. Raises ModelError naming what is missing or does not divide."""
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    for key in needed:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json gives {key} = {value!r}; it must be a whole number above 0.")
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ModelError(f"num_attention_heads ({heads}) is not divisible by num_key_value_heads ({groups}).")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    return Dims(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        num_experts=experts,
    )
