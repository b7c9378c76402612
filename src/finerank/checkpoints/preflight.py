"""What an engine would refuse or silently get wrong about an adapter, found before anything is written.

    for finding in preflight(adapter, base, engine="vllm", to="peft"): print(finding)

Facts of the engines, with where they come from:

* vLLM (vllm/lora/peft_helper.py, vllm/config/lora.py): refuses DoRA and modules_to_save; `--max-lora-rank` is 16 unless
  raised, and takes 1, 8, 16, 32, 64, 128, 256, 320, 512; scales every module by the config's own alpha and r, so
  rank_pattern and alpha_pattern are ignored; knows rsLoRA.
* llama.cpp (convert_lora_to_gguf.py, src/llama-adapter.cpp): one alpha a file, divided by each module's own rank; no
  DoRA, no whole modules, no embeddings; an `output.weight` must exist, so no adapter on a tied head.
* PEFT: reads all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.regroup import lora_config, scaled
from finerank.checkpoints.weights import BaseModel
from finerank.errors import AdapterError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ENGINES = ("vllm", "llama.cpp", "peft")
_ADAPTER_TARGETS = ("peft", "gguf-lora")


@dataclass(frozen=True)
class Finding:
    """One thing an engine does not take as it is."""

    kind: str
    """`refuses`, `ignores` (silently computes something else), or `needs` (a flag of the engine)."""
    what: str
    fix: str
    is_foldable: bool = False
    """`--fold` mends it."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}; {self.fix}"


def preflight(adapter: Adapter, base: BaseModel, *, engine: str, to: str) -> list[Finding]:
    """Findings for an engine (one of `ENGINES`) that is to load the export `to`; empty when it takes everything."""
    if to not in _ADAPTER_TARGETS or engine == "peft":
        return list(_wrong_file(engine, to))
    findings = list(_wrong_file(engine, to))
    findings += _vllm(adapter) if engine == "vllm" else _llama_cpp(adapter, base)
    return findings


def _wrong_file(engine: str, to: str) -> Iterator[Finding]:
    takes = {"vllm": ("peft", "hf"), "llama.cpp": ("gguf-lora", "gguf"), "peft": ("peft", "hf")}[engine]
    if to not in takes:
        yield Finding("refuses", f"{engine} does not read {to}", f"export --to {' or '.join(takes)}")


def _vllm(adapter: Adapter) -> Iterator[Finding]:
    if adapter.is_dora:
        yield Finding("refuses", "DoRA", "export --to hf, which merges it")
    if adapter.whole or adapter.config.get("modules_to_save"):
        yield Finding("refuses", "modules saved whole (modules_to_save, biases)", "export --to hf, which merges them")
    if adapter.rows:
        yield Finding("refuses", "rows of new tokens (trainable_token_indices)", "export --to hf, which merges them")
    if any(f.is_embedding for f in adapter.factors.values()):
        yield Finding("refuses", "adapters on embeddings", "export --to hf, which merges them")
    if any(f.num_experts for f in adapter.factors.values()):
        yield Finding("refuses", "adapters on fused experts (target_parameters)", "export --to hf, which merges them")
    scales = {f.scale for f in adapter.factors.values()}
    ranks = {f.rank for f in adapter.factors.values()}
    if len(scales) > 1 or len(ranks) > 1 or adapter.config.get("alpha_pattern") or adapter.config.get("rank_pattern"):
        yield Finding(
            "ignores", "rank_pattern and alpha_pattern, so modules would get a wrong scale", "give --fold", True
        )
    rank = max(ranks, default=0)
    if rank > VLLM_RANKS[-1]:
        yield Finding("refuses", f"rank {rank}, its limit is {VLLM_RANKS[-1]}", "export --to hf, which merges it")
    elif rank > 16:
        needed = next(r for r in VLLM_RANKS if r >= rank)
        yield Finding("needs", f"rank {rank} is over its default of 16", f"start vLLM with --max-lora-rank {needed}")


def _llama_cpp(adapter: Adapter, base: BaseModel) -> Iterator[Finding]:
    if adapter.is_dora:
        yield Finding("refuses", "DoRA", "export --to gguf, which merges it")
    if adapter.whole:
        yield Finding("refuses", "modules saved whole (modules_to_save, biases)", "export --to gguf, which merges them")
    if adapter.rows:
        yield Finding("refuses", "rows of new tokens (trainable_token_indices)", "export --to gguf, which merges them")
    if any(f.is_embedding for f in adapter.factors.values()):
        yield Finding("refuses", "adapters on embeddings", "export --to gguf, which merges them")
    if any(f.num_experts for f in adapter.factors.values()):
        yield Finding("refuses", "adapters on fused experts (target_parameters)", "export --to gguf, which merges them")
    if "lm_head" in adapter.factors and base.is_tied:
        yield Finding("refuses", "an adapter on a head that is tied to the embedding", "export --to gguf")


def blocking(findings: list[Finding], *, fold: bool) -> list[Finding]:
    """The findings that make an export useless for the engine."""
    return [f for f in findings if f.kind != "needs" and not (fold and f.is_foldable)]


def fold(adapter: Adapter) -> Adapter:
    """The same change with one rank and one alpha for all modules, without patterns or rsLoRA.

    Smaller ranks are filled with zeros; scales other than the common one go into lora_B (exact for powers of two,
    otherwise one rounding in fp32).
    """
    if fused := [name for name, f in adapter.factors.items() if f.num_experts]:
        raise AdapterError(f"--fold cannot change {fused[0]}, whose experts are fused; merge the adapter instead.")
    rank = max(f.rank for f in adapter.factors.values())
    scales = [f.scale for f in adapter.factors.values()]
    common = max(set(scales), key=scales.count)
    alpha = common * rank
    scale = alpha / rank
    factors = {name: _fold_one(f, rank, scale) for name, f in adapter.factors.items()}
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = {**lora_config(rank, alpha, factors), **adapter.config, **plain, "r": rank, "lora_alpha": alpha}
    if float(alpha).is_integer():
        config["lora_alpha"] = int(alpha)
    return replace(adapter, config=config, factors=factors)


def _fold_one(f: Factors, rank: int, scale: float) -> Factors:
    folded = scaled(f.b_OR, f.scale / scale)
    a = f.a_RI.new_zeros(rank, f.a_RI.shape[1])
    b = folded.new_zeros(folded.shape[0], rank)
    a[: f.rank] = f.a_RI
    b[:, : f.rank] = folded
    return replace(f, a_RI=a, b_OR=b, scale=scale)
