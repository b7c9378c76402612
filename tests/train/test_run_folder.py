"""The run folder: not written over unasked, no secrets, only its own files removed."""

from pathlib import Path

import pytest
import yaml

from finerank import config
from finerank.checkpoints import native
from finerank.errors import ConfigError
from finerank.recipes.tune import Settings
from finerank.train import run_folder
from finerank.train.state import TrainState

RESULTS = {"base_model": "some/model"}


def results() -> dict:
    state = TrainState(step=4, rows=64, trained_tokens=900, seconds=2.0, first_eval_loss=2.0, last_eval_loss=1.5)
    return run_folder.results_of(state, base_eval_loss=None, adapter_sha256="ab" * 32, base_model="some/model")


def test_a_finished_or_begun_run_is_not_written_over(tmp_path: Path) -> None:
    run_folder.check_free(tmp_path / "new", resume=False, overwrite=False)
    native.save_checkpoint(native.folder_of(tmp_path, 1), state={"step": 1}, tensors={})
    with pytest.raises(ConfigError, match="--resume auto"):
        run_folder.check_free(tmp_path, resume=False, overwrite=False)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="--overwrite-output-dir"):
        run_folder.check_free(tmp_path, resume=False, overwrite=False)
    run_folder.check_free(tmp_path, resume=True, overwrite=False)
    run_folder.check_free(tmp_path, resume=False, overwrite=True)


def test_clearing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    native.save_checkpoint(native.folder_of(tmp_path, 1), state={"step": 1}, tensors={})
    for name in ("results.json", "metrics.jsonl", "my notes.txt", "nonfinite-step-3.safetensors"):
        (tmp_path / name).write_text("x")
    run_folder.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["my notes.txt"]


def test_the_saved_config_gives_the_same_settings_and_starts_nothing_by_itself(tmp_path: Path) -> None:
    settings = Settings(load="m", lora_r=4, resume="auto", data_path=["a.json"])
    run_folder.write_config(tmp_path, settings)
    again = config.parse(Settings, ["--config", str(tmp_path / "config.yaml")], verb="tune").settings
    assert again == Settings(load="m", lora_r=4, data_path=["a.json"])


def test_the_card_names_files_without_folders_and_no_secrets(tmp_path: Path) -> None:
    settings = Settings(data_path=["/home/someone/private/rows.json"], valid_data_path=["https://u:pw@host/held.json"])
    text = run_folder.model_card(settings, results(), receipt={"rows_read": 70, "name": "hf_abcdefghijklmnopqrstuv"})
    assert "`rows.json`" in text and "someone" not in text and "pw" not in text and "hf_abc" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "some/model" and front["library_name"] == "peft"
    assert "| base model | 2.0000 |" in text and "| after tuning | 1.5000 |" in text
    assert "rows read: 70" in text and "lora_r: 16" in text and "licence of some/model applies" in text


def test_secrets_are_removed_from_any_text() -> None:
    text = run_folder.redact("token hf_AbCdEfGhIjKlMnOpQrSt and https://me:secret@host/x, not hf_home")
    assert text == "token (removed) and https://(removed)@host/x, not hf_home"


def test_files_written_aside_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "a.txt").write_text("new")
        raise RuntimeError("stopped")

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError):
        run_folder.write_files(tmp_path, half)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_the_summary_says_what_came_out(tmp_path: Path) -> None:
    lines = run_folder.summary(tmp_path, results())
    assert lines[0] == "held-out loss 2.0000 -> 1.5000 nats per token" and "32.0 rows/s" in lines[1]
