"""Every kind of run with two micro-batches side by side: to the last bit what they give in turn, resumed ones too."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finerank import cli
from finerank.adapters.inject import inject_adapters
from finerank.adapters.local_rules._rule import HebbianRule
from finerank.adapters.lora import LoRALinear
from finerank.adapters.lu_lora import start_local_learning
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.native import read_checkpoint
from finerank.data.batch import Batch
from finerank.train import held_out, micro_batches
from finerank.train.held_out import batch_loss_sum
from finerank.train.micro_batches import SideBySide, in_turn
from tiny import VOCAB_SIZE, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LU = ["--lu-lora-final-layer-index", "1", "--lr", "0.02"]
KINDS = {
    "lora": [],
    "feedback": [*LU, "--lu-lora-rule", "feedback"],
    "sampled": [*LU, "--lu-lora-rule", "sampled"],
    "mindspeed": [*LU, "--lu-lora-rule", "mindspeed", "--lu-lora-lr", "1e-3"],
    "oja": [*LU, "--lu-lora-rule", "oja", "--lu-lora-lr", "1e-2"],
    "frozen, cached": [*LU, "--lu-lora-rule", "frozen", "--cache-boundary", "--share-prompts", "false"],
    "feedback, cached": [
        *LU,
        "--lu-lora-rule",
        "feedback",
        "--lu-lora-freeze-after",
        "1",
        "--cache-boundary",
        "--share-prompts",
        "false",
    ],
    "4 bits": ["--load-4bit"],
    "8 bits, local": ["--load-8bit", *LU],
    "dpo": ["--stage", "dpo"],
    "simpo, local": ["--stage", "dpo", "--pref-loss", "simpo", *LU],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 rows of different lengths, as answers and as pairs."""
    folder, words = tmp_path_factory.mktemp("rows"), ["red", "green", "blue", "one", "two"]
    plain = [{"instruction": f"Say {words[i % 5]}.", "output": " ".join([words[i % 5]] * (i + 1))} for i in range(24)]
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": words[(i + 1) % 5]}
        for i, row in enumerate(plain)
    ]
    for name, made in (("plain", plain), ("pairs", pairs)):
        (folder / f"{name}.json").write_text(json.dumps(made))
    return {name: folder / f"{name}.json" for name in ("plain", "pairs")}


def tune(base: Path, rows: dict[str, Path], run: Path, *flags: str) -> None:
    data = rows["pairs" if "dpo" in flags else "plain"]
    usual = (
        f"--load {base} --data-path {data} --output-dir {run} --no-tune-runtime --device cpu --dtype bf16 --lora-r 4"
    )
    usual += " --seq-length 128 --global-batch-size 10 --micro-batch-tokens 256 --micro-batches-at-once 2 --seed 5"
    usual += " --num-epochs 3 --val-set-size 4 --eval-interval 2 --save-interval 2 --keep-last 9 --log-interval 1000"
    assert cli.main(["tune", *usual.split(), *flags]) == 0


def what_it_left(run: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Its metrics, but for time and memory, and its last checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: v for name, v in line.items() if "seconds" not in name and "memory" not in name} for line in lines]
    return kept, read_checkpoint(run / "checkpoint-6").tensors


def assert_same(one: Path, other: Path) -> None:
    (metrics, tensors), (other_metrics, other_tensors) = what_it_left(one), what_it_left(other)
    assert metrics == other_metrics and len(metrics) >= 6
    assert tensors.keys() == other_tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, other_tensors[name])] == []


@pytest.fixture
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Most training passes that ran at the same time; the first of each step is held up, so that others overtake it."""
    running, most, real = set[int](), [0], micro_batches.SideBySide.__call__

    def call(self: SideBySide, batches: Any, forward: Any, count: float) -> Iterator[Tensor | None]:
        def watched(i: int, batch: Batch) -> Tensor:
            running.add(i)
            most[0] = max(most[0], len(running))
            time.sleep(0.1 if i == 0 else 0.0)
            try:
                return forward(i, batch)
            finally:
                running.discard(i)

        return real(self, batches, watched, count)

    monkeypatch.setattr(micro_batches.SideBySide, "__call__", call)
    return most


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_one_in_turn(
    tmp_path: Path,
    base: Path,
    rows: dict[str, Path],
    most_at_once: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Metrics, held-out losses, factors and moments; and resumed from the middle."""
    tune(base, rows, tmp_path / "side", *KINDS[kind])
    assert most_at_once[0] == 2
    tune(base, rows, tmp_path / "again", *KINDS[kind], "--resume", str(tmp_path / "side" / "checkpoint-2"))
    with monkeypatch.context() as patched:
        patched.setattr(micro_batches, "backward_of", lambda parameters, *, at_once: in_turn)
        tune(base, rows, tmp_path / "turn", *KINDS[kind])
    assert_same(tmp_path / "side", tmp_path / "turn")
    assert_same(tmp_path / "side", tmp_path / "again")


@pytest.mark.parametrize("kind", ["feedback", "mindspeed"])
def test_a_step_that_is_skipped_teaches_nothing(
    tmp_path: Path, base: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The second of a step's micro-batches is not finite: the step is skipped in the same way."""
    real, forward, steps = held_out.loss_sum, micro_batches.SideBySide.__call__, [0]

    def call(self: Any, batches: Any, forward_of: Any, count: float) -> Iterator[Tensor | None]:
        steps[0] += 1
        bad[:] = [batches[1].input_ids] if steps[0] == 3 else []
        return (in_turn if turn else lambda *how: forward(self, *how))(batches, forward_of, count)

    def broken(model: Any, **inputs: Any) -> Tensor:
        is_bad = bool(bad) and torch.equal(bad[0], inputs["input_ids"])
        return real(model, **inputs) * (float("nan") if is_bad and torch.is_grad_enabled() else 1.0)

    bad: list[Tensor] = []
    monkeypatch.setattr(held_out, "loss_sum", broken)
    monkeypatch.setattr(micro_batches.SideBySide, "__call__", call)
    for turn in (False, True):
        steps[0] = 0
        tune(base, rows, tmp_path / f"{turn}", *KINDS[kind], "--on-nonfinite", "skip")
    assert_same(tmp_path / "False", tmp_path / "True")
    skipped = [line["step"] for line in what_it_left(tmp_path / "True")[0] if line.get("skipped")]
    assert skipped == [3]


def batch(seed: int) -> Batch:
    ids = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(seed))
    own = {"input_ids": ids, "target_ids": ids.roll(-1, dims=1), "attention_mask": torch.ones_like(ids)}
    return Batch(**own, position_ids=torch.arange(12).expand_as(ids), rows=(0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["feedback", "mindspeed", "oja"])
def test_what_a_rule_learns_does_not_depend_on_the_faster_thread(rule: str) -> None:
    """Whichever micro-batch is held up, and with one that the local layers never see."""
    model = tiny_model("llama", num_hidden_layers=4).requires_grad_(False)
    chosen = AdapterSettings(lora_r=4, lu_lora_final_layer_index=1, lu_lora_rule=rule)
    adapters = inject_adapters(model, chosen, seed=1)
    local = start_local_learning(adapters, chosen, lr=1e-2, seed=1)
    assert local is not None
    model.train()
    parameters = [p for p in adapters.parameters() if p.requires_grad]
    taught = [m for n, m in adapters.layers.items() if int(n.split(".")[2]) <= 1]

    def learned(backward: Any, held_up: int, unseen: int | None) -> list[Tensor]:
        def forward(i: int, one: Batch) -> Tensor:
            time.sleep(0.02 if i == held_up else 0.0)
            local.begin_micro_batch(i)
            return parameters[-1].sum() * 0.1 if i == unseen else batch_loss_sum(model, one)

        local.begin_step(0)
        losses = list(backward([batch(i) for i in range(8)], forward, 100.0))
        assert len(losses) == 8
        before = {p: p.detach().clone() for layer in taught for p in (layer.lora_A, layer.lora_B)}
        local.apply_local_update(lr_factor=1.0)
        found = [p.detach().clone() for p in before]
        for parameter, value in before.items():
            parameter.data.copy_(value)
        found += [p.grad.clone() for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        return found

    side_by_side = SideBySide(parameters, at_once=3)
    for held_up, unseen in ((0, None), (1, None), (4, None), (0, 2), (3, 0)):
        wanted = learned(in_turn, held_up, unseen)
        for _ in range(5):
            found = learned(side_by_side, held_up, unseen)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert isinstance(taught[0], LoRALinear) and isinstance(local.rule, HebbianRule) == (rule != "feedback")
