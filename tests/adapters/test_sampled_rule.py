"""LU-LoRA's sampled rule: exact gradients from a part of the rows, and nothing of the others below the boundary."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_lu_lora import batch
from torch import Tensor, nn

from finerank import cli
from finerank.adapters.inject import AdapterSet, inject_adapters
from finerank.adapters.local_learning import LocalLearning
from finerank.adapters.lora import LoRALinear
from finerank.adapters.lu_lora import sample_share, start_local_learning
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.native import read_checkpoint
from finerank.data.batch import Batch
from finerank.data.loader import BatchPlan
from finerank.data.settings import BatchSettings
from finerank.errors import AdapterError, ConfigError
from finerank.models.forward import verified_head
from finerank.train.held_out import batch_loss_sum
from finerank.train.micro_batches import SideBySide, in_turn
from tiny import VOCAB_SIZE, save_tiny, tiny_model

NUM_LAYERS = 4


def make(last: int = 1, family: str = "llama", **settings: Any) -> tuple[nn.Module, AdapterSet, LocalLearning]:
    """A model whose adapters are not at their start any more, so that every factor has a gradient."""
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS).requires_grad_(False)
    chosen = AdapterSettings(lora_r=4, lu_lora_final_layer_index=last, lu_lora_rule="sampled", **settings)
    adapters = moved(inject_adapters(model, chosen, seed=1))
    local = start_local_learning(adapters, chosen, lr=1e-2, seed=1)
    assert local is not None
    verified_head(model)  # or else the first pass would begin with its trial
    return model, adapters, local


def make_lora(family: str = "llama") -> tuple[nn.Module, AdapterSet]:
    """The same adapters, all backpropagated."""
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS).requires_grad_(False)
    return model, moved(inject_adapters(model, AdapterSettings(lora_r=4), seed=1))


@torch.no_grad()
def moved(adapters: AdapterSet) -> AdapterSet:
    for i, layer in enumerate(adapters.layers.values()):
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i)).mul_(0.05))
    return adapters


def in_sample(one: Batch) -> Batch:
    return dataclasses.replace(one, is_sample=True)


def step(model: nn.Module, local: LocalLearning, batches: Sequence[Batch], *, backward: Any = in_turn) -> None:
    """As the training loop takes it, up to the gradients."""
    counts = [one.num_trained_tokens for one in batches]
    model.train()
    local.begin_step(0, sampled=[one.is_sample for one in batches], num_rows=[len(one.rows) for one in batches])

    def forward(i: int, one: Batch) -> Tensor:
        local.begin_micro_batch(i)
        return batch_loss_sum(model, one)

    assert None not in list(backward(batches, forward, sum(counts)))


def gradients(adapters: AdapterSet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in adapters.named_parameters()}


def is_local(name: str, last: int = 1) -> bool:
    return int(name.split("layers.")[1].split(".")[0]) <= last


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_local_factors_get_the_gradient_of_the_sample(family: str):
    """By plain backpropagation: below the boundary the sample's, times all rows over its rows; above, that of all."""
    sample, others = [in_sample(batch(0)), in_sample(batch(1, rows=1))], [batch(2, rows=3), batch(3, rows=2, length=7)]
    model, adapters, local = make(family=family)
    step(model, local, [*sample, *others])
    found = gradients(adapters)
    wanted = {}
    for rows in (sample, sample + others):
        plain, lora = make_lora(family)
        plain.train()
        count = sum(one.num_trained_tokens for one in sample + others)
        num_rows = [sum(len(one.rows) for one in part) for part in (sample + others, rows)]
        for one in rows:
            (batch_loss_sum(plain, one) / count * (num_rows[0] / num_rows[1])).backward()
        wanted[len(rows)] = gradients(lora)
    assert len(found) == 2 * 7 * NUM_LAYERS
    for name, gradient in found.items():
        right, wrong = (wanted[2], wanted[4]) if is_local(name) else (wanted[4], wanted[2])
        torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-6)
        assert (gradient - right[name]).norm() < 0.01 * (gradient - wrong[name]).norm(), name


def test_a_sample_of_all_rows_is_lora():
    batches = [in_sample(batch(0)), in_sample(batch(1, rows=1))]
    model, adapters, local = make(lu_lora_sample=1.0)
    step(model, local, batches)
    plain, lora = make_lora()
    plain.train()
    count = sum(one.num_trained_tokens for one in batches)
    for one in batches:
        (batch_loss_sum(plain, one) / count).backward()
    for name, gradient in gradients(adapters).items():
        assert torch.equal(gradient, gradients(lora)[name]), name


def test_only_the_sample_has_a_graph_below_the_boundary():
    model, _, local = make()
    has_graph: list[list[bool]] = []
    for i in range(NUM_LAYERS):
        model.model.layers[i].mlp.down_proj.register_forward_hook(
            lambda m, _i, out: has_graph[-1].append(out.grad_fn is not None) and None
        )

    model.train()
    batches = [batch(0), in_sample(batch(1)), batch(2)]
    local.begin_step(0, sampled=[one.is_sample for one in batches], num_rows=[1, 1, 1])
    for i, one in enumerate(batches):
        has_graph.append([])
        local.begin_micro_batch(i)
        batch_loss_sum(model, one).backward()
    assert has_graph == [[False, False, True, True], [True] * 4, [False, False, True, True]]
    has_graph.append([])
    with torch.no_grad():
        local.begin_micro_batch(1)
        batch_loss_sum(model.eval(), batches[1])
    assert has_graph[-1] == [False] * 4


@pytest.mark.usefixtures("one_thread")  # products shared by threads differ in the last bits
def test_side_by_side_is_in_turn():
    batches = [in_sample(batch(0)), in_sample(batch(1, rows=1)), batch(2, rows=3), batch(3, rows=2, length=7)]
    found = []
    for at_once in (1, 2):
        model, adapters, local = make()
        trained = list(adapters.parameters())
        step(model, local, batches, backward=in_turn if at_once == 1 else SideBySide(trained, at_once=at_once))
        found.append(gradients(adapters))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_a_step_without_a_sample_is_said():
    model, _, local = make()
    step(model, local, [batch(0)])
    with pytest.raises(AdapterError, match="no local layer saw a training pass"):
        local.apply_local_update(lr_factor=1.0)


def test_after_freezing_no_row_has_a_graph_below():
    model, adapters, local = make(lu_lora_freeze_after=0)
    step(model, local, [in_sample(batch(0)), batch(1)])
    local.apply_local_update(lr_factor=1.0)
    for name, gradient in gradients(adapters).items():
        assert (gradient is None) == is_local(name), name


def test_rates_of_local_factors():
    _, adapters, _ = make(lu_lora_lr=0.03, lu_lora_lr_ratio=2.0)
    for name, layer in adapters.layers.items():
        rates = [adapters.lr_ratios.get(p, 1.0) for p in (layer.lora_A, layer.lora_B)]
        assert rates == pytest.approx([3.0, 6.0] if is_local(name) else [1.0, 1.0]), name


class _Rows:
    """A data set of rows of 1 to 9 tokens."""

    reference = None

    def __init__(self, num: int):
        self.lengths = np.arange(num) % 9 + 1
        self.trained_lengths = self.lengths - 1

    def __len__(self) -> int:
        return len(self.lengths)

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        ids = np.full(self.lengths[row], row % VOCAB_SIZE, np.int32)
        return [(ids, ids)]


@pytest.mark.parametrize(
    "how", [{}, {"pack": False, "micro_batch_size": 8}, {"micro_batches_at_once": 2}], ids=["packed", "padded", "two"]
)
@pytest.mark.parametrize(("share", "budget", "most"), [(0.25, 10, 2), (0.5, 20, 4), (0.05, 10, 2)])
def test_the_plan_sets_the_sample_apart(how: dict[str, Any], share: float, budget: int, most: int):
    settings = BatchSettings(**{"global_batch_size": 16, "micro_batch_tokens": 40, "share_prompts": False} | how)
    given = {"seed": 3, "num_epochs": 2, "pad_token_id": 0}
    plan = BatchPlan(_Rows(70), settings, sample_share=share, **given)
    plain = BatchPlan(_Rows(70), settings, **given)
    again = BatchPlan(_Rows(70), settings, sample_share=share, **given)
    samples = []
    for number in reversed(range(plan.num_steps)):
        batches = plan.micro_batches(number)
        assert plan.rows(number) == plain.rows(number)
        assert sorted(row for one in batches for row in one.rows) == sorted(plan.rows(number))
        sample = [row for one in batches if one.is_sample for row in one.rows]
        assert len(sample) == max(1, round(share * len(plan.rows(number))))
        for one in batches:
            assert one.num_tokens <= (40 if not one.is_sample else budget) or not settings.pack
            assert len(one.rows) <= (8 if not one.is_sample else most) or settings.pack
        assert [one.rows for one in again.micro_batches(number)] == [one.rows for one in batches]
        assert [one.is_sample for one in batches] == sorted((one.is_sample for one in batches), reverse=True)
        trained = {row: _Rows(70).lengths[row] - 1 for row in plan.rows(number)}
        groups = np.array_split(sorted(trained.values()), len(sample))
        for row_trained, group in zip(sorted(trained[row] for row in sample), groups, strict=True):
            assert group[0] <= row_trained <= group[-1]
        samples.append(sorted(row % 16 for row in sample))
        assert not any(one.is_sample for one in plain.micro_batches(number))
    assert len({tuple(s) for s in samples}) > 1
    assert len(BatchPlan(_Rows(70), settings, sample_share=0.001, **given).sample(0)) == 1
    first = BatchPlan(_Rows(70), settings, sample_share=share, num_sampled_steps=2, **given)
    assert [bool(first.sample(number)) for number in range(4)] == [True, True, False, False]
    assert first.sample(1) == plan.sample(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lu_lora_sample": 0.5}, "no effect without --lu-lora-final-layer-index"),
        ({"lu_lora_sample": 0.5, "lu_lora_final_layer_index": 1, "lu_lora_rule": "frozen"}, "no effect with"),
        ({"lu_lora_sample": 0.0, "lu_lora_final_layer_index": 1, "lu_lora_rule": "sampled"}, "above 0 and at most 1"),
        ({"lu_lora_sample": 1.5, "lu_lora_final_layer_index": 1, "lu_lora_rule": "sampled"}, "above 0 and at most 1"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], words: str):
    chosen = AdapterSettings(**settings)
    with pytest.raises(ConfigError, match=words) as caught:
        start_local_learning(
            inject_adapters(tiny_model("llama", num_hidden_layers=NUM_LAYERS), chosen, seed=1), chosen, lr=1e-3, seed=1
        )
    assert "\n" not in str(caught.value)


def test_share_by_rule():
    def share(rule: str, last: int | None = 1) -> float | None:
        return sample_share(AdapterSettings(lu_lora_final_layer_index=last, lu_lora_rule=rule))

    assert (share("sampled"), share("feedback"), share("feedback", None)) == (0.375, None, None)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path):
    """With the program itself; every factor moves."""
    base = save_tiny(tmp_path / "base", num_hidden_layers=NUM_LAYERS)
    words = ["red", "green", "blue", "one", "two"]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Say {words[i % 5]}.", "output": words[i % 5]} for i in range(24)]))
    usual = f"--load {base} --data-path {rows} --no-tune-runtime --device cpu --dtype bf16 --lora-r 4 --lr 0.02"
    usual += " --global-batch-size 8 --micro-batch-tokens 256 --num-epochs 2 --save-interval 2 --keep-last 9"
    usual += " --log-interval 1000 --lu-lora-final-layer-index 1 --lu-lora-rule sampled"
    for run, more in (("whole", []), ("again", ["--resume", str(tmp_path / "whole" / "checkpoint-2")])):
        assert cli.main(["tune", *usual.split(), "--output-dir", str(tmp_path / run), *more]) == 0
    tensors, others = (read_checkpoint(tmp_path / run / "checkpoint-6").tensors for run in ("whole", "again"))
    start = read_checkpoint(tmp_path / "whole" / "checkpoint-2").tensors
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
        if name.startswith("parameter/"):
            assert not torch.equal(tensor, start[name]), name


def test_both_factors_of_every_local_linear_learn():
    _, adapters, local = make()
    for layer in adapters.layers.values():
        assert isinstance(layer, LoRALinear) and layer.lora_A.requires_grad and layer.lora_B.requires_grad
    assert len(local.rule.layers) == 14
