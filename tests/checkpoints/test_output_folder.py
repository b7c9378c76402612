"""What a killed or failed conversion leaves: the old folder or the new one, and it can be run again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_megatron import assert_same, base_of, save

from finerank.checkpoints.formats import hf
from finerank.checkpoints.output import output_folder
from finerank.cli import main
from finerank.errors import StorageError

SLOW_WRITER = """
import sys, time
from finerank.checkpoints import safetensors_file
from finerank.cli import main
write = safetensors_file.SafetensorsWriter.write
def slow(self, name, tensor):
    write(self, name, tensor)
    print("wrote", flush=True)
    time.sleep(0.2)
safetensors_file.SafetensorsWriter.write = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_conversion_leaves_the_old_folder_and_runs_again(tmp_path: Path) -> None:
    source = save(base_of("llama"), tmp_path / "hf")
    argv = ["convert", "--load-dir", str(source), "--save-dir", str(tmp_path / "out")]
    assert main([*argv, "--params-dtype", "fp32"]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    child = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, *argv], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "wrote\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.glob("out.finerank-aside-*"))) == 1
    assert main(argv) == 0
    assert_same(hf.read(tmp_path / "out").weights, hf.read(source).weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"], "what the killed run left is gone"


def test_a_living_neighbour_keeps_what_it_writes(tmp_path: Path) -> None:
    mine = tmp_path / f"out.finerank-aside-{os.getpid()}-01234567"
    mine.mkdir()
    with output_folder(tmp_path / "out", sources=[], overwrite=False) as folder:
        (folder / "x").write_text("x")
    assert mine.is_dir() and (tmp_path / "out" / "x").is_file()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), output_folder(tmp_path / "out", sources=[], overwrite=False) as folder:
        (folder / "half").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from finerank.checkpoints import safetensors_file

    def full(self: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file.SafetensorsWriter, "_write_all", full)
    model = base_of("llama")
    with (
        pytest.raises(StorageError, match="free space"),
        output_folder(tmp_path / "o", sources=[], overwrite=False) as f,
    ):
        hf.write(model, f)
    assert list(tmp_path.iterdir()) == []
