"""Which share of the machine's matrix-product rate the steps of a race reached.

    python benchmarks/tune_step.py --data rows.json --output race
    python benchmarks/roofline.py --data rows.json race.json

What a step has to compute is counted from its batches: for each token of a pack every base product once forward and
once for the input's gradient, every low-rank product once forward and twice backward; for each trained token the head
twice; for each block of attention seven products (two forward; scores again and four gradients backward). Copies of a
prompt that are shared are counted once, and nothing else. The rate is the best of products of 2,048^3 in this process;
run it on an otherwise idle machine, soon after the race. Padded peers compute more than is counted here; the share of
theirs says which part of the rate was of use.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from finerank.adapters.lora import LoRALinear  # noqa: E402
from finerank.data.batch import Batch  # noqa: E402
from finerank.models.block_attention import QUERIES_PER_BLOCK  # noqa: E402
from finerank.models.spans import Span, packed_mask, spans_of  # noqa: E402
from finerank.recipes._prepare import prepare  # noqa: E402
from finerank.recipes.tune import Settings  # noqa: E402
from finerank.train.profile import measured_peak  # noqa: E402

ATTENTION_PRODUCTS = 7


def arithmetic(model: torch.nn.Module, batch: Batch) -> float:
    """Floating-point operations that a packed micro-batch needs, forward and backward."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    num_tokens, num_trained = batch.input_ids.shape[1], int((batch.target_ids >= 0).sum())
    linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
    base = sum(2 * linear.in_features * linear.out_features for linear in linears)
    low_rank = sum(2 * linear.rank * (linear.in_features + linear.out_features) for linear in linears)
    head = 2 * config.hidden_size * config.vocab_size
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert batch.cu_seqlens is not None
    scores = sum(map(scores_of, spans_of(packed_mask(batch.cu_seqlens, batch.parents))))
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_size * scores
    return num_tokens * (2 * base + 3 * low_rank) + num_trained * 2 * head + ATTENTION_PRODUCTS * attention


def scores_of(span: Span) -> int:
    """Scores of one head in a segment, block by block; those that a block masks are computed, too."""
    total = 0
    for start in range(span.start, span.end, QUERIES_PER_BLOCK):
        num_queries = min(QUERIES_PER_BLOCK, span.end - start)
        total += num_queries * (span.num_before + start - span.start + num_queries)
    return total


def step_arithmetic(data: str, run: dict[str, str]) -> list[float]:
    """The same for each timed step of a race."""
    warm_up = int(run["warm_up"])
    settings = Settings(
        load=run["model"],
        data_path=[data],
        val_set_size=float(run["held_out"]),
        seq_length=int(run["seq_length"]),
        global_batch_size=int(run["global_batch_size"]),
        lora_r=int(run["rank"]),
        seed=int(run["seed"]),
        train_iters=warm_up + int(run["steps"]) + 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        parts = prepare(settings, Path(folder), say=lambda _: None)
        steps = range(warm_up, warm_up + int(run["steps"]))
        return [sum(arithmetic(parts.loaded.model, b) for b in parts.plan.micro_batches(step)) for step in steps]


def main() -> None:
    """A line for each contestant of each race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("races", nargs="+", type=Path, help="what tune_step.py wrote")
    parser.add_argument("--data", required=True, help="the rows of the races")
    args = parser.parse_args()
    peaks: dict[torch.dtype, float] = {}
    for path in args.races:
        race = json.loads(path.read_text(encoding="utf-8"))
        run = race["arguments"]
        torch.set_num_threads(int(run["threads"]))
        needed = step_arithmetic(args.data, run)
        for row in race["rows"]:
            dtype = torch.float32 if "fp32" in row["setup"] else torch.bfloat16
            if dtype not in peaks:
                peaks[dtype] = max(measured_peak(dtype, torch.device("cpu"), most_seconds=2.0) for _ in range(4))
            seconds = row["step_seconds"][int(run["warm_up"]) :]
            shares = sorted(flops / (s * peaks[dtype]) for flops, s in zip(needed, seconds, strict=True))
            print(
                f"{path.stem}: {row['setup']}: {statistics.median(shares):.1%} ({shares[0]:.1%} to {shares[-1]:.1%}) "
                f"of {peaks[dtype] / 1e9:.0f} GFLOP/s, {statistics.mean(needed) / 1e12:.2f} TFLOP a step"
            )


if __name__ == "__main__":
    main()
