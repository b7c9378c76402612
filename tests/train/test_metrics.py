"""metrics.jsonl: valid JSON whatever the numbers, whole after a kill, nothing lost on a full disk."""

import errno
import json
from pathlib import Path

import pytest

from finerank.errors import StorageError
from finerank.train.metrics import KEYS, Metrics, open_trackers, read_metrics


def test_rows_have_all_keys_and_only_json_numbers(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 0, "eval_loss": 2.5})
    metrics.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-4})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {**dict.fromkeys(KEYS), "step": 0, "eval_loss": 2.5}
    assert rows[1]["loss"] is None and rows[1]["grad_norm"] is None and rows[1]["lr"] == 1e-4


def test_a_line_cut_by_a_kill_is_left_out_and_history_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    rows = read_metrics(path)
    assert [r["step"] for r in rows] == [1, 2]
    metrics = Metrics(path, history=rows[:1])
    metrics.write({"step": 2, "loss": 1.5})
    metrics.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_rows_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    real = metrics._file

    class Full:
        fileno = real.fileno

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    metrics._file = Full()  # type: ignore[assignment]
    with pytest.raises(StorageError, match="free space"):
        metrics.write({"step": 1})
    metrics._file = real
    metrics.write({"step": 2})
    metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_file_that_was_removed_is_put_back_with_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = Metrics(path, history=[{"step": 1}])
    metrics.write({"step": 2})
    path.unlink()
    path.parent.rmdir()
    metrics.write({"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    path.unlink()
    metrics.flush_to_disk()
    metrics.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_a_tracker_on_a_full_disk_is_a_storage_error_and_the_row_is_kept(tmp_path: Path) -> None:
    class Tracker:
        def log(self, step: int, values: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    metrics = Metrics(tmp_path / "metrics.jsonl", trackers=[Tracker()])
    with pytest.raises(StorageError, match="free space"):
        metrics.write({"step": 1})
    with pytest.raises(StorageError, match="free space"):
        metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_tensorboard_events_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path / "metrics.jsonl", trackers=open_trackers(["tensorboard"], tmp_path, first_step=0))
    metrics.write({"step": 1, "loss": 2.0, "eval_loss": None})
    metrics.write({"step": 2, "loss": 1.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
