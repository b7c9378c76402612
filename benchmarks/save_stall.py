"""How long saving checkpoints holds training up: no saves, saves at once, saves in the background, by turns.

    python benchmarks/save_stall.py --output benchmarks/results/save_stall

One real `finerank tune` (default model, rank 16 on all linears) whose loop changes its way of saving every ten steps,
so that whatever else happens on the machine happens to all three. All rows have the same number of tokens, so that all
steps are the same work. A block is ten steps with a save in their middle; what the save still needs at the end is
counted to the last step. The first round is warm-up. On a machine that others use, single blocks differ by more than
what is looked for; so each of the ten steps of a block is taken from the round in which it was quickest, too, and these
are added up.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS_A_BLOCK, SAVED_AFTER = 10, 5
WAYS = ("none", "at once", "background")


def main() -> None:
    """Run, print the table, write it with all single times to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of each way that are timed")
    parser.add_argument("--rows-a-step", type=int, default=2)
    parser.add_argument("--words-a-row", type=int, default=40)
    parser.add_argument("--output", type=Path, help="file name without ending: .md and .json are written")
    args = parser.parse_args()
    blocks, bytes_a_save = measure(args)
    text = table(blocks, bytes_a_save)
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
        args.output.with_suffix(".json").write_text(json.dumps({"blocks": blocks}, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """(way, seconds of each step, seconds that each save held the loop up) of each timed block; size of a save."""
    from finerank.recipes import tune
    from finerank.train import loop

    blocks: list[dict[str, Any]] = []

    class TimedLoop(loop.TrainLoop):
        """Changes its way of saving with each block."""

        held: list[float]
        marks: list[float]

        def way(self, step: int) -> str:
            return WAYS[(step - 1) // STEPS_A_BLOCK % len(WAYS)]

        def _train_step(self) -> None:
            if self.state.step % STEPS_A_BLOCK == 0:
                self.saver.background = self.way(self.state.step + 1) == "background"
                self.held, self.marks = [], [time.perf_counter()]
            super()._train_step()

        def _save_is_due(self) -> bool:
            step = self.state.step
            return step % STEPS_A_BLOCK == SAVED_AFTER and self.way(step) != "none"

        def _save(self) -> None:
            start = time.perf_counter()
            super()._save()
            self.held.append(time.perf_counter() - start)

        def _finish_step(self, row: dict[str, Any]) -> None:
            super()._finish_step(row)
            step = self.state.step
            if step and step % STEPS_A_BLOCK == 0:
                self.saver.wait()
            if step:
                self.marks.append(time.perf_counter())
            if step and step % STEPS_A_BLOCK == 0:
                seconds = [b - a for a, b in itertools.pairwise(self.marks)]
                blocks.append({"way": self.way(step), "step_seconds": seconds, "held_up_seconds": self.held})

    loop.TrainLoop = TimedLoop  # type: ignore[misc]
    num_steps = STEPS_A_BLOCK * len(WAYS) * (args.rounds + 1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = Path(folder) / "rows.jsonl"
        words = " ".join(["low rank"] * (args.words_a_row // 2))
        made = [{"instruction": f"Say number {number}.", "output": words} for number in range(1000, 1300)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        settings = tune.Settings(
            load=args.load,
            data_path=[str(rows)],
            output_dir=str(Path(folder) / "run"),
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
    """Medians over blocks, and sums of the quickest of each step, each beside the blocks without saves."""
    rounds = [blocks[i : i + len(WAYS)] for i in range(0, len(blocks), len(WAYS))]
    lines = [
        f"{bytes_a_save / 2**20:.0f} MiB a checkpoint, a save every {STEPS_A_BLOCK} steps, {len(rounds)} blocks of "
        f"{STEPS_A_BLOCK} steps each way",
        "",
        "| saving | s/step (median block) | slower (median block, range) | s/step (quickest steps) | slower (quickest "
        "steps) | a save holds the loop up for (median) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    seconds = [[sum(r[way]["step_seconds"]) for r in rounds] for way in range(len(WAYS))]
    quickest = [sum(map(min, zip(*(r[way]["step_seconds"] for r in rounds), strict=True))) for way in range(len(WAYS))]
    for way, name in enumerate(WAYS):
        ratios = [a / b - 1 for a, b in zip(seconds[way], seconds[0], strict=True)]
        held = [s for r in rounds for s in r[way]["held_up_seconds"]]
        cells = [
            name,
            f"{statistics.median(seconds[way]) / STEPS_A_BLOCK:.3f}",
            f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%})" if way else "",
            f"{quickest[way] / STEPS_A_BLOCK:.3f}",
            f"{quickest[way] / quickest[0] - 1:+.1%}" if way else "",
            f"{statistics.median(held):.3f} s" if held else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
