"""Does a trained token cost the same whatever the size of the data, the rows and the vocabulary? And what memory?

    python benchmarks/flatness.py                       all three, a process for each point
    python benchmarks/flatness.py --axes length vocabulary --output results/flatness

data         rows of the data set: 100 to 100,000, the same step of 16 rows
length       tokens of each row: 128 to 8,192, the same number of tokens a step; attention is timed apart
vocabulary   49,152 to 262,144 words, the same rows; the memory is without the vocabulary's own weights

The model is random, of SmolLM2-135M's layer shapes with fewer layers. Prints tables.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

from finerank.models.runtime import ENVIRONMENT  # noqa: E402

AXES: dict[str, tuple[int, ...]] = {
    "data": (100, 1_000, 10_000, 100_000),
    "length": (128, 512, 2_048, 8_192),
    "vocabulary": (49_152, 131_072, 262_144),
}
BUDGET, LAYERS = 2_048, 4


def point(axis: str, value: int, steps: int) -> dict[str, float]:
    """One point, in this process."""
    import numpy as np
    import torch
    from guard import finerank_parts

    from finerank.data.loader import BatchPlan
    from finerank.data.settings import BatchSettings
    from finerank.data.tokens import Source, TokenDataset
    from finerank.train.profile import times_by_part

    vocabulary = value if axis == "vocabulary" else 49_152
    length = value if axis == "length" else 256
    num_rows = value if axis == "data" else 128
    model, parameters, loss_of = finerank_parts(LAYERS, vocabulary)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        # tokens lie on disk as those of a real run do
        ids = np.lib.format.open_memmap(Path(folder) / "ids.npy", mode="w+", dtype=np.int32, shape=(num_rows * length,))
        draw = np.random.default_rng(0)
        for start in range(0, len(ids), 1 << 22):
            ids[start : start + (1 << 22)] = draw.integers(1, vocabulary, min(1 << 22, len(ids) - start))
        starts = np.arange(num_rows) * length
        data = TokenDataset(
            [Source(ids, ids)], np.zeros(num_rows, np.int64), starts, starts, np.full(num_rows, length), longest=length
        )
        rows = max(1, 2 * BUDGET // length)
        settings = BatchSettings(global_batch_size=rows, micro_batch_tokens=max(BUDGET, length))
        plan = BatchPlan(data, settings, seed=1, num_steps=steps + 2, pad_token_id=0)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def step(number: int) -> int:
            trained = 0
            for batch in plan.micro_batches(number):
                loss_of(batch).backward()
                trained += batch.num_trained_tokens
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return trained

        step(0)
        seconds, trained = [], 0
        for number in range(1, steps + 1):
            started = time.perf_counter()
            trained = step(number)
            seconds.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the profiler, which needs some
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as watched:
            step(steps + 1)
        parts, _ = times_by_part(list(watched.events() or ()), low_rank=48, on_gpu=False)
    best = min(seconds)
    return {
        "value": value,
        "milliseconds_per_token": 1e3 * best / trained,
        "without_attention": 1e3 * best * (1 - parts["attention"] / sum(parts.values())) / trained,
        "peak_without_weights_mib": (peak - weights) / 2**20,
    }


def run(axis: str, value: int, steps: int) -> dict[str, float]:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, "--point", axis, str(value), "--steps", str(steps)]
    environment = {**os.environ, **ENVIRONMENT}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def table(axis: str, found: list[dict[str, float]]) -> str:
    """A Markdown table."""
    lines = [
        f"| {axis} | ms a trained token | x the first | without attention | x the first | peak less weights, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first = found[0]
    for row in found:
        cells = [f"{row['value']:,.0f}"]
        for name in ("milliseconds_per_token", "without_attention"):
            cells += [f"{row[name]:.3f}", f"{row[name] / first[name]:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['peak_without_weights_mib']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warm-up; the fastest counts")
    parser.add_argument("--output", type=Path, help="where results go as .json and .md")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(args.point[0], int(args.point[1]), args.steps)))
        return
    results: dict[str, Any] = {}
    for axis in args.axes:
        results[axis] = [run(axis, value, args.steps) for value in AXES[axis]]
        print(table(axis, results[axis]), flush=True)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text("\n".join(table(axis, results[axis]) for axis in results))


if __name__ == "__main__":
    main()
