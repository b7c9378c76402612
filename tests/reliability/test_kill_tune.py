"""SIGKILL at random instants of `finerank tune` on a tiny model, and `--resume auto`: the same adapter comes out.

Here the whole program is killed, preprocessing, loading and the last files included; `test_kill_loop` does the same
to the loop alone, far more often.
"""

import json
import random
import signal
from pathlib import Path

import children
import pytest

from finerank import cli
from finerank.checkpoints import native
from finerank.files import sha256_file
from finerank.train.metrics import read_metrics

WAYS = {
    "packed": ["--lora-dropout", "0.1"],
    "padded": ["--no-pack", "--micro-batch-size", "3"],
    "packed-async": ["--async-save", "--lora-target-modules", "linear_qkv", "linear_fc2"],
    "padded-async": ["--no-pack", "--async-save", "--lora-dropout", "0.1"],
    "lu-lora": ["--lu-lora-final-layer-index", "0", "--lu-lora-freeze-after", "9"],
    "lu-lora-oja-padded-async": [
        "--lu-lora-final-layer-index",
        "0",
        "--lu-lora-rule",
        "oja",
        "--no-pack",
        "--async-save",
    ],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 31)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    argv = ["tune", "--load", str(base), "--data-path", str(rows), "--output-dir", str(run), "--resume", "auto"]
    argv += ["--dtype", "fp32", "--device", "cpu", "--seq-length", "96", "--lora-r", "4", "--log-interval", "1000"]
    argv += ["--num-epochs", "2.5", "--global-batch-size", "6", "--micro-batch-tokens", "256", "--val-set-size", "4"]
    argv += ["--save-interval", "2", "--eval-interval", "4", "--lr", "0.01", *flags]
    return cli.main(argv)


def outcome(run: Path) -> tuple[str, list[dict]]:
    timed = ("step_seconds", "peak_memory_bytes")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run / "metrics.jsonl")]
    return sha256_file(run / "adapter_model.safetensors"), rows


def check(tmp_path: Path, base: Path, rows: Path, way: str, *, kills: int, seed: int) -> None:
    unbroken = tmp_path / "unbroken"
    assert children.finish(children.start(tune, base, rows, unbroken, *WAYS[way])) == 0
    expected, rng, hits = outcome(unbroken), random.Random(f"{way} {seed}"), 0
    for i in range(10 * kills):
        run = tmp_path / str(i)
        while hits < kills:
            child = children.start(tune, base, rows, run, *WAYS[way])
            child.join(rng.uniform(0.05, 1.0))
            child.kill()
            if (code := children.finish(child)) == 0:
                break
            assert code == -signal.SIGKILL
            hits += 1
        if hits >= kills:
            assert children.finish(children.start(tune, base, rows, run, *WAYS[way])) == 0
        assert outcome(run) == expected, f"run {i}"
        assert native.newest_whole(run, say=pytest.fail) is not None
        assert not [p for p in run.iterdir() if "aside" in p.name or p.name == "run.lock"]
        if hits >= kills:
            return
    raise AssertionError(f"only {hits} kills hit a living run")


@pytest.mark.parametrize("way", WAYS)
def test_killed_anywhere_and_resumed_gives_the_same_adapter(
    tmp_path: Path, tiny_folder: Path, rows: Path, way: str
) -> None:
    check(tmp_path, tiny_folder, rows, way, kills=4, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("way", WAYS)
def test_killed_50_times_each_way_and_resumed_gives_the_same_adapter(
    tmp_path: Path, tiny_folder: Path, rows: Path, way: str, part: int
) -> None:
    check(tmp_path, tiny_folder, rows, way, kills=10, seed=2 + part)


def test_the_whole_program_stops_and_goes_on(tmp_path: Path, tiny_folder: Path, rows: Path) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert children.finish(children.start(tune, tiny_folder, rows, unbroken, *WAYS["packed"])) == 0
    child = children.start(tune, tiny_folder, rows, run, *WAYS["packed"])
    children.wait_for(child, lambda: len(read_metrics(run / "metrics.jsonl")) >= 3)
    child.terminate()
    assert children.finish(child) == 143
    assert not (run / "results.json").exists()
    assert children.finish(children.start(tune, tiny_folder, rows, run, *WAYS["packed"])) == 0
    assert outcome(run) == outcome(unbroken)
