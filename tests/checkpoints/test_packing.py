"""Packing and splitting against the row-by-row reference, and their inverses, over random shapes."""

import packing_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finerank.checkpoints import packing
from finerank.checkpoints.layout import Layout
from finerank.errors import ConfigError
from finerank.models.families import Dims, family_named

LLAMA = {rule.megatron: rule for rule in family_named("llama").layer_rules}
QKV, FC1 = LLAMA["self_attention.linear_qkv"], LLAMA["mlp.linear_fc1"]
PROJ = LLAMA["self_attention.linear_proj"]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[Dims, int]:
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp * draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 4))
    return Dims(1, draw(st.integers(1, 9)), heads, groups, draw(st.integers(1, 6)), 10), tp


def numbered(*shape: int) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(count, dtype=torch.float32).reshape(shape)


@settings(max_examples=80, deadline=None)
@given(sizes(), st.booleans())
def test_qkv_equals_the_reference_and_comes_back(case: tuple[Dims, int], is_bias: bool) -> None:
    dims, tp = case
    rest = () if is_bias else (dims.hidden_size,)
    rows = [dims.num_attention_heads * dims.head_dim] + [dims.num_key_value_heads * dims.head_dim] * 2
    q, k, v = (1000 * i + numbered(n, *rest) for i, n in enumerate(rows))
    packed = packing.pack("qkv", [q, k, v], dims)
    expected = reference.pack_qkv(
        q, k, v, heads=dims.num_attention_heads, groups=dims.num_key_value_heads, d=dims.head_dim
    )
    assert torch.equal(packed, expected)
    shards = packing.split(QKV, packed, tp, dim=0)
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, reference.rows_of_rank(expected, tp=tp, rank=rank))
    again = packing.unpack("qkv", packing.join(QKV, shards, dim=0), dims)
    assert all(torch.equal(a, b) for a, b in zip(again, (q, k, v), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_gate_up_equals_the_reference_and_comes_back(tp: int, share: int, hidden: int) -> None:
    gate, up = numbered(tp * share, hidden), 1000 + numbered(tp * share, hidden)
    shards = packing.split(FC1, packing.pack("gate_up", [gate, up], Dims(1, hidden, 1, 1, 1, 1)), tp, dim=0)
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, reference.fc1_of_rank(gate, up, tp=tp, rank=rank))
    again = packing.unpack("gate_up", packing.join(FC1, shards, dim=0), Dims(1, hidden, 1, 1, 1, 1))
    assert torch.equal(again[0], gate) and torch.equal(again[1], up)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_row_parallel_equals_the_reference_and_comes_back(tp: int, share: int, out: int) -> None:
    weight = numbered(out, tp * share)
    shards = packing.split(PROJ, weight, tp, dim=packing.split_dim(PROJ, ".weight"))
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, reference.columns_of_rank(weight, tp=tp, rank=rank))
    assert torch.equal(packing.join(PROJ, shards, dim=1), weight)


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 128))
def test_padding_is_the_next_multiple_and_repeats_the_last_row(vocab: int, tp: int, divisible_by: int) -> None:
    rows = packing.padded_vocab_size(vocab, tp=tp, divisible_by=divisible_by)
    assert rows % (tp * divisible_by) == 0 and vocab <= rows < vocab + tp * divisible_by
    weight = numbered(vocab, 2)
    padded = packing.pad_vocab(weight, rows)
    assert torch.equal(padded[:vocab], weight) and all(torch.equal(row, weight[-1]) for row in padded[vocab:])


@pytest.mark.parametrize(
    "rule,suffix,dim",
    [
        *[(QKV, ".weight", 0), (QKV, ".bias", 0), (QKV, ".lora_A", None), (QKV, ".lora_B", 0)],
        *[(PROJ, ".weight", 1), (PROJ, ".bias", None), (PROJ, ".lora_A", 1), (PROJ, ".lora_B", None)],
    ],
)
def test_which_dimension_ranks_share(rule: object, suffix: str, dim: int | None) -> None:
    assert packing.split_dim(rule, suffix) == dim  # type: ignore[arg-type]


def test_virtual_stages_interleave_as_the_specification_says() -> None:
    layout = Layout.make(num_layers=4, pp=2, layers_per_virtual_stage=1)
    assert layout.chunks == [[[0], [2]], [[1], [3]]]
    assert layout.head_at == (1, 1)


def test_dualpipev_folds_the_layers_back() -> None:
    layout = Layout.make(num_layers=8, pp=2, schedules_method="dualpipev")
    assert layout.chunks == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]
    assert layout.head_at == (0, 1)


def test_noop_layers_take_an_index() -> None:
    layout = Layout.make(num_layers=3, pp=2, noop_layers=[3])
    assert layout.chunks == [[[0, 1]], [[2, None]]]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, dict[str, object]]:
    pp = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["even", "uneven", "virtual", "noop", "dualpipev"]))
    if kind == "uneven":
        counts = draw(st.lists(st.integers(1, 4), min_size=pp, max_size=pp))
        return sum(counts), {"pp": pp, "num_layer_list": counts}
    if kind == "virtual" and pp > 1:
        c, chunks = draw(st.integers(1, 3)), draw(st.integers(2, 3))
        return pp * c * chunks, {"pp": pp, "layers_per_virtual_stage": c}
    per_stage = draw(st.integers(1, 4))
    if kind == "dualpipev":
        return 2 * pp * per_stage, {"pp": pp, "schedules_method": "dualpipev"}
    if kind == "noop" and per_stage > 1:
        noops = draw(st.lists(st.integers(0, pp * per_stage - 1), unique=True, max_size=per_stage - 1))
        return pp * per_stage - len(noops), {"pp": pp, "noop_layers": noops}
    return pp * per_stage, {"pp": pp}


@given(layouts())
def test_every_layout_holds_each_layer_once(case: tuple[int, dict[str, object]]) -> None:
    num_layers, options = case
    layout = Layout.make(num_layers=num_layers, **options)  # type: ignore[arg-type]
    found = [slot for stage in layout.chunks for chunk in stage for slot in chunk if slot is not None]
    assert sorted(found) == list(range(num_layers))
    stage, chunk = layout.head_at
    assert num_layers - 1 in layout.chunks[stage][chunk] or None in layout.chunks[stage][chunk]


@pytest.mark.parametrize(
    "options,match",
    [
        ({"pp": 2}, "do not divide"),
        ({"pp": 2, "num_layer_list": [3, 1]}, "add up to 5"),
        ({"pp": 2, "num_layer_list": [5, 0]}, "above 0"),
        ({"layers_per_virtual_stage": 1}, "at least 2 stages"),
        ({"tp": 0}, "at least 1"),
        ({"noop_layers": [9]}, "from 0 to 5"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Layout.make(num_layers=5, **options)  # type: ignore[arg-type]
