"""Which checkpoint `--resume` takes, and what it refuses."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from finerank.checkpoints import native
from finerank.errors import CheckpointError, ConfigError
from finerank.recipes.tune import Settings
from finerank.train.resume import NEUTRAL, SAFE, check_origin, check_place, find_checkpoint, origin_of, take_over
from finerank.train.state import TrainState

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


def test_a_copy_under_a_later_name_is_not_the_newest(tmp_path: Path) -> None:
    shutil.copytree(checkpoint(tmp_path, 3).folder, tmp_path / "checkpoint-900")
    said: list[str] = []
    found = find_checkpoint("auto", tmp_path, say=said.append)
    assert found is not None and found.folder.name == "checkpoint-3"
    assert said == ["skipped checkpoint-900: it holds step 3, not what its name says"]


@pytest.mark.parametrize("origin_value", [None, 5, [], {}, {"settings": 1, "digests": {}, "environment": {}}])
def test_an_origin_of_the_wrong_kind_is_refused(tmp_path: Path, origin_value: object) -> None:
    native.save_checkpoint(native.folder_of(tmp_path, 1), state={"step": 1, "origin": origin_value}, tensors={})
    with pytest.raises(CheckpointError, match="does not say what its run was made of"):
        check_origin(native.read_checkpoint(native.folder_of(tmp_path, 1)), origin(), anyway=True, say=pytest.fail)


def test_a_checkpoint_behind_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"after 20 steps, and this run has only 10; raise --num-epochs"):
        check_place(checkpoint(tmp_path, 20), tmp_path, num_steps=10, say=pytest.fail)


def test_later_checkpoints_are_named_before_they_go(tmp_path: Path) -> None:
    here, _, _ = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4), checkpoint(tmp_path, 6)
    said: list[str] = []
    check_place(here, tmp_path, num_steps=10, say=said.append)
    assert said == ["removing checkpoint-4, checkpoint-6: the run goes on from step 2 and writes them anew"]


@pytest.mark.parametrize("present", ["checkpoint", "results"])
def test_another_runs_folder_is_not_written_over(tmp_path: Path, present: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    here = checkpoint(ours, 2)
    theirs.mkdir()
    check_place(here, theirs, num_steps=10, say=pytest.fail)  # an empty one may be used
    if present == "checkpoint":
        checkpoint(theirs, 1)
    else:
        (theirs / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run of its own.*choose another --output-dir"):
        check_place(here, theirs, num_steps=10, say=pytest.fail)


def test_the_best_checkpoint_comes_along_and_old_results_go(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    best, here = checkpoint(ours, 1), checkpoint(ours, 3)
    theirs.mkdir()
    (theirs / "results.json").write_text("{}")
    state = TrainState(step=3, best_step=1, best_eval_loss=2.0)
    take_over(here, theirs, state, keep_best=True, say=pytest.fail)
    assert not (theirs / "results.json").exists()
    copy = native.read_checkpoint(native.folder_of(theirs, 1))
    assert copy.state == best.state and [s for s, _ in native.checkpoints(theirs)] == [1]
    renamed = ours / "the good one"
    here.folder.rename(renamed)
    at_best = TrainState(step=3, best_step=3, best_eval_loss=1.0)
    take_over(native.read_checkpoint(renamed), theirs, at_best, keep_best=True, say=pytest.fail)
    assert native.newest_whole(theirs, say=pytest.fail) == native.folder_of(theirs, 3)


def test_a_best_checkpoint_that_is_gone_is_said(tmp_path: Path) -> None:
    here, state = checkpoint(tmp_path, 3), TrainState(step=3, best_step=1, best_eval_loss=2.0)
    said: list[str] = []
    take_over(here, tmp_path, state, keep_best=True, say=said.append)
    assert len(said) == 1 and "(step 1) cannot be kept: it does not exist" in said[0]
    take_over(here, tmp_path, state, keep_best=False, say=pytest.fail)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("step", value) for value in (-1, 1.0, True)),
        *(("pending", value) for value in (3, {})),
        *(("best_eval_loss", "low"), ("seconds", None), ("stopped_early", 1)),
        *(("best_step", [1]), ("num_skipped_steps", None)),
    ],
)
def test_a_state_with_impossible_values_is_refused(name: str, value: object) -> None:
    whole = TrainState(step=3, pending={"step": 3}, best_eval_loss=1.0, best_step=2).to_dict()
    assert TrainState.from_dict(whole).to_dict() == whole
    with pytest.raises(CheckpointError, match=name):
        TrainState.from_dict({**whole, name: value})
