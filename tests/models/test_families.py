"""Family facts against the library: every tensor of every family's model has exactly one place in its table."""

import re
from pathlib import Path

import pytest

from finerank.checkpoints.formats import hf
from finerank.errors import ConfigError, ModelError
from finerank.models.families import dims_of, families, family_named, family_of
from tiny import FAMILIES, save_tiny

OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_families_are_the_ones_expected() -> None:
    assert set(families()) >= {"llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe"}
    for name, family in families().items():
        assert family.name == name and family.model_types


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_library_has_one_place(family: str, tmp_path: Path) -> None:
    model = hf.read(save_tiny(tmp_path, family))
    facts = family_of(model.config)
    for name in set(model.weights) - OUTSIDE:
        match = re.fullmatch(r"model\.layers\.\d+\.(.+)(\.weight|\.bias)", name)
        assert match, name
        module = re.sub(r"experts\.\d+", "experts.{expert}", match[1])
        rules = [r for r in facts.layer_rules if module in r.hf]
        assert len(rules) == 1 and match[2] in rules[0].suffixes, name
        assert facts.rule_of(module) is rules[0]
    assert len({r.megatron for r in facts.layer_rules}) == len(facts.layer_rules)


def test_groups_name_the_linears_that_share_an_input() -> None:
    assert family_named("llama3").groups() == {
        "linear_qkv": ("q_proj", "k_proj", "v_proj"),
        "linear_proj": ("o_proj",),
        "linear_fc1": ("gate_proj", "up_proj"),
        "linear_fc2": ("down_proj",),
    }


@pytest.mark.parametrize(
    "alias,name", [("llama2", "llama"), ("qwen25", "qwen2"), ("qwen3-moe", "qwen3_moe"), ("gemma3", "gemma3")]
)
def test_names_of_other_programs(alias: str, name: str) -> None:
    assert family_named(alias).name == name


def test_unknown_families_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        family_named("qwen33")
    with pytest.raises(ModelError, match="falcon"):
        family_of({"model_type": "falcon"})


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"vocab_size": 0}, {"num_key_value_heads": 3}])
def test_sizes_that_are_wrong_are_named(change: dict[str, object]) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "vocab_size": 10}
    assert dims_of(config).head_dim == 2
    with pytest.raises(ModelError, match=next(iter(change))):
        dims_of({**config, **change})
