"""`finerank export`: every target, the preflight of each engine, and folding."""

import json
from pathlib import Path
from typing import Any

import peft as peft_library
import pytest
import torch
import transformers
from test_megatron import base_of, save
from test_megatron_lora import TARGETS, adapter_of, delta
from test_merge_folder import IDS, KINDS, make_adapter

from finerank.checkpoints.formats import hf, legacy, mcore, meta, peft
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.preflight import VLLM_RANKS, fold, preflight
from finerank.cli import main
from tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base folder, adapter folder)."""
    folder = tmp_path_factory.mktemp("case")
    save_tiny(folder / "base", "llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    base = hf.read(folder / "base")
    (folder / "adapter").mkdir()
    peft.write_adapter(adapter_of(base, TARGETS["all"], alpha=0.5), folder / "adapter")
    return folder / "base", folder / "adapter"


def export(case: tuple[Path, Path], to: str, out: Path, *flags: str) -> int:
    argv = ["export", str(case[1]), "--load", str(case[0]), "--to", to, "--save-dir", str(out), *flags]
    return main(argv)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("to", ["hf", "meta", "gguf", "mcore", "legacy"])
def test_merged_exports_load_back_to_the_same_logits(to: str, case: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["--lora-form", "merged", "--target-tensor-parallel-size", "2"] if to in ("mcore", "legacy") else []
    assert export(case, to, tmp_path / "out", *flags) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["answers"]["mean_kl"] < 1e-9 and report["to"] == to
    model = transformers.AutoModelForCausalLM.from_pretrained(case[0])
    with torch.no_grad():
        expected = peft_library.PeftModel.from_pretrained(model, case[1])(IDS).logits
    folder = tmp_path / "out"
    if to != "hf":
        source = folder / "model.gguf" if to == "gguf" else folder
        assert main(["convert", "--load-dir", str(source), "--save-dir", str(tmp_path / "hf")]) == 0
        folder = tmp_path / "hf"
    assert (logits(folder) - expected).abs().max() < 1e-4  # fp32 rounding of two different orders of summing


@pytest.mark.parametrize("to", ["peft", "mcore", "legacy", "gguf-lora"])
def test_adapter_exports_are_read_back_exactly(to: str, case: tuple[Path, Path], tmp_path: Path) -> None:
    assert export(case, to, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["num_modules"] == 28 and report["max_relative_error"] <= 1e-6


def test_an_untrained_adapter_is_status_3(case: tuple[Path, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(case[0])
    peft_library.get_peft_model(model, peft_library.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "a"
    )
    assert export((case[0], tmp_path / "a"), "peft", tmp_path / "out") == 3


def test_flags_without_effect_are_refused(case: tuple[Path, Path], tmp_path: Path) -> None:
    assert export(case, "peft", tmp_path / "out", "--target-tensor-parallel-size", "2") == 2
    assert export(case, "hf", tmp_path / "out", "--fold") == 2
    assert export(case, "gguf", tmp_path / "out", "--lora-form", "merged") == 2
    assert not (tmp_path / "out").exists()


def adapter_with(**change: Any) -> Adapter:
    base = base_of("llama")
    return adapter_of(base, ["q_proj", "v_proj"], **change)


def found(adapter: Adapter, engine: str, to: str, family: str = "llama") -> list[str]:
    return [str(f) for f in preflight(adapter, base_of(family), engine=engine, to=to)]


def test_vllm_is_told_its_limits() -> None:
    assert found(adapter_with(), "vllm", "peft") == []
    assert "--max-lora-rank 32" in found(adapter_with(rank=17), "vllm", "peft")[0]
    assert f"limit is {VLLM_RANKS[-1]}" in found(adapter_with(rank=513), "vllm", "peft")[0]
    patterned = adapter_with(rank={"q_proj": 2, "v_proj": 4}, rank_pattern={"q_proj": 2})
    assert found(patterned, "vllm", "peft")[0].startswith("ignores: rank_pattern")
    whole = adapter_with()
    whole.whole["lm_head.weight"] = torch.zeros(1)
    assert "modules saved whole" in found(whole, "vllm", "peft")[0]
    name, f = next(iter(whole.factors.items()))
    dora = Adapter({}, {name: Factors(f.a_RI, f.b_OR, f.scale, magnitude_O=f.b_OR[:, 0])})
    assert found(dora, "vllm", "peft")[0].startswith("refuses: DoRA")
    assert found(dora, "vllm", "hf") == [], "a merged model has no adapter left"
    assert found(dora, "peft", "peft") == []


def test_llama_cpp_is_told_its_limits() -> None:
    assert found(adapter_with(), "llama.cpp", "gguf-lora") == []
    head = Adapter({}, {"lm_head": Factors(torch.zeros(1, 32), torch.zeros(384, 1), 1.0)})
    assert "tied" in found(head, "llama.cpp", "gguf-lora", "llama_tied")[0]
    assert found(head, "llama.cpp", "gguf-lora", "llama") == []
    assert found(adapter_with(), "llama.cpp", "peft")[0].startswith("refuses: llama.cpp does not read peft")


def test_the_preflight_speaks_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(base_of("llama"), tmp_path / "base")
    make_adapter(tiny_model(), tmp_path / "a", **KINDS["dora"])
    assert export((base, tmp_path / "a"), "peft", tmp_path / "out", "--for", "vllm") == 2
    printed = capsys.readouterr()
    assert "vllm refuses: DoRA; export --to hf" in printed.out and "DoRA" in printed.err
    assert not (tmp_path / "out").exists()
    make_adapter(tiny_model(), tmp_path / "p", **KINDS["patterns"])
    assert export((base, tmp_path / "p"), "peft", tmp_path / "out", "--for", "vllm") == 2
    assert export((base, tmp_path / "p"), "peft", tmp_path / "out", "--for", "vllm", "--fold") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})


@pytest.mark.parametrize("kind", ["patterns", "rslora"])
def test_a_folded_adapter_is_the_same_to_peft(kind: str, tmp_path: Path) -> None:
    wrapped = make_adapter(tiny_model(), tmp_path / "a", **KINDS[kind])
    adapter = peft.read_adapter(tmp_path / "a")
    folded = fold(adapter)
    assert len({f.scale for f in folded.factors.values()}) == len({f.rank for f in folded.factors.values()}) == 1
    for name, f in adapter.factors.items():
        assert (delta(folded.factors[name]) - delta(f)).abs().max() < 1e-6
    (tmp_path / "f").mkdir()
    peft.write_adapter(folded, tmp_path / "f")
    again = peft_library.PeftModel.from_pretrained(tiny_model(), tmp_path / "f")
    with torch.no_grad():
        assert (again(IDS).logits - wrapped(IDS).logits).abs().max() < 2e-5


def test_the_formats_are_the_ones_expected() -> None:
    from finerank.checkpoints.open import formats

    assert {"hf", "peft", "mcore", "legacy", "meta", "gguf"} <= set(formats())
    for name, module in formats().items():
        assert module.__doc__ and set(module.HOLDS) <= {"base", "adapter"} and module.HOLDS, name
        assert ("base" in module.HOLDS) == hasattr(module, "read") == hasattr(module, "write")
        assert ("adapter" in module.HOLDS) == hasattr(module, "read_adapter") == hasattr(module, "write_adapter")


def test_each_folder_belongs_to_one_format(case: tuple[Path, Path], tmp_path: Path) -> None:
    from finerank.checkpoints.open import format_of, formats

    folders: dict[str, Path] = {"hf": case[0], "peft": case[1]}
    base = hf.read(case[0])
    for form in (mcore, legacy, meta):
        folder = folders[form.__name__.rsplit(".", 1)[-1]] = tmp_path / form.__name__
        folder.mkdir()
        form.write(base, folder)
    (tmp_path / "gguf").mkdir()
    formats()["gguf"].write(base, tmp_path / "gguf")
    folders["gguf"] = tmp_path / "gguf"
    (tmp_path / "empty").mkdir()
    for name, folder in folders.items():
        matching = [n for n, module in formats().items() if module.matches(folder)]
        assert matching == [name]
    assert format_of(tmp_path / "empty", "base") is None and format_of(tmp_path / "empty", "adapter") is None
