"""Which checkpoint `--resume` takes, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest

from finerank.checkpoints import native
from finerank.errors import CheckpointError
from finerank.recipes.tune import Settings
from finerank.train.resume import NEUTRAL, SAFE, check_origin, find_checkpoint, origin_of

DIGESTS = {"data": "d1", "held-out data": None, "base model": "m1", "template": "t1"}


def origin(**changes) -> dict:
    settings = {"lr": 1e-4, "num_epochs": 1.0, "lora_r": 8, "output_dir": "a"}
    digests = {**DIGESTS, **{k: v for k, v in changes.items() if k in DIGESTS}}
    settings |= {k: v for k, v in changes.items() if k not in DIGESTS and k != "environment"}
    return origin_of(settings, digests=digests, environment=changes.get("environment", {"threads": 2}))


def checkpoint(run: Path, step: int = 3) -> native.Checkpoint:
    native.save_checkpoint(native.folder_of(run, step), state={"step": step, "origin": origin()}, tensors={})
    return native.read_checkpoint(native.folder_of(run, step))


def test_the_same_origin_is_taken_silently(tmp_path: Path) -> None:
    check_origin(checkpoint(tmp_path), origin(output_dir="elsewhere"), anyway=False, say=pytest.fail)


def test_all_differences_are_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_origin(checkpoint(tmp_path), origin(data="d2", lora_r=16, lr=2e-4), anyway=False, say=pytest.fail)
    for words in ("data was d1, is d2", "lora_r was 8, is 16", "lr was 0.0001, is 0.0002", "start anew"):
        assert words in str(caught.value)


def test_safe_differences_need_the_flag_and_are_said(tmp_path: Path) -> None:
    here, more = checkpoint(tmp_path), origin(num_epochs=3.0)
    with pytest.raises(CheckpointError, match=r"num_epochs was 1\.0, is 3\.0\. Add --resume-anyway"):
        check_origin(here, more, anyway=False, say=pytest.fail)
    said: list[str] = []
    check_origin(here, more, anyway=True, say=said.append)
    assert said == ["resuming although num_epochs was 1.0 and is 3.0"]
    with pytest.raises(CheckpointError, match="template was t1, is t2"):
        check_origin(here, origin(num_epochs=3.0, template="t2"), anyway=True, say=pytest.fail)


def test_another_number_of_threads_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    check_origin(checkpoint(tmp_path), origin(environment={"threads": 4}), anyway=False, say=said.append)
    assert len(said) == 1 and "threads was 2 and is 4" in said[0]


def test_auto_takes_the_newest_whole_one(tmp_path: Path) -> None:
    said: list[str] = []
    assert find_checkpoint("auto", tmp_path, say=said.append) is None and "starting from the first step" in said[0]
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 20)
    found = find_checkpoint("auto", tmp_path, say=pytest.fail)
    assert found is not None and found.step == 20
    (tmp_path / "checkpoint-20" / "state.json").unlink()
    said.clear()
    found = find_checkpoint("auto", tmp_path, say=said.append)
    assert found is not None and found.step == 3 and said == ["skipped checkpoint-20: state.json is missing"]


def test_a_named_checkpoint_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it does not exist; use --resume auto"):
        find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path, say=pytest.fail)


def test_every_named_setting_exists() -> None:
    """A renamed setting must not silently become one that decides, or stop being one."""
    names = {f.name for f in dataclasses.fields(Settings)}
    assert not (NEUTRAL | SAFE) - {"held-out data"} - names and not NEUTRAL & SAFE
