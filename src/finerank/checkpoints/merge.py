"""Fold an adapter into its base: plan, then apply while the tensors stream past.

    plan = plan_merge(base, adapter)                # checks everything, reads no weight
    merged = merged_model(base, plan)               # a BaseModel whose weights are merged when read
    hf.write(merged, folder); merged.weights.report # what the merge did to the bits

Arithmetic: `W' = W + scale * B A` (DoRA: times `m / row length`) in fp32, block of rows by block of rows, rounded once
to the base's own dtype. The fp32 sum before that rounding is what the errors in the report are measured against.
A tied embedding stays tied where both sides change alike; otherwise both are written and the config says so.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints.expert_factors import expand_experts
from finerank.checkpoints.lora import Adapter, Factors, Rows
from finerank.checkpoints.weights import HEAD, BaseModel, TensorInfo, Weights, same_bits
from finerank.errors import AdapterError, NumericsError, unknown_name

_BLOCK_ELEMENTS = 1 << 20  # 4 MB in fp32: the dozen passes over a block stay in the cache


@dataclass(frozen=True)
class Change:
    """What happens to one tensor of the base."""

    source: str
    """The base's tensor that is changed; another name than the result's when a tied head is untied."""
    factors: Factors | None = None
    whole: Tensor | None = None
    """Takes the tensor's place, before `factors` are added (PEFT saves an adapted embedding's base along)."""
    rows: Rows | None = None
    """Take the place of rows, or lie beyond them."""

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """Of the result, from the base tensor's."""
        if self.whole is not None:
            return tuple(self.whole.shape)
        return base if self.rows is None else (max(base[0], 1 + max(self.rows.ids)), *base[1:])


@dataclass(frozen=True)
class MergePlan:
    """What merging will do, by result tensor name. Prints with `describe`."""

    changes: dict[str, Change]
    """Tensors that change, or that are new (an untied head); all others are copied."""
    dropped: frozenset[str]
    """Tensors of the base that the result does not have (a head that is tied anyway)."""
    config: dict[str, Any]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line."""
        low = sum(c.factors is not None for c in self.changes.values())
        whole = sum(c.whole is not None for c in self.changes.values())
        rows = sum(c.rows is not None for c in self.changes.values())
        text = f"{low} tensors get a low-rank change" + (f", {whole} are replaced whole" if whole else "")
        text += f", {rows} get rows for tokens" if rows else ""
        return "; ".join((text, *self.notes))


@dataclass
class TensorReport:
    """What the merge did to one tensor."""

    name: str
    numel: int
    num_changed: int
    """Elements whose bits differ from the base's."""
    max_error: float
    """Largest |rounded - exact fp32 sum|."""
    sum_error: float
    sum_squared_error: float
    sum_squared_update: float
    """Squared length of the exact change."""


@dataclass
class MergeReport:
    """What the merge did to all weights; grows as tensors are read."""

    tensors: dict[str, TensorReport] = field(default_factory=dict)

    def totals(self) -> dict[str, Any]:
        """Shares and errors over all changed tensors, as JSON values."""
        rows = list(self.tensors.values())
        numel = sum(r.numel for r in rows)
        update = math.sqrt(sum(r.sum_squared_update for r in rows))
        error = math.sqrt(sum(r.sum_squared_error for r in rows))
        return {
            "num_tensors_changed": sum(r.num_changed > 0 for r in rows),
            "num_tensors_with_adapter": len(rows),
            "num_weights_with_adapter": numel,
            "num_weights_changed": sum(r.num_changed for r in rows),
            "share_of_weights_changed": sum(r.num_changed for r in rows) / numel if numel else 0.0,
            "max_rounding_error": max((r.max_error for r in rows), default=0.0),
            "mean_rounding_error": sum(r.sum_error for r in rows) / numel if numel else 0.0,
            "rounding_error_relative_to_update": error / update if update else 0.0,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object a tensor, in the order they were merged."""
        return [asdict(r) for r in self.tensors.values()]


def plan_merge(base: BaseModel, adapter: Adapter) -> MergePlan:
    """Which tensors change and how. Reads no weight of the base.

    Raises:
        AdapterError: a module or tensor that the base does not have, or of another shape.
    """
    adapter = expand_experts(adapter, base.config)
    changes: dict[str, Change] = {}
    for module, factors in adapter.factors.items():
        name = _tensor_name(base, f"{module}.weight", adapter)
        changes[name] = Change(_source_of(base, name), factors=factors)
    for tensor_name, tensor in adapter.whole.items():
        name = _tensor_name(base, tensor_name, adapter)
        low_rank = changes[name].factors if name in changes else None
        changes[name] = Change(_source_of(base, name), factors=low_rank, whole=tensor)
    for module, rows in adapter.rows.items():
        name = _tensor_name(base, f"{module}.weight", adapter)
        if name in changes:
            raise AdapterError(f"{adapter.source} changes {name} in two ways; merge it with PEFT itself.")
        changes[name] = Change(_source_of(base, name), rows=rows)
    for name, change in changes.items():
        _check_shape(base, name, change, adapter)
    config = dict(base.config)
    notes = list(_untie(base, adapter, changes, config))
    notes += _resize_vocabulary(base, adapter, changes, config)
    dropped = frozenset({HEAD} if config.get("tie_word_embeddings") and HEAD in base.weights else ())
    return MergePlan(changes, dropped, config, tuple(notes))


def _tensor_name(base: BaseModel, name: str, adapter: Adapter) -> str:
    """The base's spelling of an adapter's tensor; files of bare backbones lack the leading `model.`."""
    if name in base.weights or (name == HEAD and base.is_tied):
        return name
    for other in (f"model.{name}", name.removeprefix("model.")):
        if other in base.weights:
            return other
    known = [n for n in base.weights if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    raise AdapterError(f"{adapter.source} does not belong to this base model: {unknown_name('tensor', name, known)}")


def _source_of(base: BaseModel, name: str) -> str:
    if name == HEAD and base.is_tied:
        if base.embedding_name is None:
            raise AdapterError(f"The base ties {HEAD} to an embedding that is not in its files; give a whole base.")
        return base.embedding_name
    return name


def _check_shape(base: BaseModel, name: str, change: Change, adapter: Adapter) -> None:
    info = base.weights.info(change.source)
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        raise AdapterError(f"The base stores {change.source} as {info.dtype}; dequantise the base before merging.")
    if change.rows is not None:
        beyond = set(range(info.shape[0], change.shape(info.shape)[0]))
        if not beyond <= set(change.rows.ids) or change.rows.values_ND.shape != (len(change.rows.ids), info.shape[1]):
            raise AdapterError(
                f"{adapter.source}: its rows of {name} do not fit {list(info.shape)}; give its own base."
            )
    if change.factors is None:
        return
    shape = tuple(change.whole.shape) if change.whole is not None else info.shape
    if shape != change.factors.weight_shape:
        raise AdapterError(
            f"{adapter.source}: {name} needs the shape {list(change.factors.weight_shape)}, the base has "
            f"{list(shape)}; give the base it was trained on."
        )
    magnitude = change.factors.magnitude_O
    if magnitude is not None and magnitude.shape != change.factors.b_OR.shape[:1]:
        raise AdapterError(f"{adapter.source}: {name} has a magnitude of shape {list(magnitude.shape)}; train again.")


def _untie(base: BaseModel, adapter: Adapter, changes: dict[str, Change], config: dict[str, Any]) -> Iterator[str]:
    """Keep tied weights tied where both sides stay equal; otherwise give the head its own tensor."""
    embedding = base.embedding_name
    if not base.is_tied or embedding is None:
        return
    at_embedding, at_head = changes.get(embedding), changes.get(HEAD)
    if at_embedding is None and at_head is None:
        return
    tied = bool(adapter.config.get("ensure_weight_tying"))
    if at_head is None and at_embedding is not None:
        shape = base.weights.info(embedding).shape
        if (
            tied or at_embedding.rows is not None or at_embedding.shape(shape) != shape
        ):  # a head of the old size would be of no use, so the embedding was meant for both
            return
        changes[HEAD] = Change(embedding)
    elif at_embedding is not None and at_head is not None and _is_same_change(at_embedding, at_head):
        del changes[HEAD]
        return
    config["tie_word_embeddings"] = False
    yield f"the adapter changed the sides of the tied embedding apart, so {HEAD} is written and the config untied"


def _is_same_change(at_embedding: Change, at_head: Change) -> bool:
    """Both sides of a tied pair become the same."""
    wholes = at_embedding.whole, at_head.whole
    if any(whole is not None for whole in wholes) and not (
        wholes[0] is not None and wholes[1] is not None and same_bits(wholes[0], wholes[1])
    ):
        return False
    low, high = at_embedding.factors, at_head.factors
    if low is None or high is None:
        return low is high
    # the head [V, D] is changed by B A, the embedding [V, D] by (B A)^T
    transposed = same_bits(low.a_RI.T.contiguous(), high.b_OR.contiguous()) and same_bits(
        low.b_OR.T.contiguous(), high.a_RI.contiguous()
    )
    return transposed and low.scale == high.scale and high.magnitude_O is None


def _resize_vocabulary(
    base: BaseModel, adapter: Adapter, changes: dict[str, Change], config: dict[str, Any]
) -> Iterator[str]:
    rows = {}
    for name, change in changes.items():
        old = base.weights.info(change.source).shape
        new = change.shape(old)
        if new != old:
            if name not in (base.embedding_name, HEAD) or new[1:] != old[1:]:
                raise AdapterError(f"{adapter.source}: {name} has shape {list(new)}, the base has {list(old)}.")
            rows[name] = new[0]
    if not rows:
        return
    tied = bool(config.get("tie_word_embeddings"))
    if len(set(rows.values())) != 1 or (not tied and set(rows) != {base.embedding_name, HEAD}):
        raise AdapterError(
            f"{adapter.source} resizes {' and '.join(sorted(rows))} but not embedding and head alike; save both "
            "(PEFT: save_embedding_layers=True)."
        )
    config["vocab_size"] = next(iter(rows.values()))
    yield f"the vocabulary is resized to {config['vocab_size']} rows"


class MergedWeights(Weights):
    """The base's tensors with a plan applied to each as it is read; `report` grows with every changed tensor."""

    def __init__(self, base: Weights, plan: MergePlan):
        self._base, self._plan = base, plan
        self._names = dict.fromkeys(n for n in (*base, *plan.changes) if n not in plan.dropped)
        self.report = MergeReport()

    def __getitem__(self, name: str) -> Tensor:
        change = self._plan.changes.get(name)
        if change is None:
            return self._base[name]
        if change.rows is not None:
            self.report.tensors[name], weight = with_rows(name, self._base[change.source], change.rows)
            return weight
        if change.whole is None:
            weight = self._base[change.source]
            if change.factors is not None:
                self.report.tensors[name] = add_low_rank_(name, weight, change.factors)
            return weight
        info = self._base.info(change.source)
        is_resized = info.shape != tuple(change.whole.shape)
        before = torch.zeros(change.whole.shape, dtype=info.dtype) if is_resized else self._base[change.source]
        row = replace_whole_(name, before, change)
        self.report.tensors[name] = replace(row, num_changed=row.numel) if is_resized else row
        return before

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the merged tensor: the base's dtype."""
        change = self._plan.changes.get(name)
        if change is None:
            return self._base.info(name)
        info = self._base.info(change.source)
        return TensorInfo(change.shape(info.shape), info.dtype)


def merged_model(base: BaseModel, plan: MergePlan) -> BaseModel:
    """The base with a plan applied lazily."""
    return replace(base, config=plan.config, weights=MergedWeights(base.weights, plan))


def add_low_rank_(name: str, weight: Tensor, factors: Factors) -> TensorReport:
    """Merge one adapter into a weight, in place, and report. Needs memory for one block of rows beside it.

    Args:
        name: for the report and for errors.
        weight: the stored weight [O, I] (embedding [V, D]; Conv1D [I, O]) in the base's dtype.
        factors: the change.

    Raises:
        NumericsError: the result is not finite in the weight's dtype.
    """
    work = torch.promote_types(weight.dtype, torch.float32)  # fp64 for an fp64 base
    left, right = factors.b_OR.to(work), factors.a_RI.to(work)
    if factors.is_embedding or factors.is_transposed:
        left, right = right.T.contiguous(), left.T.contiguous()
    report = TensorReport(name, weight.numel(), 0, 0.0, 0.0, 0.0, 0.0)
    rescale = _dora_rescale(weight, left, right, factors)
    num_rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], num_rows):
        rows = weight[start : start + num_rows]
        exact = torch.addmm(rows.to(work), left[start : start + num_rows], right, alpha=factors.scale)
        if rescale is not None:
            exact *= rescale if factors.is_transposed else rescale[start : start + num_rows]
        _round_into(rows, exact, report)
    return report


def _dora_rescale(weight: Tensor, left: Tensor, right: Tensor, factors: Factors) -> Tensor | None:
    """DoRA's `m / ||W + scale B A||` to be multiplied to the sum: a column [O, 1], or a row [O] for Conv1D."""
    if factors.magnitude_O is None:
        return None
    squares = torch.zeros(factors.magnitude_O.shape[0], dtype=left.dtype)
    num_rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], num_rows):
        block = slice(start, start + num_rows)
        exact = torch.addmm(weight[block].to(left.dtype), left[block], right, alpha=factors.scale)
        if factors.is_transposed:
            squares += exact.square().sum(0)
        else:
            squares[block] = exact.square().sum(1)
    rescale = factors.magnitude_O.to(left.dtype) / squares.sqrt()
    return rescale if factors.is_transposed else rescale[:, None]


def replace_whole_(name: str, weight: Tensor, change: Change) -> TensorReport:
    """Put a tensor that was trained whole into the base's, with its low-rank change if it has one, and report."""
    assert change.whole is not None
    exact = change.whole.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    if change.factors is not None:
        add_low_rank_(name, exact, change.factors)
    report = TensorReport(name, weight.numel(), 0, 0.0, 0.0, 0.0, 0.0)
    _round_into(weight, exact, report)
    return report


def with_rows(name: str, weight: Tensor, rows: Rows) -> tuple[TensorReport, Tensor]:
    """(report, the weight with these rows in place of its own, longer where they lie beyond it)."""
    num_new = 1 + max(rows.ids) - weight.shape[0]
    if num_new > 0:
        weight = torch.cat([weight, weight.new_zeros(num_new, weight.shape[1])])
    report = TensorReport(name, weight.numel(), 0, 0.0, 0.0, 0.0, 0.0)
    index = torch.tensor(rows.ids)
    changed = weight[index]
    _round_into(changed, rows.values_ND.to(torch.promote_types(weight.dtype, torch.float32)), report)
    weight[index] = changed
    return report, weight


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _round_into(rows: Tensor, exact: Tensor, report: TensorReport) -> None:
    """Round `exact` (fp32) into `rows` (the base's dtype), the one rounding of a merge, and count."""
    rounded = exact.to(rows.dtype)
    integer = _INTEGERS[rows.dtype.itemsize]
    report.num_changed += int((rounded.view(integer) != rows.view(integer)).sum())
    report.sum_squared_update += float(torch.sub(exact, rows).square_().sum(dtype=torch.float64))
    error = torch.sub(exact, rounded).abs_()
    largest = float(error.max()) if error.numel() else 0.0
    if not math.isfinite(largest):
        raise NumericsError(f"Merging {report.name} gives numbers that are not finite in {rows.dtype}; check both.")
    report.max_error = max(report.max_error, largest)
    report.sum_error += float(error.sum(dtype=torch.float64))
    report.sum_squared_error += float(error.square_().sum(dtype=torch.float64))
    rows.copy_(rounded)
