"""Micro-batches side by side: the gradients of micro-batches in turn, bit for bit, and nothing left running."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import train_fakes as fakes
from finerank.adapters.inject import inject_adapters
from finerank.adapters.lora import LoRALinear
from finerank.adapters.settings import AdapterSettings
from finerank.data.loader import BatchPlan
from finerank.data.settings import DataSettings
from finerank.errors import ConfigError
from finerank.models.attention import use_packed_attention
from finerank.models.fused.fuse import fuse
from finerank.train.held_out import batch_loss_sum
from finerank.train.micro_batches import SideBySide, backward_of, choose_at_once, in_turn


class Rows:
    """Rows of different lengths, the second half of each trained."""

    def __init__(self, num: int = 12):
        generator = np.random.default_rng(0)
        self.lengths = generator.integers(5, 40, size=num)
        self.trained_lengths = self.lengths - self.lengths // 2
        self._ids = [generator.integers(0, 90, size=n).astype(np.int32) for n in self.lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        ids = self._ids[row]
        labels = ids.copy()
        labels[: len(ids) // 2] = -100
        return [(ids, labels)]


def model_and_parameters(dtype: torch.dtype) -> tuple[LlamaForCausalLM, list[Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=3, **sizes)).to(dtype)
    use_packed_attention(model)
    fuse(model)
    adapters = inject_adapters(model, AdapterSettings(lora_r=4), seed=1)
    parameters = [p for p in adapters.parameters() if p.requires_grad]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.1)
    return model, parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_micro_batches_in_turn(dtype: torch.dtype, one_thread: None) -> None:
    model, parameters = model_and_parameters(dtype)
    settings = DataSettings(global_batch_size=12, micro_batch_tokens=80, micro_batches_at_once=2, share_prompts=False)
    batches = BatchPlan(Rows(), settings, seed=1, num_epochs=1, pad_token_id=0).micro_batches(0)
    assert len(batches) % 2 == 0 and len(batches) >= 4

    def gradients(backward) -> tuple[list[Tensor | None], list[Tensor]]:
        losses = list(backward(batches, lambda i, batch: batch_loss_sum(model, batch), 100.0))
        found = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return losses, found

    expected_losses, expected = gradients(in_turn)
    side_by_side = SideBySide(parameters, at_once=2)
    for _ in range(20):
        losses, found = gradients(side_by_side)
        assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert any(g.abs().sum() > 0 for g in found)
    groups = [m.shared_input for m in model.modules() if isinstance(m, LoRALinear) and m.shared_input is not None]
    assert len(groups) == 3 * (3 + 2)  # q, k and v; gate and up: no thread took another's outputs for its own


def test_memory_that_runs_out_ends_the_step_and_errors_come_through(one_thread: None) -> None:
    parameter = torch.ones(3, requires_grad=True)
    batches = [fakes.batch_of([i]) for i in range(4)]

    def forward(i: int, batch) -> Tensor:
        if i == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")
        if i == 3:
            raise ValueError("something else")
        return (parameter * (i + 1)).sum()

    for backward in (in_turn, SideBySide([parameter], at_once=2)):
        parameter.grad = None
        losses = list(backward(batches, forward, 1.0))
        assert [loss if loss is None else loss.item() for loss in losses] == [3.0, 6.0, None]
        assert torch.equal(parameter.grad, torch.full((3,), 3.0))
        with pytest.raises(ValueError, match="something else"):
            list(backward(batches[:1], lambda i, batch: forward(3, batch), 1.0))


def test_a_stop_waits_for_what_is_being_computed(one_thread: None) -> None:
    parameter = torch.ones(1, requires_grad=True)
    running, most, release = set(), [0], threading.Event()

    def forward(i: int, batch) -> Tensor:
        running.add(i)
        most[0] = max(most[0], len(running))
        if i == 1:
            release.wait(10)
        running.discard(i)
        return parameter.sum()

    backward = SideBySide([parameter], at_once=2)
    with (
        pytest.raises(KeyboardInterrupt),
        contextlib.closing(backward([fakes.batch_of([i]) for i in range(6)], forward, 1.0)) as losses,
    ):
        for _ in losses:
            threading.Timer(0.2, release.set).start()
            raise KeyboardInterrupt
    assert not running and most[0] == 2


def settings(**changes):
    values = {"micro_batches_at_once": None, "micro_batch_size": None, "micro_batch_tokens": 2048, "pack": True}
    return SimpleNamespace(**values | {"profile": False, "method": "lora", "lora_dropout": 0.0} | changes)


OBSTACLES = {
    "on one thread": {"profile": True},
    "no budget": {"pack": False},
    "auto": {"micro_batch_size": "auto"},
    "random numbers": {"lora_dropout": 0.1},
    "masters": {"method": "full"},
}


def test_how_many_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, _ = model_and_parameters(torch.float32)
    how = {"longest": 2048}
    assert choose_at_once(settings(), model, **how) == 2
    assert choose_at_once(settings(), model, **how | {"longest": 2049}) == 1
    assert choose_at_once(settings(micro_batches_at_once=3), model, **how | {"longest": 2049}) == 3
    for changes in OBSTACLES.values():
        assert choose_at_once(settings(**changes), model, **how) == 1
        assert choose_at_once(settings(micro_batches_at_once=1, **changes), model, **how) == 1
        with pytest.raises(ConfigError, match=r"--micro-batches-at-once 2 is not possible: .*; leave it out"):
            choose_at_once(settings(micro_batches_at_once=2, **changes), model, **how)
    with pytest.raises(ConfigError, match="must be at least 1, not 0"):
        choose_at_once(settings(micro_batches_at_once=0), model, **how)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert choose_at_once(settings(), model, **how) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_at_once(settings(), model, **how) == 1
    assert backward_of([], at_once=1) is in_turn


def test_a_run_resumes_bit_for_bit(tiny_folder: Path, tmp_path: Path, one_thread: None) -> None:
    import json

    from finerank.checkpoints.native import read_checkpoint
    from finerank.cli import main

    rows = [
        {"instruction": f"Name {i} things", "output": " ".join(str(i * k) for k in range(i % 7 + 3))} for i in range(24)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    flags = f"--load {tiny_folder} --data-path {data} --seq-length 128 --global-batch-size 8 --micro-batch-tokens 128"
    flags += " --micro-batches-at-once 2 --no-tune-runtime --train-iters 6 --save-interval 2 --keep-last 9"

    def tune(folder: Path, *more: str) -> None:
        assert main(["tune", *flags.split(), "--output-dir", str(folder), *more]) == 0

    tune(tmp_path / "whole")
    tune(tmp_path / "again", "--resume", str(tmp_path / "whole" / "checkpoint-2"))
    whole, again = (read_checkpoint(tmp_path / name / "checkpoint-6").tensors for name in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
