"""How long saving checkpoints holds training up: no saves, saves at once, saves in the background, by turns.

    python benchmarks/save_stall.py --output benchmarks/results/save_stall

One real `finerank tune` (default model, rank 16 on all linears, rows that ship with finerank) whose loop changes its
way of saving every ten steps, so that whatever else happens on the machine happens to all three. A block is ten steps
with two saves; the time that its last save still needs at the end is counted to it, so that blocks in the background
are charged more than in a run that goes on. The first round is warm-up.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

STEPS_A_BLOCK, INTERVAL = 10, 5
WAYS = ("none", "at once", "background")


def main() -> None:
    """Run, print the table, write it with all single times to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each way that are timed")
    parser.add_argument("--rows-a-step", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--output", type=Path, help="file name without ending: .md and .json are written")
    args = parser.parse_args()
    blocks, bytes_a_save = measure(args)
    text = table(blocks, bytes_a_save)
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
        args.output.with_suffix(".json").write_text(json.dumps({"blocks": blocks}, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """(way, seconds of the block, seconds that each save held the loop up) of each timed block; size of a save."""
    from finerank.recipes import tune
    from finerank.train import loop

    blocks: list[dict[str, Any]] = []

    class TimedLoop(loop.TrainLoop):
        """Changes its way of saving with each block."""

        held: list[float]
        began = 0.0

        def way(self, step: int) -> str:
            return WAYS[(step - 1) // STEPS_A_BLOCK % len(WAYS)]

        def _train_step(self) -> None:
            if self.state.step % STEPS_A_BLOCK == 0:
                self.saver.background = self.way(self.state.step + 1) == "background"
                self.held, self.began = [], time.perf_counter()
            super()._train_step()

        def _save_is_due(self) -> bool:
            step = self.state.step
            return step > 0 and step % INTERVAL == 0 and self.way(step) != "none"

        def _save(self) -> None:
            start = time.perf_counter()
            super()._save()
            self.held.append(time.perf_counter() - start)

        def _finish_step(self, row: dict[str, Any]) -> None:
            super()._finish_step(row)
            step = self.state.step
            if step and step % STEPS_A_BLOCK == 0:
                self.saver.wait()
                seconds = time.perf_counter() - self.began
                blocks.append({"way": self.way(step), "seconds": seconds, "held_up_seconds": self.held})

    loop.TrainLoop = TimedLoop  # type: ignore[misc]
    num_steps = STEPS_A_BLOCK * len(WAYS) * (args.rounds + 1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = resources.files("finerank.data").joinpath("bundled/about_finerank.json")
        settings = tune.Settings(
            load=args.load,
            data_path=[str(rows)],
            output_dir=str(Path(folder) / "run"),
            seq_length=args.seq_length,
            global_batch_size=args.rows_a_step,
            train_iters=num_steps,
            save_interval_minutes=0.0,
            tune_runtime=False,
            log_interval=1000,
        )
        tune.run(settings)
        checkpoint = max(Path(folder, "run").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime_ns)
        bytes_a_save = sum(path.stat().st_size for path in checkpoint.iterdir())
    return blocks[len(WAYS) :], bytes_a_save


def table(blocks: list[dict[str, Any]], bytes_a_save: int) -> str:
    """Medians, and the slow-down of each block beside the block without saves of the same round."""
    rounds = [blocks[i : i + len(WAYS)] for i in range(0, len(blocks), len(WAYS))]
    lines = [
        f"{bytes_a_save / 2**20:.0f} MiB a checkpoint, a save every {INTERVAL} steps, {len(rounds)} blocks of "
        f"{STEPS_A_BLOCK} steps each way",
        "",
        "| saving | s/step (median) | slower than without (median, range) | a save holds the loop up for (median) |",
        "| --- | --- | --- | --- |",
    ]
    for index, way in enumerate(WAYS):
        own = [blocks_of_round[index] for blocks_of_round in rounds]
        ratios = [r[index]["seconds"] / r[0]["seconds"] - 1 for r in rounds]
        held = [seconds for block in own for seconds in block["held_up_seconds"]]
        step = statistics.median(block["seconds"] for block in own) / STEPS_A_BLOCK
        slower = f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%})" if index else ""
        lines.append(f"| {way} | {step:.3f} | {slower} | {f'{statistics.median(held):.3f} s' if held else ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
