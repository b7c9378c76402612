"""Adapters trained over a quantised base merge onto the weights that training computed with."""

from pathlib import Path

import pytest
import torch
import yaml
from test_megatron import base_of, save
from test_megatron_lora import TARGETS, adapter_of, delta
from transformers import AutoModelForCausalLM

from finerank.checkpoints.formats import hf, peft
from finerank.checkpoints.quantized_base import as_trained, bits_of_run, dtype_of_run, save_dequantized
from finerank.checkpoints.weights import same_bits
from finerank.cli import main
from finerank.models.load import load_model
from finerank.models.settings import ModelSettings

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_those_of_the_loaded_model(bits: int, tmp_path: Path) -> None:
    folder = save(base_of("llama"), tmp_path / "base")
    base = as_trained(hf.read(folder), bits)
    loaded = load_model(ModelSettings(load=str(folder), load_4bit=bits == 4, load_8bit=bits == 8, dtype="bf16")).model
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    num_packed = 0
    for name in base.weights:
        module = loaded.get_submodule(name.removesuffix(".weight"))
        if hasattr(module, "dequantized_weight"):
            assert same_bits(base.weights[name], module.dequantized_weight())
            assert not same_bits(base.weights[name], plain[name])
            num_packed += 1
        else:
            assert same_bits(base.weights[name], plain[name]), name
    assert num_packed == 14


def test_a_run_says_its_precision(tmp_path: Path) -> None:
    assert bits_of_run(tmp_path) is None
    for key, bits in (("load_4bit", 4), ("load_8bit", 8)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({key: True}))
        assert bits_of_run(tmp_path) == bits


def test_merging_takes_the_trained_base_unless_told_otherwise(tmp_path: Path) -> None:
    folder = save(base_of("llama", dtype=torch.float32), tmp_path / "base")
    base = hf.read(folder)
    adapter = adapter_of(base, TARGETS["all"], alpha=0.1)
    (tmp_path / "run").mkdir()
    peft.write_adapter(adapter, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"load_8bit": True}))
    name = "model.layers.1.mlp.up_proj"
    for precision, source in (("trained", as_trained(base, 8)), ("original", base)):
        out = tmp_path / precision
        argv = ["merge", "--load", str(folder), "--lora-load", str(tmp_path / "run"), "--save-dir", str(out)]
        assert main([*argv, "--base-precision", precision]) == 0
        expected = source.weights[f"{name}.weight"].double() + delta(adapter.factors[name])
        assert (hf.read(out).weights[f"{name}.weight"] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_training_read_in_another_precision(bits: int, tmp_path: Path) -> None:
    """fp32 files, a bf16 run: what is merged onto are the run's bf16 weights, to the bit, not fp32's own rounding."""
    folder = save(base_of("llama", dtype=torch.float32), tmp_path / "base")
    loaded = load_model(ModelSettings(load=str(folder), load_4bit=bits == 4, load_8bit=bits == 8, dtype="bf16")).model
    name = "model.layers.1.mlp.down_proj"
    trained = loaded.get_submodule(name).dequantized_weight()
    got = as_trained(hf.read(folder), bits, torch.bfloat16).weights[f"{name}.weight"]
    assert got.dtype == torch.float32 and torch.equal(got, trained.float())
    assert not torch.equal(as_trained(hf.read(folder), bits).weights[f"{name}.weight"], got)


def test_a_run_says_its_dtype(tmp_path: Path) -> None:
    assert dtype_of_run(tmp_path) is None
    (tmp_path / "results.json").write_text('{"base_dtype": "bfloat16"}')
    (tmp_path / "config.yaml").write_text("dtype: auto\n")
    assert dtype_of_run(tmp_path) == torch.bfloat16
    (tmp_path / "config.yaml").write_text("dtype: fp32\n")
    assert dtype_of_run(tmp_path) == torch.float32
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "results.json").write_text("[torn")
    assert dtype_of_run(tmp_path) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_the_saved_dequantised_base_is_what_training_computed_with(bits: int, tmp_path: Path) -> None:
    folder = save(base_of("llama", dtype=torch.float32), tmp_path / "base")
    (tmp_path / "run").mkdir()
    saved = save_dequantized(tmp_path / "run", str(folder), bits, torch.bfloat16)
    flags = {"load_4bit": bits == 4, "load_8bit": bits == 8}
    trained = load_model(ModelSettings(load=str(folder), dtype="bf16", **flags)).model
    plain = AutoModelForCausalLM.from_pretrained(saved)
    assert plain.dtype == torch.bfloat16
    for name, tensor in plain.state_dict().items():
        module = trained.get_submodule(name.rpartition(".")[0])
        wanted = module.dequantized_weight() if hasattr(module, "dequantized_weight") else module.weight
        assert same_bits(tensor, wanted.detach()), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, trained(input_ids=ids).logits)
