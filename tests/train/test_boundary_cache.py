"""Keeping what leaves the local layers: the same run to the last bit, without running those layers again."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

from finerank import cli
from finerank.adapters.local_learning import LocalLearning
from finerank.errors import ModelError, StorageError
from finerank.files import sha256_file
from finerank.train import boundary_cache, held_out
from finerank.train.boundary_cache import BoundaryCache, HiddenFile
from finerank.train.held_out import batch_loss_sum
from tiny import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--device", "cpu", "--seq-length", "128", "--lora-r", "4", "--log-interval", "1000", "--seed", "5"]
FAST += ["--share-prompts", "false"]  # --cache-boundary cannot share them, and sharing rounds otherwise
LU = ["--lu-lora-final-layer-index", "1", "--global-batch-size", "8", "--num-epochs", "3", "--lr", "0.02"]
FEEDBACK = [*LU, "--lu-lora-rule", "feedback"]
FROZEN = [*LU, "--lu-lora-rule", "frozen"]
ONE_LENGTH = ["--pad-to-multiple-of", "128"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    return {
        "llama": save_tiny(folder / "llama", "llama", num_hidden_layers=4),
        "gemma3": save_tiny(folder / "gemma3", "gemma3", num_hidden_layers=4, **types),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows of different lengths, so that packs hold other rows in each epoch; an epoch's last batch is short."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["red", "green", "blue", "one", "two"]
    made = [{"instruction": f"Say {words[i % 5]}.", "output": " ".join([words[i % 5]] * (i + 1))} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    usual = ["--load", str(base), "--data-path", str(rows), "--output-dir", str(run), *FAST]
    pairs = [pair for pair in zip(usual[::2], usual[1::2], strict=True) if pair[0] not in flags]
    return cli.main(["tune", *(word for pair in pairs for word in pair), *flags])


def numbers(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("eval_loss")) for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    assert sha256_file(one / "adapter_model.safetensors") == sha256_file(other / "adapter_model.safetensors")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Training passes by layer."""
    counted: Counter[int] = Counter()
    for attention in (LlamaAttention, Gemma3Attention):

        def forward(self: Any, *args: Any, _real: Any = attention.forward, **kwargs: Any) -> Any:
            counted[self.layer_idx] += self.training and torch.is_grad_enabled()
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(attention, "forward", forward)
    return counted


@pytest.mark.parametrize(
    ("family", "flags", "share"),
    [
        ("llama", ["--dtype", "bf16", *FROZEN], 1 / 3),
        ("llama", ["--dtype", "fp32", *FROZEN], 1 / 3),
        ("llama", ["--dtype", "bf16", *FROZEN, "--no-pack", "--micro-batch-size", "3", *ONE_LENGTH], 1 / 3),
        ("llama", ["--dtype", "bf16", *FROZEN, "--micro-batch-size", "2", "--lora-dropout", "0.2"], 1 / 3),
        ("gemma3", ["--dtype", "bf16", *FROZEN], 1 / 3),
        ("llama", ["--dtype", "bf16", *FEEDBACK, "--lu-lora-freeze-after", "2"], 2 / 3),
        ("llama", ["--dtype", "bf16", *LU, "--lu-lora-rule", "sampled", "--lu-lora-freeze-after", "2"], 6 / 8),
        ("llama", ["--dtype", "fp32", *LU, "--lu-lora-rule", "mindspeed", "--lu-lora-freeze-after", "0"], 1 / 3),
    ],
)
def test_the_run_is_the_uncached_one(
    tmp_path: Path, bases: dict[str, Path], rows: Path, calls: Counter[int], family: str, flags: list[str], share: float
) -> None:
    """Losses, norms, held-out losses and adapter to the last bit; layers 0 to K run in `share` of the steps."""
    flags = [*flags, "--val-set-size", "4", "--eval-interval", "4"]
    assert tune(bases[family], rows, tmp_path / "plain", *flags) == 0
    passes = calls[0]
    assert passes and set(calls.values()) == {passes}
    calls.clear()
    assert tune(bases[family], rows, tmp_path / "cached", *flags, "--cache-boundary") == 0
    assert_same_run(tmp_path / "plain", tmp_path / "cached")
    assert calls[2] == calls[3] == passes and calls[0] == calls[1] == round(share * passes)
    assert not (tmp_path / "cached" / boundary_cache.FOLDER).exists()


def test_packs_of_rows_from_before_and_after_freezing(
    tmp_path: Path, bases: dict[str, Path], rows: Path, calls: Counter[int]
) -> None:
    """Frozen within an epoch: the next one meets stored rows beside new ones, the last one stored rows only."""
    flags = ["--dtype", "bf16", *FEEDBACK, "--lu-lora-freeze-after", "1"]
    assert tune(bases["llama"], rows, tmp_path / "plain", *flags) == 0
    calls.clear()
    assert tune(bases["llama"], rows, tmp_path / "cached", *flags, "--cache-boundary") == 0
    assert_same_run(tmp_path / "plain", tmp_path / "cached")
    assert calls[0] <= 2 / 3 * calls[3]


def test_padded_to_many_lengths_equal_up_to_rounding(tmp_path: Path, bases: dict[str, Path], rows: Path) -> None:
    """Attention's last bits depend on the length that a row is padded to, and that differs from epoch to epoch."""
    flags = ["--dtype", "fp32", *FROZEN, "--no-pack", "--micro-batch-size", "3"]
    for name, more in (("plain", []), ("cached", ["--cache-boundary"])):
        assert tune(bases["llama"], rows, tmp_path / name, *flags, *more) == 0
    losses = [[loss for _, loss, _, _ in numbers(tmp_path / name)] for name in ("plain", "cached")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


class Killed(BaseException):
    """As sudden as a kill: nothing is saved."""


@pytest.mark.parametrize("hurt", ["", "byte", "lost", "key", "size"])
@pytest.mark.parametrize("flags", [FROZEN, [*LU, "--lu-lora-freeze-after", "2"]], ids=["frozen", "freeze-after"])
def test_killed_and_resumed(
    tmp_path: Path,
    bases: dict[str, Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: Counter[int],
    flags: list[str],
    hurt: str,
) -> None:
    """The killed run's cache is used again; one that was hurt in the meantime is made again."""
    flags = ["--dtype", "bf16", *flags, "--save-interval", "2", "--micro-batch-size", "3"]
    assert tune(bases["llama"], rows, tmp_path / "plain", *flags) == 0
    real, left = held_out.loss_sum, [13]  # dies in step 5 of 9

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= torch.is_grad_enabled()  # not where lora_A is found
        if not left[0]:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(held_out, "loss_sum", dying)
    run = tmp_path / "cached"
    with pytest.raises(Killed):
        tune(bases["llama"], rows, run, *flags, "--cache-boundary")
    monkeypatch.setattr(held_out, "loss_sum", real)
    cache = run / boundary_cache.FOLDER
    assert np.fromfile(cache / "rows.bin", np.int64).any()
    if hurt == "byte":
        content = bytearray((cache / "hidden.bin").read_bytes())
        content[:: len(content) // 200] = bytes(b ^ 64 for b in content[:: len(content) // 200])
        (cache / "hidden.bin").write_bytes(content)
    elif hurt == "lost":
        shutil.rmtree(cache)
    elif hurt == "key":
        (cache / "key").write_text("another")
    elif hurt == "size":
        (cache / "hidden.bin").write_bytes(b"short")
    calls.clear()
    assert tune(bases["llama"], rows, run, *flags, "--cache-boundary", "--resume", "auto") == 0
    assert_same_run(tmp_path / "plain", run)
    assert calls[0] < calls[3]


def test_a_full_disk_is_refused_before_anything_starts(
    tmp_path: Path, bases: dict[str, Path], rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(boundary_cache.shutil, "disk_usage", lambda _: usage._replace(free=1 << 26))
    assert tune(bases["llama"], rows, tmp_path / "run", *FROZEN, "--cache-boundary") != 0
    error = capsys.readouterr().err
    assert "--cache-boundary needs 0.1 MB" in error and "67.1 MB are free" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_its_size_is_said(tmp_path: Path, bases: dict[str, Path], rows: Path, capsys: Any) -> None:
    assert tune(bases["llama"], rows, tmp_path / "run", *FROZEN, "--cache-boundary", "--dtype", "bf16") == 0
    said = capsys.readouterr().err
    assert "--cache-boundary: 0.1 MB for 20 rows in" in said and "in use from step 3 on" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cache-boundary"], "--cache-boundary has no effect without --lu-lora-final-layer-index"),
        ([*LU, "--cache-boundary"], "add --lu-lora-freeze-after"),
        ([*FROZEN, "--cache-boundary", "--num-epochs", "1"], "no row comes a second time before step 3"),
        ([*LU, "--lu-lora-freeze-after", "4", "--cache-boundary", "--num-epochs", "2"], "before step 6"),
    ],
)
def test_no_effect_is_refused(
    tmp_path: Path, bases: dict[str, Path], rows: Path, capsys: Any, flags: list[str], words: str
) -> None:
    if flags.count("--num-epochs") > 1:
        at = flags.index("--num-epochs")
        flags = flags[:at] + flags[at + 2 :]
    assert tune(bases["llama"], rows, tmp_path / "run", *flags) == 2
    assert words in capsys.readouterr().err


def test_a_base_that_drops_out_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.1)
    local = LocalLearning(None, set(), lr_a=0, lr_b=0, freeze_after=0, layers=model.model.layers[:1])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="drops out at random"):
        BoundaryCache(model, local, np.array([4]), batch_loss_sum, folder=tmp_path / "cache", key=[])


class TestHiddenFile:
    def test_rows_come_back_bit_for_bit(self, tmp_path: Path) -> None:
        lengths = np.array([3, 1, 7])
        file = HiddenFile(tmp_path / "cache", lengths, hidden_size=5, dtype=torch.bfloat16)
        assert file.num_bytes == 11 * 5 * 2 and (tmp_path / "cache" / "hidden.bin").stat().st_size == 110
        assert file.use_key("a") == 0
        hidden = [torch.randn(n, 5).to(torch.bfloat16) for n in lengths]
        for row in (2, 0):
            file.write(row, hidden[row])
        file.release()
        again = HiddenFile(tmp_path / "cache", lengths, hidden_size=5, dtype=torch.bfloat16)
        assert again.use_key("a") == 2
        assert again.read(1) is None
        for row in (0, 2):
            got = again.read(row)
            assert got is not None and torch.equal(got, hidden[row])
        assert again.use_key("b") == 0 and again.read(0) is None

    def test_no_permission(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="Cannot write"):
            HiddenFile(tmp_path / "file" / "cache", np.array([3]), hidden_size=5, dtype=torch.bfloat16)
