"""Where a non-finite number is said to come from: module and rows, packed, padded, fused or not, backward too."""

import itertools
from pathlib import Path

import pytest
import torch

from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.data.batch import Batch
from finerank.models.attention import use_packed_attention
from finerank.models.forward import verified_head
from finerank.models.fused.fuse import fuse
from finerank.train.held_out import batch_loss_sum
from finerank.train.nonfinite import find_nonfinite, read_replay, write_replay
from tiny import tiny_model

SEEDS = [(1, 2, 3)]
IDS = torch.tensor([[5, 6, 7, 8, 5, 9, 10, 11, 12]])
ENDS = (4, 7, 9)
"""Of three rows; the token 7 is in the first one, 11 and 12 are the last."""


def packed() -> Batch:
    starts = (0, *ENDS)
    position_ids = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(starts)])[None]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    return Batch(input_ids=IDS, target_ids=IDS, position_ids=position_ids, cu_seqlens=cu_seqlens, rows=(30, 10, 20))


def padded() -> Batch:
    parts = [IDS[0, a:b] for a, b in itertools.pairwise((0, *ENDS))]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], batch_first=True)
    targets = torch.where(mask.bool(), ids, -100)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(input_ids=ids, target_ids=targets, position_ids=positions, attention_mask=mask, rows=(30, 10, 20))


def adapted(*, fused: bool, pack: bool = True) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    model = tiny_model("llama")
    if pack:
        use_packed_attention(model)
    if fused:
        fuse(model)
    verified_head(model)  # once for a model, as tune does it, so that nothing else runs between the hooks
    return model.train(), dict(inject_adapters(model, AdapterSettings(lora_r=2), seed=1).named_parameters())


def test_finite_numbers_are_no_finding() -> None:
    model, _ = adapted(fused=True)
    assert find_nonfinite(model, [packed()], loss_function=batch_loss_sum, seeds=SEEDS) is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("module", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_bad_factor_is_named_with_its_module(fused: bool, module: str, factor: str) -> None:
    model, parameters = adapted(fused=fused)
    (name,) = [name for name in parameters if module in name and factor in name]
    parameters[name].data[0, 0] = float("inf")
    finding = find_nonfinite(model, [packed()], loss_function=batch_loss_sum, seeds=SEEDS)
    assert finding is not None and finding.rows == (30, 10, 20)
    assert finding.place == f"the output of model.{module} (its {factor} is not finite)"


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("token", "rows"), [(7, (30,)), (11, (20,)), (5, (30, 10))])
def test_only_the_rows_with_bad_numbers_are_named(pack: bool, token: int, rows: tuple[int, ...]) -> None:
    model, _ = adapted(fused=True, pack=pack)
    model.get_input_embeddings().weight.data[token] = float("nan")
    batch = packed() if pack else padded()
    finding = find_nonfinite(model, [batch], loss_function=batch_loss_sum, seeds=SEEDS)
    assert finding is not None and finding.rows == rows
    assert finding.place == "the output of model.embed_tokens (its weight is not finite)"


def test_a_bad_gradient_is_named_where_it_first_comes_back() -> None:
    model, _ = adapted(fused=True)
    batch, seen = packed(), []
    model.model.norm.register_forward_hook(lambda _m, _i, output: seen.append(output))

    def loss_function(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        loss = batch_loss_sum(model, batch)
        return loss + (seen[-1][:, 5] * 0.0).sqrt().sum()  # finite, but its slope is not: at a position of row 10

    finding = find_nonfinite(model, [batch], loss_function=loss_function, seeds=SEEDS)
    assert finding is not None and finding.rows == (10,)
    assert finding.place == "the gradient of the output of model.norm"


def test_a_bad_loss_over_finite_outputs_is_said_as_such() -> None:
    model, _ = adapted(fused=True)
    finding = find_nonfinite(
        model, [packed()], loss_function=lambda m, b: batch_loss_sum(m, b) * float("inf"), seeds=SEEDS
    )
    assert finding is not None and finding.place.startswith("the loss itself") and finding.rows == (30, 10, 20)


def test_a_replay_file_brings_back_every_bit(tmp_path: Path) -> None:
    _, parameters = adapted(fused=False)
    batches, path = [packed(), padded()], tmp_path / "replay.safetensors"
    write_replay(path, step=3, batches=batches, seeds=[(1, 2, 0), (1, 2, 1)], parameters=parameters)
    replay = read_replay(path)
    assert replay.step == 3 and replay.seeds == [(1, 2, 0), (1, 2, 1)]
    for before, after in zip(batches, replay.batches, strict=True):
        assert before.rows == after.rows
        for name in ("input_ids", "target_ids", "position_ids", "cu_seqlens", "attention_mask"):
            a, b = getattr(before, name), getattr(after, name)
            assert (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and torch.equal(a, b)))
    assert parameters.keys() == replay.parameters.keys()
    assert all(torch.equal(parameters[name], replay.parameters[name]) for name in parameters)
