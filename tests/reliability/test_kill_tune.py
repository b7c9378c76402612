"""SIGKILL at random instants of `finerank tune` on a tiny model, and `--resume auto`: the same weights come out.

Here the whole program is killed, preprocessing, loading and the last files included; `test_kill_loop` does the same
to the loop alone, far more often. Half of the kills fall at any time, the others are aimed into one part of the run.
With `-s` each test says into which parts its kills fell.
"""

import collections
import json
import os
import random
import signal
from pathlib import Path

import children
import pytest
from moments import PARTS, Moments

from finerank import cli
from finerank.checkpoints import native
from finerank.checkpoints.checksums import check_checksums
from finerank.files import sha256_file
from finerank.train.metrics import read_metrics

LU = ["--lu-lora-final-layer-index", "0"]
WAYS = {
    "packed": ["--lora-dropout", "0.1"],
    "padded": ["--no-pack", "--micro-batch-size", "3"],
    "packed-async": ["--async-save", "--lora-target-modules", "linear_qkv", "linear_fc2"],
    "padded-async": ["--no-pack", "--async-save", "--lora-dropout", "0.1"],
    "lu-lora": [*LU, "--lu-lora-freeze-after", "9"],
    "lu-lora-async": [*LU, "--async-save"],
    "lu-lora-padded": [*LU, "--lu-lora-rule", "mindspeed", "--lu-lora-lr", "1e-3", "--no-pack"],
    "lu-lora-oja-padded-async": [*LU, "--lu-lora-rule", "oja", "--no-pack", "--async-save"],
}
METHODS = {
    "boundary-cache": [*LU, "--lu-lora-rule", "frozen", "--cache-boundary"],
    "boundary-cache-later": [*LU, "--lu-lora-freeze-after", "3", "--cache-boundary", "--no-pack", "--async-save"],
    "dora-loraplus": ["--use-dora", "--loraplus-lr-ratio", "4"],
    "pissa": ["--init-lora-weights", "pissa", "--async-save"],
    "eva": ["--init-lora-weights", "eva", "--eva-rho", "2"],
    "olora-early-stop": ["--init-lora-weights", "olora", "--early-stopping-patience", "2", "--lr", "0.3"],
    "new-tokens": ["--add-tokens", "<one>", "<two>"],
    "modules-to-save": ["--modules-to-save", "lm_head", "--final-adapter", "best"],
    "4bit": ["--load-4bit"],
    "8bit-lu-lora": ["--load-8bit", *LU],
    "full": ["--method", "full", "--lr", "1e-3", "--async-save"],
    "full-bf16": ["--method", "full", "--lr", "1e-3", "--dtype", "bf16", "--final-adapter", "best"],
    "plain-text": ["--stage", "pt", "--async-save"],
    "pairs": ["--stage", "dpo", "--lr", "0.003"],
    "pairs-padded-lu-lora": ["--stage", "dpo", "--pref-loss", "simpo", "--no-pack", "--async-save", *LU],
}
NEEDS_BITSANDBYTES = ("4bit", "8bit-lu-lora")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 31)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    path.with_suffix(".txt").write_text("".join(f"{row['instruction']} {row['output']}\n" for row in made))
    pairs = [
        {"instruction": f"Say {n}.", "chosen": f"I say {n}.", "rejected": "No." + " No." * (n % 4)} for n in range(30)
    ]
    path.with_suffix(".pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def tune(base: Path, rows: Path, run: Path, moments: Moments, *flags: str) -> int:
    os.environ["FINERANK_HOME"] = str(run) + "-home"  # so that each run makes its ids anew
    stage = flags[flags.index("--stage") + 1] if "--stage" in flags else "sft"
    data = rows.with_suffix({"sft": ".jsonl", "pt": ".txt", "dpo": ".pairs.jsonl"}[stage])
    argv = ["tune", "--load", str(base), "--data-path", str(data), "--output-dir", str(run), "--resume", "auto"]
    argv += ["--device", "cpu", "--seq-length", "96", "--log-interval", "1000"]
    argv += ["--num-epochs", "2.5", "--global-batch-size", "6", "--micro-batch-tokens", "256", "--val-set-size", "4"]
    argv += ["--save-interval", "2", "--eval-interval", "4", *([] if "--lr" in flags else ["--lr", "0.01"]), *flags]
    argv += [] if "--dtype" in flags else ["--dtype", "fp32"]
    argv += [] if "full" in flags else ["--lora-r", "4"]
    with moments.told():
        return cli.main(argv)


def outcome(run: Path) -> tuple[str, list[dict]]:
    timed = ("step_seconds", "peak_memory_bytes")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run / "metrics.jsonl")]
    weights = run / "adapter_model.safetensors"
    if (whole := run / "model").is_dir():
        check_checksums(whole)
        weights = whole / "model.safetensors"
    return sha256_file(weights), rows


def killed(child: children.BaseProcess, moments: Moments, rng: random.Random) -> str | None:
    """Kill a run at a random instant and return which one that was; None when the run was faster."""
    part = rng.choice([*PARTS, *[None] * len(PARTS)])
    if part is None:
        child.join(rng.uniform(0.05, 1.0))
    elif moments.wait(part, child, skip=rng.choice((0, 0, 1, 2, 4))):
        child.join(0.02 * rng.random() ** 3)  # saves and evaluations last a few milliseconds
    child.kill()
    code = children.finish(child)
    assert code in (0, -signal.SIGKILL), code
    return moments.now() if code else None


def check(tmp_path: Path, base: Path, rows: Path, flags: list[str], *, kills: int, seed: int) -> None:
    """Runs are killed and started again until `kills` have hit; each must come out like the unbroken one."""
    moments, hits = Moments(), collections.Counter[str]()
    unbroken = tmp_path / "unbroken"
    assert children.finish(children.start(tune, base, rows, unbroken, moments, *flags)) == 0
    expected, rng = outcome(unbroken), random.Random(f"{flags} {seed}")
    for i in range(10 * kills):
        run = tmp_path / str(i)
        while hits.total() < kills:
            moments.clear()
            moment = killed(children.start(tune, base, rows, run, moments, *flags), moments, rng)
            if moment is None:
                break
            hits[moment] += 1
        if hits.total() >= kills:
            assert children.finish(children.start(tune, base, rows, run, moments, *flags)) == 0
        assert outcome(run) == expected, f"run {i}"
        assert native.newest_whole(run, say=pytest.fail) is not None
        assert not [p for p in run.iterdir() if "aside" in p.name or p.name in ("run.lock", "boundary_cache")]
        if hits.total() >= kills:
            print(f"kills: {json.dumps(hits, sort_keys=True)}")
            return
    raise AssertionError(f"only {hits.total()} kills hit a living run")


@pytest.mark.parametrize("way", WAYS)
def test_killed_anywhere_and_resumed_gives_the_same_adapter(
    tmp_path: Path, tiny_folder: Path, rows: Path, way: str
) -> None:
    check(tmp_path, tiny_folder, rows, WAYS[way], kills=3, seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_survives_kills(tmp_path: Path, tiny_folder: Path, rows: Path, method: str) -> None:
    check(tmp_path, tiny_folder, rows, _flags(method), kills=2, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("way", WAYS)
def test_killed_50_times_each_way_and_resumed_gives_the_same_adapter(
    tmp_path: Path, tiny_folder: Path, rows: Path, way: str, part: int
) -> None:
    check(tmp_path, tiny_folder, rows, WAYS[way], kills=10, seed=2 + part)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_each_method_survives_20_kills(tmp_path: Path, tiny_folder: Path, rows: Path, method: str) -> None:
    check(tmp_path, tiny_folder, rows, _flags(method), kills=20, seed=2)


def _flags(method: str) -> list[str]:
    if method in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return METHODS[method]


def test_the_whole_program_stops_and_goes_on(tmp_path: Path, tiny_folder: Path, rows: Path) -> None:
    moments, unbroken, run = Moments(), tmp_path / "unbroken", tmp_path / "run"
    assert children.finish(children.start(tune, tiny_folder, rows, unbroken, moments, *WAYS["packed"])) == 0
    child = children.start(tune, tiny_folder, rows, run, moments, *WAYS["packed"])
    children.wait_for(child, lambda: len(read_metrics(run / "metrics.jsonl")) >= 3)
    child.terminate()
    assert children.finish(child) == 143
    assert not (run / "results.json").exists()
    assert children.finish(children.start(tune, tiny_folder, rows, run, moments, *WAYS["packed"])) == 0
    assert outcome(run) == outcome(unbroken)
