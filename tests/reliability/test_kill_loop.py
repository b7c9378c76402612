"""SIGKILL at random instants of a run over the fakes, again and again until it is through: the same bytes come out.

The network is tiny and the steps short, so that kills fall into steps, evaluations, saves and the moments between.
"""

import random
import signal
from pathlib import Path

import children
import pytest

from finerank.checkpoints import native
from finerank.train.metrics import read_metrics

STEPS = 12
SETTINGS = {"num_steps": STEPS, "save_interval": 2, "eval_interval": 3, "seconds_per_batch": 0.002}


def outcome(run: Path) -> tuple[bytes, list[dict]]:
    """The final state's tensors and the metrics without times."""
    folder = native.folder_of(run, STEPS)
    timed = ("step_seconds", "peak_memory_bytes")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run / "metrics.jsonl")]
    return (folder / "state.safetensors").read_bytes(), rows


def kill_until_done(run: Path, rng: random.Random, **settings) -> int:
    """Kill a run at random instants, and start it again, until it gets through; how many kills fell into the loop."""
    hits = 0
    while True:
        (run / "run.lock").unlink(missing_ok=True)
        child = children.start(children.fake_run, str(run), **SETTINGS, **settings)
        children.wait_for(child, (run / "run.lock").exists)  # it begins
        child.join(rng.uniform(0.0, 0.25))
        child.kill()
        if (code := children.finish(child)) == 0:
            return hits
        assert code == -signal.SIGKILL
        rows = read_metrics(run / "metrics.jsonl")
        hits += bool(rows) and rows[-1]["step"] < STEPS


def check(tmp_path: Path, *, kills: int, background: bool, seed: int) -> None:
    """Runs are killed until `kills` have fallen into a loop; each must come out like the unbroken one."""
    unbroken = tmp_path / "unbroken"
    assert children.finish(children.start(children.fake_run, str(unbroken), **SETTINGS, async_save=background)) == 0
    expected, rng, hits = outcome(unbroken), random.Random(seed), 0
    for i in range(10 * kills):
        run = tmp_path / str(i)
        hits += kill_until_done(run, rng, async_save=background, seconds_per_save=0.001)
        assert outcome(run) == expected, f"run {i}"
        assert not [p for p in run.iterdir() if "aside" in p.name or p.name == "run.lock"]
        if hits >= kills:
            return
    raise AssertionError(f"only {hits} kills fell into the loop; lengthen the steps")


@pytest.mark.parametrize("background", [False, True])
def test_killed_anywhere_and_resumed_is_bit_equal(tmp_path: Path, background: bool) -> None:
    check(tmp_path, kills=10, background=background, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("background", [False, True])
def test_killed_200_times_and_resumed_is_bit_equal(tmp_path: Path, background: bool, part: int) -> None:
    check(tmp_path, kills=40, background=background, seed=2 + part)
