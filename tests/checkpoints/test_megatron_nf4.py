"""Megatron checkpoints whose linears are packed in NF4, made here with bitsandbytes' own QuantState.as_dict."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_megatron import base_of
from test_megatron_lora import TARGETS, adapter_of, delta

from finerank.checkpoints.formats import hf, mcore
from finerank.checkpoints.megatron import Target
from finerank.checkpoints.weights import same_bits
from finerank.cli import main
from finerank.errors import CheckpointError

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
functional = bitsandbytes.functional
STATE = "quant_state.bitsandbytes__nf4"


def pack_linears(folder: Path, *, base_layer: bool = False, nested: bool = True) -> None:
    """Pack every decoder linear of each rank as the original converter does, in place; plain torch files."""
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        for key in [k for k in content if k.startswith("model")]:
            content[key] = {
                name: tensor
                for old, value in content[key].items()
                for name, tensor in _packed(old, value, base_layer=base_layer, nested=nested).items()
            }
        torch.save(content, path)


def _packed(name: str, value: Any, *, base_layer: bool, nested: bool) -> dict[str, Any]:
    if not (isinstance(value, torch.Tensor) and value.dim() == 2 and ".linear_" in name):
        return {name: value}
    if base_layer:
        name = name.removesuffix(".weight") + ".base_layer.weight"
    packed, state = functional.quantize_4bit(value, compress_statistics=nested, quant_type="nf4")
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Packed and unpacked in rows of one block, which every version of bitsandbytes gets right."""
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    state.shape = torch.Size((weight.numel() // 64, 64))
    return functional.dequantize_4bit(packed, state).view(weight.shape)


def unpacked_reference(folder: Path) -> dict[Path, dict[str, torch.Tensor]]:
    """Every rank's linears, packed and unpacked by bitsandbytes."""
    found = {}
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        found[path] = {
            name: dequantized(w)
            for name, w in content["model"].items()
            if isinstance(w, torch.Tensor) and w.dim() == 2 and ".linear_" in name
        }
    return found


@pytest.fixture(params=[{"tp": 1}, {"tp": 2, "pp": 2}], ids=["tp1", "tp2pp2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    mcore.write(base_of("llama", hidden_size=64), tmp_path / "mg", target=Target(**request.param))
    return tmp_path / "mg"


@pytest.mark.parametrize("base_layer", [False, True])
def test_packed_shards_read_as_their_dequantised_tensors(folder: Path, base_layer: bool, tmp_path: Path) -> None:
    """The same checkpoint with each shard dequantised by bitsandbytes in place gives the same tensors, all of them."""
    reference = unpacked_reference(folder)
    pack_linears(folder, base_layer=base_layer)
    packed = mcore.read(folder)
    got = {name: packed.weights[name] for name in packed.weights}
    for path, tensors in reference.items():
        content = torch.load(path, weights_only=False)
        content["model"] = {k: v for k, v in content["model"].items() if ".linear_" not in k} | tensors
        torch.save(content, path)
    plain = mcore.read(folder)
    assert set(got) == set(plain.weights)
    assert sum(".mlp." in name or ".self_attn." in name for name in got) == 14
    for name in plain.weights:
        assert packed.weights.info(name) == plain.weights.info(name)
        assert same_bits(got[name], plain.weights[name]), name


def test_without_double_quantisation(folder: Path) -> None:
    whole = {name: tensor.clone() for name, tensor in _all(folder).items()}
    pack_linears(folder, nested=False)
    name = "model.layers.0.mlp.down_proj.weight"
    error = (_all(folder)[name].float() - whole[name].float()).abs()
    assert 0 < error.max() <= 0.17 * whole[name].float().abs().max()  # half of NF4's widest gap


def _all(folder: Path) -> dict[str, torch.Tensor]:
    weights = mcore.read(folder).weights
    return {name: weights[name] for name in weights}


def test_converts_and_takes_an_adapter(folder: Path, tmp_path: Path) -> None:
    pack_linears(folder)
    base = mcore.read(folder)
    argv = ["convert", "--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(folder)]
    assert main([*argv, "--save-dir", str(tmp_path / "hf")]) == 0
    converted = hf.read(tmp_path / "hf")
    for name in base.weights:
        assert same_bits(converted.weights[name], base.weights[name]), name
    from finerank.checkpoints.formats import peft

    adapter = adapter_of(base, TARGETS["all"], alpha=0.1)
    (tmp_path / "adapter").mkdir()
    peft.write_adapter(adapter, tmp_path / "adapter")
    argv = ["merge", "--load", str(folder), "--lora-load", str(tmp_path / "adapter"), "--proof", "weights"]
    assert main([*argv, "--save-dir", str(tmp_path / "merged")]) == 0
    name = "model.layers.1.mlp.up_proj"
    wanted = (base.weights[f"{name}.weight"].double() + delta(adapter.factors[name])).to(torch.bfloat16)
    assert same_bits(hf.read(tmp_path / "merged").weights[f"{name}.weight"], wanted)


@pytest.mark.parametrize("damage", ["lost", "short", "json", "shape", "blocks", "table"])
def test_damaged_parts_are_one_sentence(tmp_path: Path, damage: str) -> None:
    mcore.write(base_of("llama", hidden_size=64), tmp_path / "mg", target=Target())
    pack_linears(tmp_path / "mg")
    path = next((tmp_path / "mg").rglob("model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    model = content["model"]
    name = next(k for k in model if k.endswith("linear_proj.weight"))
    if damage == "lost":
        del model[f"{name}.absmax"]
    elif damage == "short":
        model[f"{name}.absmax"] = model[f"{name}.absmax"][:-1].clone()
    elif damage == "json":
        model[f"{name}.{STATE}"] = torch.zeros(9, dtype=torch.uint8)
    elif damage == "shape":
        facts = json.loads(bytes(model[f"{name}.{STATE}"].tolist()))
        facts["shape"] = [1 << 40, 1 << 40]
        model[f"{name}.{STATE}"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    elif damage == "blocks":
        facts = json.loads(bytes(model[f"{name}.{STATE}"].tolist()))
        facts["blocksize"] = 128
        model[f"{name}.{STATE}"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    else:
        model[f"{name}.quant_map"] = torch.zeros(16)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="NF4") as caught:
        _all(tmp_path / "mg")
    assert "\n" not in str(caught.value)
