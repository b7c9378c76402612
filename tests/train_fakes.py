"""A network, a plan and a loop small enough for hundreds of runs: steps take a millisecond."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finerank.data.batch import Batch
from finerank.train.loop import TrainLoop
from finerank.train.settings import TrainSettings

VOCAB = 32


class Net(nn.Module):
    """Embedding, a frozen linear with a low-rank change and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCAB, 8, generator=g))
        self.base = nn.Linear(8, VOCAB).requires_grad_(False)
        self.base.weight.data = torch.randn(VOCAB, 8, generator=g)
        self.base.bias.data.zero_()
        self.dropout = nn.Dropout(0.1)
        self.lora_A = nn.Parameter(torch.randn(4, 8, generator=g))
        self.lora_B = nn.Parameter(torch.zeros(VOCAB, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.base(x) + self.dropout(x) @ self.lora_A.T @ self.lora_B.T

    def named_trained(self) -> list[tuple[str, Tensor]]:
        return [("lora_A", self.lora_A), ("lora_B", self.lora_B)]


class Adapters:
    def __init__(self, net: Net):
        self.net = net

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return self.net.named_trained()


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.input_ids)
    return F.cross_entropy(logits.flatten(0, 1), batch.target_ids.flatten(), reduction="sum")


def batch_of(rows: list[int]) -> Batch:
    ids = torch.stack([torch.from_numpy(np.random.default_rng(r).integers(0, VOCAB, 7)) for r in rows])
    targets = (ids * 7 + 3) % VOCAB
    targets[:, 0] = -100
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(input_ids=ids, target_ids=targets, position_ids=positions, rows=tuple(rows))


class Plan:
    def __init__(self, num_steps: int, *, num_rows: int = 20, global_batch: int = 6, micro_batch: int = 2):
        self.num_steps, self.num_rows, self.global_batch, self.micro_batch = (
            num_steps,
            num_rows,
            global_batch,
            micro_batch,
        )

    def rows(self, step: int) -> list[int]:
        return [(step * self.global_batch + i) % self.num_rows for i in range(self.global_batch)]

    def micro_batches(self, step: int) -> list[Batch]:
        rows = self.rows(step)
        return [batch_of(rows[i : i + self.micro_batch]) for i in range(0, len(rows), self.micro_batch)]


def make_loop(
    folder: Path, *, num_steps: int = 12, plan: Any = None, net: Net | None = None, **settings: Any
) -> TrainLoop:
    """A loop over `Net`; `settings` are those of TrainSettings."""
    folder.mkdir(parents=True, exist_ok=True)
    net = net or Net()
    values: dict[str, Any] = {"lr": 0.05, "log_interval": 10**6, **settings}

    def adapter_files() -> dict[str, bytes]:
        return {"adapter_model.safetensors": safetensors.torch.save({n: p.detach() for n, p in net.named_trained()})}

    return TrainLoop(
        net,
        Adapters(net),
        plan or Plan(num_steps),
        TrainSettings(**values),
        folder=folder,
        origin={"settings": {}, "digests": {}, "environment": {}},
        adapter_files=adapter_files,
        held_out=lambda: [batch_of([100, 101, 102]), batch_of([103])],
        loss_function=loss_sum,
    )


def weights(loop: TrainLoop) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in loop.named_parameters.items()}
