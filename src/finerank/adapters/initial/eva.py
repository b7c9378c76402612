"""EVA: A starts as the leading components of what the layer reads, and ranks go where they explain most.

    A = first r right singular vectors of the centred inputs        B = 0

The inputs are those of the trained tokens of the first training rows. Their components are followed batch by batch
(incremental PCA) until each is nearly the same as before the batch (cosine at least 0.99). The ranks of all layers
together are then given to the components that explain the largest share of their layer's variance: a layer gets at most
`rho` times its rank, and one that gets none loses its adapter. `alpha` follows the rank, so the scale stays.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024;
`peft.tuners.lora.eva`, with its defaults.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Options, Pass
from finerank.adapters.initial._components import InputComponents
from finerank.adapters.initial._factors import Layers, by_lora_A
from finerank.adapters.initial._ranks import set_ranks
from finerank.errors import AdapterError

logger = logging.getLogger(__name__)

MIN_COSINE = 0.99
"""Between a component before and after a batch, for it to have settled."""
MAX_PASSES = 512
"""Batches after which components are taken as they are; PEFT would go on for ever."""


def start(adapters: AdapterSet, options: Options) -> None:
    """Watch the layers' inputs, give out the ranks, and fill A. Raises AdapterError for rows with too few tokens."""
    assert options.passes is not None, "eva looks at the training rows"
    search = _Search({layers[0][0]: layers for layers in by_lora_A(adapters)}, options)
    was_training = adapters.model.training
    adapters.model.eval()
    try:
        num_passes = search.run(options.passes())
    finally:
        adapters.model.train(was_training)
    unit_ranks = search.ranks()
    set_ranks(adapters, {name: unit_ranks[unit] for unit, layers in search.units.items() for name, _ in layers})
    with torch.no_grad():
        for unit, layers in search.units.items():
            if unit_ranks[unit]:
                components_CI = search.pca[search.reads_as[unit]].components_CI
                assert components_CI is not None
                layers[0][1].lora_A.copy_(components_CI[: unit_ranks[unit]])
    given = [rank for rank in unit_ranks.values() if rank]
    logger.info(
        "EVA: %d batches; ranks %d to %d, %d of %d layers without one",
        *(num_passes, min(given), max(given), len(unit_ranks) - len(given), len(unit_ranks)),
    )


class _Search:
    """The components of all layers' inputs. A unit is what has a lora_A of its own: a layer, or a group of them."""

    def __init__(self, units: dict[str, Layers], options: Options):
        self.units, self.seed = units, options.seed
        self.budget = sum(layers[0][1].rank for layers in units.values())
        self.most = {}
        for unit, layers in units.items():
            first = layers[0][1]
            self.most[unit] = min(round(first.rank * options.rho), first.in_features)
        self.reads_as: dict[str, str] = {}
        """Unit -> the first unit that reads the same input; itself where it is the first."""
        self.pca: dict[str, InputComponents] = {}

    @torch.no_grad()
    def run(self, passes: Iterator[Pass]) -> int:
        """Look at batches until all components that are to be used have settled. Returns how many."""
        ranks = dict(self.most)
        for num_passes, one in enumerate(passes):
            if not self.pca:
                self._find_equal_inputs(one)
            waiting = [unit for unit, pca in self.pca.items() if not pca.has_settled(ranks[unit])]
            if not waiting:
                return num_passes
            if num_passes == MAX_PASSES:
                if any(pca.components_CI is None for pca in self.pca.values()):
                    raise AdapterError(
                        "--init-lora-weights eva: the rows have too few trained tokens for their layers' components; "
                        "give more rows or a lower --lora-r, or use another start."
                    )
                logger.warning("EVA: components of %d inputs still moved after %d batches", len(waiting), num_passes)
                return num_passes
            self._look(one, waiting)
            if all(pca.components_CI is not None for pca in self.pca.values()):
                ranks = self.ranks()
        raise AssertionError("passes have no end")

    def ranks(self) -> dict[str, int]:
        """The budget given to the components with the largest shares of explained variance."""
        order = [*self.pca, *(unit for unit, first in self.reads_as.items() if unit != first)]
        shares = {unit: self.pca[self.reads_as[unit]].variance_share_C[: self.most[unit]] for unit in order}
        owners = [unit for unit in order for _ in shares[unit]]
        best = torch.cat([shares[unit] for unit in order]).argsort(descending=True, stable=True)[: self.budget]
        counts = Counter(owners[i] for i in best.tolist())
        ranks = {unit: counts.get(unit, 0) for unit in order}
        for unit, first in self.reads_as.items():  # of equal inputs the first gets the highest rank, as in PEFT
            if ranks[first] < ranks[unit]:
                ranks[first], ranks[unit] = ranks[unit], ranks[first]
        return ranks

    def _find_equal_inputs(self, one: Pass) -> None:
        """Layers that are called one after the other with the same tensor share one PCA."""
        last: list[tuple[str, Tensor, int]] = []

        def see(unit: str, x: Tensor) -> None:
            if unit in self.reads_as:  # a module that is called twice in one pass
                return
            same = bool(last) and last[0][1] is x and last[0][2] == x._version
            self.reads_as[unit] = last[0][0] if same else unit
            if not same:
                last[:] = [(unit, x, x._version)]

        with self._watch(list(self.units), see):
            one.run()
        for unit in self.units:
            if self.reads_as.setdefault(unit, unit) != unit:
                first = self.reads_as[unit]
                self.most[first] = self.most[unit] = max(self.most[first], self.most[unit])
        for unit in self.units:
            if self.reads_as[unit] == unit:
                self.pca[unit] = InputComponents(self.most[unit], seed=self.seed, min_cosine=MIN_COSINE)
        for unit, first in self.reads_as.items():
            self.most[unit] = self.most[first]

    def _look(self, one: Pass, units: list[str]) -> None:
        def see(unit: str, x: Tensor) -> None:
            rows = x[one.trained_BT] if x.shape[:-1] == one.trained_BT.shape else x.flatten(0, -2)
            self.pca[unit].add(rows)

        with self._watch(units, see):
            one.run()

    @contextlib.contextmanager
    def _watch(self, units: list[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(unit: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, args: see(unit, args[0])

        handles = [self.units[unit][0][1].register_forward_pre_hook(hook(unit)) for unit in units]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
