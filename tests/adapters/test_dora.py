"""DoRA against PEFT: outputs, gradients, files both ways, merging; and what it refuses."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import AdapterSet, inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError
from finerank.train.optim import build_optimizer
from finerank.train.settings import TrainSettings
from tiny import tiny_model

IDS = torch.arange(3, 40)[None]


def adapted(family: str = "qwen2", **settings: object) -> AdapterSet:
    """Qwen2 has biases on q, k and v, which the magnitude must not touch."""
    model = tiny_model(family).requires_grad_(False)
    chosen = AdapterSettings(**{"lora_r": 4, "use_dora": True, **settings})  # type: ignore[arg-type]
    return inject_adapters(model, chosen, seed=1)


def shake(adapters: AdapterSet) -> AdapterSet:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return adapters


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_fresh_adapter_changes_nothing():
    torch.testing.assert_close(logits(adapted().model), logits(tiny_model("qwen2")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_pefts(rslora: bool):
    ours = shake(adapted(use_rslora=rslora))
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", use_dora=True, use_rslora=rslora)
    theirs = get_peft_model(tiny_model("qwen2"), config)
    named = {n.replace(".default", "").removesuffix(".weight"): p for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            named[name.removesuffix(".weight")].copy_(p)
    torch.testing.assert_close(logits(ours.model), logits(theirs), rtol=1e-4, atol=1e-5)
    for model in (ours.model, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert sum(name.endswith("magnitude_vector") for name, _ in ours.named_parameters()) == 14
    for name, p in ours.named_parameters():
        wanted = named[name.removesuffix(".weight")].grad
        assert p.grad is not None and p.grad.any()
        torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_peft_reads_our_file_and_we_read_pefts(tmp_path: Path, family: str):
    ours = shake(adapted(family))
    save_adapter(ours, tmp_path / "ours", base_model_name="tiny")
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(ours.model), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tiny_model(family), tmp_path / "theirs")
    for key, tensor in ours.state().items():
        assert torch.equal(tensor, again.state()[key]), key
    torch.testing.assert_close(logits(again.model), logits(ours.model), rtol=0, atol=0)


def test_merged_weights_give_the_same_outputs():
    adapters = shake(adapted())
    before = logits(adapters.model)
    adapters.merge_()
    torch.testing.assert_close(logits(adapters.model), before, rtol=1e-4, atol=1e-4)
    assert (before - logits(tiny_model("qwen2"))).abs().max() > 0.1


def test_norm_follows_the_factors_through_training():
    adapters = shake(adapted())
    optimizer = build_optimizer(adapters.named_parameters(), TrainSettings(lr=1e-2))  # type: ignore[call-arg]
    for _ in range(3):
        adapters.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(adapters.model)
    fresh = adapted()
    with torch.no_grad():
        for (_, p), (_, q) in zip(fresh.named_parameters(), adapters.named_parameters(), strict=True):
            p.copy_(q)
    torch.testing.assert_close(logits(fresh.model), trained, rtol=1e-5, atol=1e-6)


def test_local_layers_are_refused():
    with pytest.raises(ConfigError, match="--use-dora and --lu-lora-final-layer-index exclude each other"):
        adapted(lu_lora_final_layer_index=0)


def test_config_and_tensors_must_agree(tmp_path: Path):
    save_adapter(shake(adapted()), tmp_path, base_model_name="tiny")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterError, match=r"use_dora in .* and the tensors"):
        load_adapter(tiny_model("qwen2"), tmp_path)
