"""Has the step become slower? Its time over that of a plain path in the same process, held against the stored ratio.

    python benchmarks/guard.py              compare; exit status 1 when more than 10% is lost
    python benchmarks/guard.py --store      keep the ratio of this machine in results/guard.json

The plain path is PEFT on transformers' own modules, one row at a time, with all logits: what a loop of a few lines
does. Both tune the same random model of SmolLM2's layer shapes on the same rows, by turns; the median of the ratios
counts, so it does not matter how fast the machine is, nor much what else it does. No downloads.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

from tune_step import cpu_name  # noqa: E402

if TYPE_CHECKING:
    from finerank.data.batch import Batch

STORED = HERE / "results" / "guard.json"
MOST_LOST = 0.10
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 2e-4
NUM_ROWS, SYSTEM_TOKENS, PROMPT_TOKENS = 16, 24, 30

Rows = list[tuple[Tensor, Tensor]]
"""(ids [T], labels [T]) of each row."""


def make_model(num_layers: int, vocab_size: int = 49152) -> nn.Module:
    """SmolLM2-135M's shapes with fewer layers, random, bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=576, intermediate_size=1536, num_hidden_layers=num_layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).train()


def make_rows() -> Rows:
    """Rows that begin with one system prompt, 70 to 430 tokens long, trained on their answers."""
    generator = torch.Generator().manual_seed(1)
    system = torch.randint(1, 49152, (SYSTEM_TOKENS,), generator=generator)
    rows = []
    for length in torch.linspace(70, 430, NUM_ROWS).long().tolist():
        ids = torch.cat([system, torch.randint(1, 49152, (length - SYSTEM_TOKENS,), generator=generator)])
        labels = ids.clone()
        labels[: SYSTEM_TOKENS + PROMPT_TOKENS] = -100
        rows.append((ids, labels))
    return rows


def plain_step(rows: Rows, num_layers: int) -> Callable[[], float]:
    """A step of PEFT on transformers' modules; returns the loss."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make_model(num_layers), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    trained = sum(int((labels[1:] != -100).sum()) for _, labels in rows)

    def losses() -> Iterator[Tensor]:
        for ids, labels in rows:
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
            yield nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / trained

    return _step_of([p for p in model.parameters() if p.requires_grad], losses)


def _step_of(parameters: list[nn.Parameter], losses: Callable[[], Iterable[Tensor]]) -> Callable[[], float]:
    """Backward over all losses and AdamW; returns their sum."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def step() -> float:
        total = 0.0
        for loss in losses():
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


class _Rows:
    """What the batches read; see `finerank.data.tokens.TokenDataset`."""

    def __init__(self, rows: Rows):
        self._rows = [(ids.numpy(), labels.numpy()) for ids, labels in rows]

    def sequences(self, i: int) -> list:
        return [self._rows[i]]


def finerank_parts(
    num_layers: int, vocab_size: int = 49152
) -> tuple[nn.Module, list[nn.Parameter], Callable[["Batch"], Tensor]]:
    """The random model with adapters as `finerank tune` sets it up, what is trained, and the loss of a micro-batch."""
    from finerank.adapters.inject import inject_adapters
    from finerank.adapters.settings import AdapterSettings
    from finerank.models.attention import use_packed_attention
    from finerank.models.forward import verified_head
    from finerank.models.fused.fuse import fuse
    from finerank.train.held_out import batch_loss_sum

    model = make_model(num_layers, vocab_size)
    use_packed_attention(model)  # type: ignore[arg-type]
    fuse(model)
    adapters = inject_adapters(model, AdapterSettings(lora_r=RANK, lora_alpha=ALPHA), seed=1)  # type: ignore[arg-type]
    verified_head(model)  # type: ignore[arg-type]
    parameters = [p for p in adapters.parameters() if p.requires_grad]
    return model, parameters, lambda batch: batch_loss_sum(model, batch)  # type: ignore[arg-type]


def finerank_step(rows: Rows, num_layers: int) -> Callable[[], float]:
    """A step as `finerank tune` takes it; returns the loss."""
    from finerank.data.loader import packed_batch
    from finerank.data.packing import best_fit

    _, parameters, loss_of = finerank_parts(num_layers)
    packs = best_fit([len(ids) - SYSTEM_TOKENS for ids, _ in rows], 2048 - SYSTEM_TOKENS)
    batches = [packed_batch(_Rows(rows), pack, share=True) for pack in packs]  # type: ignore[arg-type]
    trained = sum(batch.num_trained_tokens for batch in batches)
    return _step_of(parameters, lambda: (loss_of(batch) / trained for batch in batches))


def measure(num_layers: int, repeats: int) -> list[float]:
    """Plain time over ours, `repeats` times after one of warm-up, by turns."""
    rows = make_rows()
    steps = [plain_step(rows, num_layers), finerank_step(rows, num_layers)]
    ratios = []
    for i in range(repeats + 1):
        seconds, losses = [], []
        for step in steps:
            started = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - started)
        if abs(losses[0] - losses[1]) > 0.02 * losses[0]:
            sys.exit(f"the two paths do not learn the same: losses {losses[0]:.4f} and {losses[1]:.4f} in step {i}")
        print(f"plain {seconds[0]:.2f} s, finerank {seconds[1]:.2f} s{' (warm-up)' if i == 0 else ''}", file=sys.stderr)
        if i > 0:
            ratios.append(seconds[0] / seconds[1])
    return ratios


def machine(threads: int) -> str:
    """What a ratio belongs to."""
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__.partition('+')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="layers of the random model")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each path, after one of warm-up")
    parser.add_argument("--store", action="store_true", help="keep the ratio as this machine's")
    parser.add_argument("--stored", type=Path, default=STORED, help="where ratios are kept")
    args = parser.parse_args()
    ratio = statistics.median(ratios := measure(args.layers, args.repeats))
    name = f"{machine(torch.get_num_threads())}, {args.layers} layers"
    stored = json.loads(args.stored.read_text()) if args.stored.is_file() else {}
    print(f"{ratio:.2f} times as fast as the plain path ({min(ratios):.2f}-{max(ratios):.2f}) on {name}")
    if args.store:
        args.stored.write_text(json.dumps({**stored, name: round(ratio, 3)}, indent=2, sort_keys=True) + "\n")
        return 0
    if name not in stored:
        print("there is no ratio of this machine to hold it against; --store keeps this one")
        return 0
    lost = 1 - ratio / stored[name]
    print(f"stored: {stored[name]:.2f}; {'lost' if lost > 0 else 'gained'} {abs(lost):.0%}")
    return 1 if lost > MOST_LOST else 0


if __name__ == "__main__":
    sys.exit(main())
