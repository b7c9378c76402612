"""Where layers live in a Megatron checkpoint: tensor, pipeline, virtual-pipeline and expert parallel sizes.

    Layout.make(num_layers=4, tp=2, pp=2, layers_per_virtual_stage=1).chunks
    [[[0], [2]], [[1], [3]]]                 stage 0 holds layers 0 and 2 as two chunks, stage 1 holds 1 and 3

Indices inside a chunk start at 0 in every chunk; a no-op layer takes an index that has no tensors. Folder names:
`mp_rank_TT`, `mp_rank_TT_PPP`, with expert parallelism `mp_rank_TT_EEE` or `mp_rank_TT_PPP_EEE`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finerank.errors import ConfigError

Slots = list[int | None]
"""Global layer numbers by local index; None is a no-op layer."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups and the layers of each stage."""

    tp: int
    pp: int
    ep: int
    chunks: list[list[Slots]]
    """`chunks[stage][chunk]`; one chunk a stage without virtual stages."""
    is_v_shaped: bool = False
    """dualpipev: the last layers are the second chunk of stage 0."""

    @staticmethod
    def make(
        *,
        num_layers: int,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        layers_per_virtual_stage: int | None = None,
        num_layer_list: Sequence[int] | None = None,
        noop_layers: Sequence[int] = (),
        schedules_method: str | None = None,
    ) -> "Layout":
        """The layout that Megatron's flags describe. Raises ConfigError naming the flag that does not fit."""
        for flag, value in (("tensor-parallel", tp), ("pipeline-parallel", pp), ("expert-parallel", ep)):
            if value < 1:
                raise ConfigError(f"--target-{flag}-size must be at least 1, not {value}.")
        if num_layer_list is not None:
            if layers_per_virtual_stage is not None or noop_layers or schedules_method:
                raise ConfigError("--num-layer-list excludes virtual stages, --noop-layers and --schedules-method.")
            return Layout(tp, pp, ep, _uneven(num_layers, pp, num_layer_list))
        slots = _with_noops(num_layers, noop_layers)
        if len(slots) % pp:
            raise ConfigError(
                f"{len(slots)} layers do not divide by --target-pipeline-parallel-size {pp}; give --num-layer-list "
                "with the layers of each stage."
            )
        if schedules_method is not None:
            if schedules_method != "dualpipev" or layers_per_virtual_stage is not None or len(slots) % (2 * pp):
                raise ConfigError(
                    f"--schedules-method {schedules_method}: only dualpipev, without virtual stages, and with layers "
                    f"({len(slots)}) divisible by twice the pipeline size."
                )
            size = len(slots) // (2 * pp)
            block = [slots[i * size : (i + 1) * size] for i in range(2 * pp)]
            return Layout(tp, pp, ep, [[block[p], block[2 * pp - 1 - p]] for p in range(pp)], is_v_shaped=True)
        size = len(slots) // pp
        if layers_per_virtual_stage is None:
            return Layout(tp, pp, ep, [[slots[p * size : (p + 1) * size]] for p in range(pp)])
        c = layers_per_virtual_stage
        if pp == 1 or c < 1 or size % c or c >= size:
            raise ConfigError(
                f"--num-layers-per-virtual-pipeline-stage {c} must divide the {size} layers of a stage, be smaller, "
                "and needs a pipeline of at least 2 stages."
            )
        return Layout(
            tp, pp, ep, [[slots[(v * pp + p) * c : (v * pp + p + 1) * c] for v in range(size // c)] for p in range(pp)]
        )

    @property
    def num_chunks(self) -> int:
        """Chunks of each stage."""
        return len(self.chunks[0])

    @property
    def head_at(self) -> tuple[int, int]:
        """(stage, chunk) of the final norm and the output layer."""
        return (0, 1) if self.is_v_shaped else (self.pp - 1, self.num_chunks - 1)

    def model_key(self, chunk: int) -> str:
        """Top-level key of a chunk's tensors."""
        return "model" if self.num_chunks == 1 else f"model{chunk}"

    def folder(self, tp_rank: int, stage: int, ep_rank: int) -> str:
        """Name of a rank's folder."""
        name = f"mp_rank_{tp_rank:02d}"
        if self.pp > 1:
            name += f"_{stage:03d}"
        return name + (f"_{ep_rank:03d}" if self.ep > 1 else "")


def _uneven(num_layers: int, pp: int, counts: Sequence[int]) -> list[list[Slots]]:
    if len(counts) != pp or sum(counts) != num_layers or min(counts) < 1:
        raise ConfigError(
            f"--num-layer-list {','.join(map(str, counts))} must have {pp} numbers above 0 that add up to {num_layers}."
        )
    starts = [sum(counts[:p]) for p in range(pp)]
    return [[list(range(start, start + count))] for start, count in zip(starts, counts, strict=True)]


def _with_noops(num_layers: int, noop_layers: Sequence[int]) -> Slots:
    total = num_layers + len(set(noop_layers))
    if any(not 0 <= i < total for i in noop_layers):
        raise ConfigError(f"--noop-layers must be numbers from 0 to {total - 1}.")
    real = iter(range(num_layers))
    return [None if i in set(noop_layers) else next(real) for i in range(total)]
