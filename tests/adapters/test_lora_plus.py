"""LoRA+: which parameters learn faster, and that the optimizer's steps are PEFT's."""

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


def adapted(**settings: object) -> AdapterSet:
    model = tiny_model("llama", num_hidden_layers=2).requires_grad_(False)
    return inject_adapters(model, AdapterSettings(lora_r=4, **settings), seed=1)  # type: ignore[arg-type]


def test_steps_equal_pefts_loraplus_optimizer():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    ours = adapted()
    speed_up_B(ours, 16.0)
    optimizer = build_optimizer(ours.named_parameters(), TrainSettings(lr=1e-3), lr_ratios=ours.lr_ratios)  # type: ignore[call-arg]
    theirs = get_peft_model(
        tiny_model("llama", num_hidden_layers=2), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    )
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            named[name].copy_(p)
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    for _ in range(3):
        for model, one in ((ours.model, optimizer), (theirs, reference)):
            model(input_ids=IDS, labels=IDS).loss.backward()
            if one is optimizer:
                set_learning_rate(one, 1e-3)
            one.step()
            one.zero_grad()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-3, atol=2e-4, msg=name)
    plain = adapted()
    assert not any(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_local_B_keeps_its_own_ratio():
    settings = AdapterSettings(lora_r=4, lu_lora_final_layer_index=0, lu_lora_lr_ratio=5.0)  # type: ignore[call-arg]
    model = tiny_model("llama", num_hidden_layers=2).requires_grad_(False)
    adapters = inject_adapters(model, settings, seed=1)
    start_local_learning(adapters, settings, lr=1e-3, seed=1)
    speed_up_B(adapters, 16.0)
    ratios = {name: adapters.lr_ratios[layer.lora_B] for name, layer in adapters.layers.items()}
    assert {r for n, r in ratios.items() if ".layers.0." in n} == {5.0}
    assert {r for n, r in ratios.items() if ".layers.1." in n} == {16.0}


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_useless_ratios_are_refused(ratio: float):
    with pytest.raises(ConfigError, match="--loraplus-lr-ratio must be above 0"):
        speed_up_B(adapted(), ratio)
