"""LoRA+: which parameters learn faster, and that the optimizer's steps are PEFT's."""

from typing import Any

import pytest
import torch

from finerank.adapters.inject import AdapterSet, inject_adapters
from finerank.adapters.lora_plus import speed_up_B
from finerank.adapters.lu_lora import start_local_learning
from finerank.adapters.settings import AdapterSettings
from finerank.errors import ConfigError
from finerank.train.optim import build_optimizer, set_learning_rate
from finerank.train.settings import TrainSettings
from tiny import tiny_model

IDS = torch.arange(3, 40)[None]
LR = 1e-3


def sped_up(family: str = "llama", **values: Any) -> AdapterSet:
    model = tiny_model(family, num_hidden_layers=2).requires_grad_(False)
    settings = AdapterSettings(**{"lora_r": 4, "loraplus_lr_ratio": 16.0, **values})
    adapters = inject_adapters(model, settings, seed=1)
    speed_up_B(adapters, settings, lr=LR)
    return adapters


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linears": ("llama", {}, {"target_modules": "all-linear"}),
    "dora": (
        "llama",
        {"lora_target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    ),
    "embedding": (
        "llama",
        {"lora_target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "saved": (
        "llama",
        {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["model.norm", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head", "embed_tokens"]},
    ),
    "experts": (
        "mixtral",
        {"lora_target_modules": ["q_proj", "gate_up_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}
"""By name: family, our settings, PEFT's."""


@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_steps_equal_pefts_loraplus_optimizer(kind: str):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    family, settings, config = KINDS[kind]
    ours = sped_up(family, **settings)
    named_ours = dict(ours.named_parameters())
    optimizer = build_optimizer(ours.named_parameters(), TrainSettings(lr=LR), lr_ratios=ours.lr_ratios)
    theirs = get_peft_model(tiny_model(family, num_hidden_layers=2), LoraConfig(r=4, lora_alpha=32, **config))
    named = {
        n.replace(".modules_to_save.default", "").replace(".default", "").replace("_vector.weight", "_vector"): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(named) == set(named_ours)
    with torch.no_grad():
        for name, p in named_ours.items():
            named[name].copy_(p)
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16.0)
    rate = {id(p): group["lr"] for group in reference.param_groups for p in group["params"]}
    set_learning_rate(optimizer, LR)
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = next(n for n, q in named_ours.items() if q is p)
            assert group["lr"] == pytest.approx(rate[id(named[name])], rel=1e-12), name
    before = {name: p.detach().clone() for name, p in named_ours.items()}
    for _ in range(2):
        for model, one in ((ours.model, optimizer), (theirs, reference)):
            model(input_ids=IDS, labels=IDS).loss.backward()
            one.step()
            one.zero_grad()
    for name, p in named_ours.items():
        # Adam's first steps are the gradient's sign, whose tiny entries may differ
        moved = torch.stack([p - before[name], named[name] - before[name]]).flatten(1)
        assert moved[1].norm() > 0, name
        assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm(), name


def test_the_embeddings_rate_can_be_given():
    ours = sped_up(lora_target_modules=["q_proj", "embed_tokens"], loraplus_lr_embedding=5e-4)
    ratios = {name: ours.lr_ratios.get(p, 1.0) for name, p in ours.named_parameters()}
    assert {r for n, r in ratios.items() if "embed_tokens" in n} == {0.5}


def test_local_B_keeps_its_own_ratio():
    how = {"lu_lora_final_layer_index": 0, "lu_lora_rule": "feedback", "lu_lora_lr_ratio": 5.0}
    settings = AdapterSettings(lora_r=4, loraplus_lr_ratio=16.0, **how)  # type: ignore[arg-type]
    model = tiny_model("llama", num_hidden_layers=2).requires_grad_(False)
    adapters = inject_adapters(model, settings, seed=1)
    start_local_learning(adapters, settings, lr=1e-3, seed=1)
    speed_up_B(adapters, settings, lr=1e-3)
    ratios = {name: adapters.lr_ratios[layer.lora_B] for name, layer in adapters.layers.items()}
    assert {r for n, r in ratios.items() if ".layers.0." in n} == {5.0}
    assert {r for n, r in ratios.items() if ".layers.1." in n} == {16.0}


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_useless_ratios_are_refused(ratio: float):
    with pytest.raises(ConfigError, match="--loraplus-lr-ratio must be above 0"):
        sped_up(loraplus_lr_ratio=ratio)
    with pytest.raises(ConfigError, match="--loraplus-lr-embedding must be above 0"):
        sped_up(loraplus_lr_embedding=ratio, lora_target_modules=["embed_tokens", "q_proj"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loraplus_lr_ratio": None}, "has no effect without --loraplus-lr-ratio"),
        ({}, "has no effect where no embedding has a low-rank adapter"),
    ],
)
def test_a_rate_without_effect_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        sped_up(loraplus_lr_embedding=1e-5, **settings)
