"""Does a trained token cost the same whatever the data's size, the rows, the step and the vocabulary? And what memory?

    python benchmarks/flatness.py --output results/flatness               every axis, a process for each point
    python benchmarks/flatness.py --axes length vocabulary --rounds 2     the axes by turns, the fastest step counts

data         rows of the data set: 100 to 100,000; `finerank tune` itself, from a JSON file of rows, 16 a step
length       tokens of each row: 128 to 8,192; micro-batches of 8,192 tokens; attention is timed apart
batch        rows of a step: 8 to 128 of 128 tokens; micro-batches of 1,024 tokens
vocabulary   49,152 to 262,144 words; micro-batches of 2,048 tokens; the peak is without the vocabulary's own weights
budget       tokens of a micro-batch: 1,024 to 4,096, which is what memory may depend on

The model is random, of SmolLM2-135M's layer shapes with fewer layers, in bf16. With OMP_NUM_THREADS=1 times are of
the CPU for this process alone, so that what else the machine does hardly counts; else the clock's. With --output
each point is kept as soon as it is there, and the next call goes on with those that are missing. Prints tables.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

from tune_step import cpu_name  # noqa: E402

from finerank.files import replace_file  # noqa: E402
from finerank.models.runtime import best_environment  # noqa: E402

AXES: dict[str, tuple[int, ...]] = {
    "data": (100, 1_000, 10_000, 100_000),
    "length": (128, 512, 2_048, 8_192),
    "batch": (8, 32, 128),
    "vocabulary": (49_152, 131_072, 262_144),
    "budget": (1_024, 2_048, 4_096),
}
UNITS = {
    "data": "rows of data",
    "length": "tokens a row",
    "batch": "rows a step",
    "vocabulary": "words",
    "budget": "tokens a micro-batch",
}
LAYERS, VOCABULARY, SMALL_VOCABULARY = 4, 49_152, 16_384
WITH_PARTS = ("length", "vocabulary")
Point = dict[str, float]


def clock() -> float:
    """Seconds: of the CPU where there is one thread, else of the clock."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_mib() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tuned(num_rows: int, steps: int, tokenizer: str) -> Point:
    """`finerank tune` on so many rows, in this process."""
    from finerank.recipes._prepare import prepare
    from finerank.recipes.tune import Settings, make_loop

    with tempfile.TemporaryDirectory() as folder:
        data, config, run = Path(folder) / "rows.json", Path(folder) / "config.json", Path(folder) / "run"
        write_rows(data, num_rows)
        config.write_text(json.dumps(smollm2_shape()))
        settings = Settings(
            model_config=str(config), dtype="bf16", tokenizer_name_or_path=tokenizer, data_path=[str(data)],
            data_cache=False, seq_length=512, train_iters=steps + 1, global_batch_size=16, output_dir=str(run),
        )  # fmt: skip
        loop = make_loop(prepare(settings, run, say=print))
        seconds: list[float] = []

        @contextlib.contextmanager
        def timed(step: int) -> Iterator[None]:
            started = clock()
            yield
            assert loop.state.pending is not None
            seconds.append((clock() - started) / loop.state.pending["trained_tokens"])

        loop.around_step = timed
        loop.run()
    return {"milliseconds_per_token": 1e3 * min(seconds[1:]), "peak_mib": peak_mib()}


def smollm2_shape() -> dict[str, Any]:
    """config.json of the model that `guard.make_model` makes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    }  # fmt: skip


def write_rows(path: Path, num_rows: int) -> None:
    """Instruction rows that all differ, about 250 tokens each, of which about 200 are trained."""
    draw = random.Random(0)
    words = ["river", "stone", "light", "seven", "garden", "paper", "winter", "signal", "copper", "window", "engine"]
    with path.open("w") as file:
        for i in range(num_rows):
            question, answer = (" ".join(draw.choices(words, k=n)) for n in (30, 200))
            row = {"instruction": f"{i}: {question}?", "output": answer}
            file.write(("[" if i == 0 else ",\n") + json.dumps(row))
        file.write("]\n")


def stepped(axis: str, value: int, steps: int) -> Point:
    """Steps of the parts that `finerank tune` is made of, in this process."""
    import numpy as np
    import torch
    from guard import finerank_parts

    from finerank.data.loader import BatchPlan
    from finerank.data.settings import BatchSettings
    from finerank.data.tokens import Source, TokenDataset
    from finerank.train.profile import times_by_part

    budget = {"budget": value, "length": 8_192, "batch": 1_024, "vocabulary": 2_048}[axis]
    length = value if axis == "length" else 128
    rows = {"budget": 2 * budget // length, "length": budget // length, "batch": value, "vocabulary": budget // length}[
        axis
    ]
    vocabulary = value if axis == "vocabulary" else SMALL_VOCABULARY
    model, parameters, loss_of = finerank_parts(LAYERS, vocabulary)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    num_rows = rows * (steps + 2)
    ids = np.random.default_rng(0).integers(1, vocabulary, num_rows * length, dtype=np.int32)
    starts = np.arange(num_rows) * length
    data = TokenDataset(
        [Source(ids, ids)], np.zeros(num_rows, np.int64), starts, starts, np.full(num_rows, length), longest=length
    )
    settings = BatchSettings(global_batch_size=rows, micro_batch_tokens=budget)
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
        started = clock()
        trained = step(number)
        seconds.append(clock() - started)
    found = {"milliseconds_per_token": 1e3 * min(seconds) / trained, "peak_mib": peak_mib() - weights / 2**20}
    if axis not in WITH_PARTS:
        return found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as watched:
        step(steps + 1)
    parts, _ = times_by_part(list(watched.events() or ()), low_rank=48, on_gpu=False)
    shares = {name: parts[name] / sum(parts.values()) for name in ("attention", "head")}
    whole = found["milliseconds_per_token"]
    return found | {"without_attention": whole * (1 - shares["attention"]), "head": whole * shares["head"]}


def environment() -> dict[str, str]:
    """That of a run of `finerank tune`."""
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **best_environment(), "PYTHONPATH": path}


def point(axis: str, value: int, args: argparse.Namespace) -> Point:
    """One point, measured in a process of its own."""
    command = [sys.executable, __file__, "--point", axis, str(value), "--steps", str(args.steps)]
    command += ["--tokenizer", args.tokenizer]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{axis} {value} failed; its last words:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def table(axis: str, found: dict[str, list[Point]]) -> str:
    """A Markdown table of an axis: the fastest round's time and the largest peak of each point."""
    has_parts = axis in WITH_PARTS
    names = ["milliseconds_per_token"] + ["without_attention", "head"] * has_parts
    heads = [UNITS[axis], "ms a trained token", "x the first"]
    heads += ["without attention", "x the first", "head alone", "x the first"] * has_parts + ["peak, MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    first: Point | None = None
    for value, rounds in found.items():
        row = min(rounds, key=lambda each: each["milliseconds_per_token"])
        first = first or row
        cells = [f"{int(value):,}"]
        for name in names:
            cells += [f"{row[name]:.3f}", f"{row[name] / first[name]:.2f}"]
        cells.append(f"{max(each['peak_mib'] for each in rounds):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save(results: dict[str, Any], output: Path) -> None:
    """All points and their tables."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(output.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n")
    tables = (f"## {axis}\n\n{table(axis, found)}" for axis, found in results["axes"].items())
    output.with_suffix(".md").write_text("\n".join(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warm-up; the fastest counts")
    parser.add_argument("--rounds", type=int, default=1, help="times that each point is measured")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="of 49,152 words, for the data axis")
    parser.add_argument("--most", type=int, help="points to measure in this call; default: all that are missing")
    parser.add_argument("--output", type=Path, help="where results go as .json and .md")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        axis, value = args.point[0], int(args.point[1])
        is_tuned = axis == "data"
        found = tuned(value, args.steps, args.tokenizer) if is_tuned else stepped(axis, value, args.steps)
        print(json.dumps(found))
        return
    stored = args.output.with_suffix(".json") if args.output else None
    results: dict[str, Any] = json.loads(stored.read_text()) if stored and stored.is_file() else {"axes": {}}
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    results |= {"cpu": cpu_name(), "threads": threads, "steps": args.steps, "date": date.today().isoformat()}
    wanted = [(axis, value) for _ in range(args.rounds) for axis in args.axes for value in AXES[axis]]
    measured = 0
    for i, (axis, value) in enumerate(wanted):
        rounds = results["axes"].setdefault(axis, {}).setdefault(str(value), [])
        if len(rounds) > wanted[:i].count((axis, value)):
            continue
        if measured == args.most:
            break
        rounds.append(point(axis, value, args))
        measured += 1
        print(axis, value, json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        if args.output:
            save(results, args.output)
    results["axes"] = {axis: {v: r for v, r in found.items() if r} for axis, found in results["axes"].items()}
    for axis, found in results["axes"].items():
        print(f"\n{table(axis, found)}")


if __name__ == "__main__":
    main()
