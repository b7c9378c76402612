"""SIGKILL at random instants of a run over the fakes, again and again until it is through: the same bytes come out.

The network is tiny and the steps short, so that kills fall into steps, evaluations, saves and the moments between.
"""

import random
import signal
import time
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


def kill_until_done(run: Path, rng: random.Random, *, kills: int, **settings) -> int:
    """Kill up to `kills` times at random instants, then let it finish; returns how many kills fell into the loop."""
    hits = 0
    for _ in range(kills):
        (run / "run.lock").unlink(missing_ok=True)
        child = children.start(children.fake_run, str(run), **SETTINGS, **settings)
        children.wait_for(child, (run / "run.lock").exists)  # it is imported and begins
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        killed = children.finish(child) == -signal.SIGKILL
        rows = read_metrics(run / "metrics.jsonl")
        hits += killed and bool(rows) and rows[-1]["step"] < STEPS
    assert children.finish(children.start(children.fake_run, str(run), **SETTINGS, **settings)) == 0
    return hits


def check(tmp_path: Path, *, runs: int, kills: int, background: bool, seed: int) -> None:
    unbroken = tmp_path / "unbroken"
    assert children.finish(children.start(children.fake_run, str(unbroken), **SETTINGS, async_save=background)) == 0
    expected, rng, hits = outcome(unbroken), random.Random(seed), 0
    for i in range(runs):
        run = tmp_path / str(i)
        hits += kill_until_done(run, rng, kills=kills, async_save=background, seconds_per_save=0.001)
        assert outcome(run) == expected, f"run {i}"
        assert not [p for p in run.iterdir() if "aside" in p.name or p.name == "run.lock"]
    assert hits >= runs * kills // 3, f"only {hits} kills fell into the loop; change the steps' length"


@pytest.mark.parametrize("background", [False, True])
def test_killed_anywhere_and_resumed_is_bit_equal(tmp_path: Path, background: bool) -> None:
    check(tmp_path, runs=5, kills=2, background=background, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("background", [False, True])
def test_killed_200_times_and_resumed_is_bit_equal(tmp_path: Path, background: bool) -> None:
    check(tmp_path, runs=50, kills=4, background=background, seed=2)
