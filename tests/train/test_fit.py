"""`--micro-batch-size auto`: what is chosen, against memory that is made up and memory that is measured."""

import json
import multiprocessing
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from finerank import cli
from finerank.data.loader import BatchPlan
from finerank.data.settings import BatchSettings
from finerank.data.tokens import Source, TokenDataset
from finerank.errors import ConfigError
from finerank.files import sha256_file
from finerank.train import fit, memory
from tiny import tiny_model


def dataset(lengths: list[int]) -> TokenDataset:
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    ids = np.arange(sum(lengths), dtype=np.int32) % 50
    zeros = np.zeros(len(lengths), np.int64)
    return TokenDataset(
        [Source(ids, ids)], zeros, starts, starts, np.array(lengths), longest=max(lengths), trained_lengths=None
    )


@pytest.mark.parametrize("limit", range(0, 19))
def test_the_largest_that_fits_is_found_in_few_tries(limit: int) -> None:
    tried = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    assert fit.largest_that(fits, 16) == min(limit, 16)
    assert max(tried) <= 16 and len(tried) == len(set(tried)) <= 9


def test_peak_counts_what_is_held_at_once() -> None:
    def work() -> None:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 21, dtype=torch.uint8)
        del a, b
        torch.empty(1 << 10, dtype=torch.uint8)

    assert fit.peak_bytes(work) == fit.peak_bytes(work) == 3 << 20


@pytest.mark.parametrize("pack", [True, False])
def test_cpu_extrapolation_agrees_with_the_measured_peak(monkeypatch: pytest.MonkeyPatch, pack: bool) -> None:
    model, data = tiny_model("llama"), dataset([40] * 12 + [10] * 8)
    settings = BatchSettings(pack=pack, micro_batch_size="auto")
    if pack:
        from finerank.models.attention import use_packed_attention

        use_packed_attention(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trained = list(model.parameters())
    heavy = {n: fit.heaviest_batch(data, settings, n) for n in (1, 5, 6)}
    peaks = {
        n: fit.peak_bytes(lambda b=b: fit._forward_backward(model, b, fit.batch_loss_sum, trained))
        for n, b in heavy.items()
    }
    room = peaks[5] + (peaks[6] - peaks[5]) / 2 + fit._moments_bytes(trained)
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: room / fit.USABLE_SHARE)
    found, sentence = fit.find_split(model, data, settings, pad_token_id=0)
    assert found == (
        {"micro_batch_size": None, "micro_batch_tokens": 200} if pack else {**found, "micro_batch_size": 5}
    )
    assert "(auto)" in sentence and "are free" in sentence
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_one_row_too_many_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").requires_grad_(True)
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 1000)
    with pytest.raises(
        memory.OutOfMemoryError,
        match=r"the model with gradients and optimizer state takes .*--seq-length 20.*longest row takes",
    ):
        fit.find_split(model, dataset([40] * 4), BatchSettings(pack=False, micro_batch_size="auto"), pad_token_id=0)


def test_out_of_memory_on_a_gpu_is_caught_and_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"total_memory": 1000}))

    def run(n: int) -> None:
        if n > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if n == 99:
            raise RuntimeError

    assert fit._try_on_gpu(list(torch.nn.Linear(1, 1).parameters()), run, 16, torch.device("cpu")) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_takes_what_was_found() -> None:
    model, data = tiny_model("llama").cuda().requires_grad_(True), dataset([40] * 16)
    found, _ = fit.find_split(model, data, BatchSettings(pack=False, micro_batch_size="auto"), pad_token_id=0)
    assert found["micro_batch_size"] == 16


def test_a_number_is_needed_where_nothing_is_searched() -> None:
    with pytest.raises(ConfigError, match="auto is found by finerank tune"):
        BatchPlan(dataset([4]), BatchSettings(micro_batch_size="auto"), seed=1, num_steps=1, pad_token_id=0)


def test_free_memory_is_cut_to_the_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert memory.available_memory_bytes(tmp_path, meminfo) == 4000 * 1024
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory_bytes(tmp_path, meminfo) == 4000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_memory_bytes(tmp_path, meminfo) == 200000
    assert memory.available_memory_bytes(tmp_path / "none", tmp_path / "none") > 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_lowest_limit_of_all_groups_above_counts(tmp_path: Path, version: int) -> None:
    """As a batch system sets them: a limit on the job, none on the step inside it."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    line = "7:cpu,memory:/slurm/job_3/step_0" if version == 1 else "0::/slurm/job_3/step_0"
    own.write_text(f"3:freezer:/elsewhere\n{line}\n")
    job = (root / "memory" if version == 1 else root) / "slurm" / "job_3"
    (job / "step_0").mkdir(parents=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    for folder, most in ((job, "1000000"), (job / "step_0", "max" if version == 2 else str(2**63 - 4096))):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("900000\n")
        (folder / "memory.stat").write_text("anon 1\n")
    assert memory.available_memory_bytes(root, own_groups=own) == 100000


def test_the_address_space_that_is_left_is_a_limit() -> None:
    def measure() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20),) * 2)
        return 0 if 250 << 20 < memory.available_memory_bytes() <= 300 << 20 else 1

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(measure()))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("flags", [["--no-pack"], []])
def test_a_resumed_run_keeps_what_was_found(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": "a " * n}) + "\n" for n in range(1, 13)))

    def tune(run: Path, *more: str) -> int:
        argv = ["tune", "--load", str(tiny_folder), "--data-path", str(rows), "--output-dir", str(run), "--dtype"]
        argv += ["fp32", "--device", "cpu", "--lora-r", "2", "--global-batch-size", "4", "--micro-batch-size", "auto"]
        return cli.main([*argv, "--no-tune-runtime", *flags, *more])

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert tune(whole, "--train-iters", "4") == 0
    assert "(auto): the whole global batch" in capsys.readouterr().err
    kept = yaml.safe_load((whole / "config.yaml").read_text())
    assert kept["micro_batch_size"] == (4 if flags else None)
    assert tune(broken, "--train-iters", "2") == 0
    monkeypatch.setattr(fit, "find_split", lambda *a, **k: pytest.fail("searched again"))
    assert tune(broken, "--train-iters", "4", "--resume", "auto", "--resume-anyway", "--lr-decay-iters", "2") == 0
    again = yaml.safe_load((broken / "config.yaml").read_text())
    assert [again[n] for n in fit.NAMES] == [kept[n] for n in fit.NAMES]
    (broken / "results.json").unlink()
    for checkpoint in broken.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()  # nothing whole: the run's own config.yaml says what was found
    assert tune(broken, "--train-iters", "4", "--resume", "auto", "--lr-decay-iters", "2") == 0
    assert sha256_file(broken / "adapter_model.safetensors")
