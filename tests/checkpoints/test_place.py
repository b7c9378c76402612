"""An adapter of any format goes on in a running model: Megatron's give the answers of PEFT's."""

from pathlib import Path

import pytest
import torch

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.place import adapter_digest, is_megatron, lacks_alpha, place_adapter
from finerank.cli import main
from finerank.errors import CheckpointError
from tiny import save_tiny, tiny_model

IDS = torch.arange(48).reshape(2, 24) * 7 % 384


def exported(folder: Path, family: str, to: str, *split: str, **settings: object) -> torch.Tensor:
    """Base and random adapter in `folder`, the adapter in Megatron's form in `folder/m`; logits with the adapter."""
    save_tiny(folder / "base", family)
    model = tiny_model(family).requires_grad_(False)
    adapters = inject_adapters(model, AdapterSettings(lora_r=4, lora_alpha=8, **settings), seed=1)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    save_adapter(adapters, folder / "a", base_model_name=str(folder / "base"))
    flags = ["--load", str(folder / "base"), "--lora-load", str(folder / "a"), "--save-dir", str(folder / "m")]
    assert main(["export", *flags, "--to", to, *split]) == 0
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]),
        ("qwen3", ["q_proj", "v_proj", "down_proj"]),
        ("mixtral", ["linear_qkv", "gate_up_proj", "down_proj"]),
        ("qwen3_moe", ["q_proj", "gate_up_proj", "down_proj"]),
    ],
)
@pytest.mark.parametrize("to", ["mcore", "legacy"])
def test_megatrons_adapters_run_and_go_on(tmp_path: Path, family: str, targets: list[str], to: str) -> None:
    split = ["--target-tensor-parallel-size", "2"]
    wanted = exported(tmp_path, family, to, *split, lora_target_modules=targets)
    assert is_megatron(tmp_path / "m") and not is_megatron(tmp_path / "a") and not lacks_alpha(tmp_path / "m")
    model = tiny_model(family)
    adapters = place_adapter(model, tmp_path / "m", trainable=True)
    with torch.no_grad():
        assert (model(IDS).logits - wanted).abs().max() < 2e-5
    assert all(p.requires_grad for p in adapters.parameters())
    save_adapter(adapters, tmp_path / "b", base_model_name="tiny")  # what was read can be saved and read again
    again = tiny_model(family)
    load_adapter(again, tmp_path / "b")
    with torch.no_grad():
        assert (again(IDS).logits - wanted).abs().max() < 2e-5


def test_modules_that_share_A_there_share_it_here(tmp_path: Path) -> None:
    exported(tmp_path, "llama", "mcore", lora_target_modules=["linear_qkv", "linear_fc1"])
    layers = place_adapter(tiny_model("llama"), tmp_path / "m", trainable=True).layers
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert layers[f"{attention}.q_proj"].lora_A is layers[f"{attention}.v_proj"].lora_A
    assert layers[f"{mlp}.gate_proj"].lora_A is layers[f"{mlp}.up_proj"].lora_A
    assert layers[f"{attention}.q_proj"].lora_A is not layers[f"{mlp}.up_proj"].lora_A


def test_digests_follow_the_weights(tmp_path: Path) -> None:
    for name, target in (("one", "linear_qkv"), ("other", "linear_proj")):
        (tmp_path / name).mkdir()
        exported(tmp_path / name, "llama", "mcore", lora_target_modules=[target])
    one, other = (adapter_digest(tmp_path / name / "m") for name in ("one", "other"))
    assert one != other and one == adapter_digest(tmp_path / "one" / "m")
    assert adapter_digest(tmp_path / "one" / "a") != adapter_digest(tmp_path / "other" / "a")


def test_an_alpha_that_is_not_recorded_must_come_from_the_flag(tmp_path: Path) -> None:
    wanted = exported(tmp_path, "llama", "mcore", lora_target_modules=["linear_qkv"])
    path = next((tmp_path / "m").rglob("*.pt"))
    content = torch.load(path, weights_only=False)  # our own file
    args = vars(content["args"]) if hasattr(content["args"], "__dict__") else content["args"]
    del args["lora_alpha"], args["finerank_lora"]
    torch.save(content, path)
    (tmp_path / "m" / "checksums.json").unlink(missing_ok=True)
    assert lacks_alpha(tmp_path / "m")
    model = tiny_model("llama")
    place_adapter(model, tmp_path / "m", lora_alpha=8)
    with torch.no_grad():
        assert (model(IDS).logits - wanted).abs().max() < 2e-5


def test_a_base_without_adapter_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    flags = ["--load-dir", str(tmp_path / "base"), "--save-dir", str(tmp_path / "m"), "--save-model-type", "mg"]
    assert main(["convert", *flags]) == 0
    with pytest.raises(CheckpointError, match="holds no adapter"):
        place_adapter(tiny_model("llama"), tmp_path / "m")
