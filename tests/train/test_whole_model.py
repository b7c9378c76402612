"""`--method full`: what it trains equals plain torch over transformers' own model, in fp32 and in bf16 with masters."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from finerank.data.batch import Batch
from finerank.models.attention import use_packed_attention
from finerank.train.held_out import batch_loss_sum
from finerank.train.nonfinite import find_nonfinite
from finerank.train.optim import build_optimizer
from finerank.train.settings import OptimSettings
from finerank.train.whole_model import WholeModel, save_whole_model
from tiny import tiny_model

FAMILIES = ["llama", "llama_tied", "qwen3", "gemma3", "mixtral"]


def in_bf16(family: str) -> PreTrainedModel:
    """As the loader makes it: weights in bf16, buffers (rotary frequencies) in fp32."""
    return cast(tiny_model(family), torch.bfloat16)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def rows(num: int, length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length + i,), generator=generator) for i in range(num)]


def packed(sequences: list[Tensor]) -> Batch:
    """All tokens but each first one are trained."""
    lengths = torch.tensor([0, *(len(s) for s in sequences)])
    return Batch(
        input_ids=torch.cat(sequences)[None],
        target_ids=torch.cat([F.pad(s[1:], (0, 1), value=-100) for s in sequences])[None],
        position_ids=torch.cat([torch.arange(len(s)) for s in sequences])[None],
        cu_seqlens=lengths.cumsum(0).int(),
        rows=tuple(range(len(sequences))),
    )


def train(model: PreTrainedModel, steps: int, settings: OptimSettings) -> WholeModel:
    """Two packed micro-batches a step, of different sizes."""
    use_packed_attention(model)
    whole = WholeModel(model)
    optimizer = build_optimizer(whole.named_parameters(), settings)
    for step in range(steps):
        sequences = rows(3, 9, seed=step)
        count = sum(len(s) - 1 for s in sequences)
        for batch in (packed(sequences[:2]), packed(sequences[2:])):
            (batch_loss_sum(model, batch) / count).backward()
        optimizer.step()
        whole.after_write()
        optimizer.zero_grad(set_to_none=True)
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_a_plain_loop(family: str) -> None:
    settings = OptimSettings(lr=1e-3, weight_decay=0.1, adam_eps=1e-3)  # or rounding counts where gradients vanish
    whole = train(tiny_model(family), 4, settings)
    plain = tiny_model(family)
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    rest = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-3)
    for step in range(4):
        sequences = rows(3, 9, seed=step)
        total = sum(F.cross_entropy(plain(input_ids=s[None]).logits[0, :-1], s[1:], reduction="sum") for s in sequences)
        optimizer.zero_grad()
        (total / sum(len(s) - 1 for s in sequences)).backward()
        optimizer.step()
    trained, expected = dict(whole.named_parameters()), dict(plain.named_parameters())
    start = dict(tiny_model(family).named_parameters())
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = (tensor - start[name]).abs().max()
        assert moved > 0 and (trained[name] - tensor).abs().max() < 2e-3 * moved, name


def sums_in_fp32(model: PreTrainedModel, batches: list[Batch], count: int) -> dict[str, Tensor]:
    """Gradients of a bf16 model, each weight's of a micro-batch rounded once, embedding rows and micro-batches summed
    in fp32; by torch's own autograd, with the embedding's gradient from that of its output."""
    found = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    scale = getattr(embedding, "embed_scale", torch.tensor(1.0)).to(torch.bfloat16)
    outputs: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = embedding.register_forward_hook(keep)
    for batch in batches:
        outputs.clear()
        model.zero_grad()
        (batch_loss_sum(model, batch) / count).backward()
        for name, p in model.named_parameters():
            if p.grad is not None and not (tied and p is head.weight):
                found[name] += p.grad.float()
        embedded = next(name for name, p in model.named_parameters() if p is embedding.weight)
        grad = (outputs[-1].grad * scale).float()  # type: ignore[operator]
        found[embedded].index_add_(0, batch.input_ids[0], grad[0])
        if tied:
            found[embedded] += head.weight.grad.float()
    handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients_are_summed_in_fp32(family: str) -> None:
    """Also of a token that comes often, which a sum in bf16 would count wrongly."""
    model, plain = (in_bf16(family).requires_grad_(True) for _ in range(2))
    often = torch.full((300,), 7)
    batches = [packed([often, *rows(1, 12)]), packed(rows(2, 12, seed=5))]
    for each in (model, plain):
        use_packed_attention(each)
    whole = WholeModel(model)
    for batch in batches:
        (batch_loss_sum(model, batch) / 50).backward()
    assert all(p.grad is None for p in model.parameters())
    expected = sums_in_fp32(plain, batches, 50)
    for name, master in whole.named_parameters():
        assert master.dtype == torch.float32 and master.grad is not None
        torch.testing.assert_close(master.grad, expected[name], rtol=2e-2, atol=2e-2 * expected[name].abs().max())
        if "embed" in name and not model.config.tie_word_embeddings:
            assert torch.equal(master.grad, expected[name])


def test_masters_gather_what_bf16_would_lose() -> None:
    """A rate below half of bf16's step: nothing would ever change without them."""
    model = in_bf16("llama")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = train(model, 12, OptimSettings(lr=5e-5))
    for name, master in whole.named_parameters():
        assert (master - start[name].float()).abs().max() > 0, name
    after = dict(model.named_parameters())
    assert any((after[name] != start[name]).any() for name in start)
    assert all(torch.equal(after[name], master.to(torch.bfloat16)) for name, master in whole.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_what_is_saved_is_the_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Loaded by transformers: same logits, every tensor found, none left over, tied as before."""
    model = cast(tiny_model(family), dtype)
    whole = train(model, 2, OptimSettings(lr=1e-2))
    ids = torch.arange(3, 20)[None]
    wanted = cast(tiny_model(family), dtype)
    for name, p in wanted.named_parameters():
        p.data.copy_(dict(whole.named_parameters())[name])
    folder, digest = save_whole_model(whole, tmp_path, source=None, write_more=lambda folder: None)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config.tie_word_embeddings == wanted.config.tie_word_embeddings
    assert loaded.get_input_embeddings().weight.dtype == dtype and len(digest) == 64
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, wanted.eval()(input_ids=ids).logits)


def test_a_search_for_bad_numbers_leaves_the_masters_alone() -> None:
    model = in_bf16("llama_tied")
    use_packed_attention(model)
    whole = WholeModel(model)
    batch = packed(rows(2, 9))
    assert find_nonfinite(model, [batch], loss_function=batch_loss_sum, seeds=[(1,)]) is None
    assert all(master.grad is None for _, master in whole.named_parameters())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    finding = find_nonfinite(model, [batch], loss_function=batch_loss_sum, seeds=[(1,)])
    assert finding is not None and "layers.1.mlp.up_proj" in finding.place


def test_auto_micro_batch_sees_no_gradient_twice() -> None:
    """The masters' gradients of the first try would make the second look free."""
    import numpy as np

    from finerank.data.settings import BatchSettings
    from finerank.data.tokens import Source, TokenDataset
    from finerank.train.fit import find_split

    ids = np.arange(640, dtype=np.int32) % 50
    starts = np.arange(0, 640, 40)
    data = TokenDataset(
        [Source(ids, ids)], np.zeros(16, np.int64), starts, starts, np.full(16, 40), longest=40, trained_lengths=None
    )
    model = in_bf16("llama")
    whole = WholeModel(model)
    settings = BatchSettings(pack=False, micro_batch_size="auto")
    found, _ = find_split(model, data, settings, parameters=whole.parameters(), pad_token_id=0)
    assert found["micro_batch_size"] == 16 and all(p.grad is None for p in (*whole.parameters(), *model.parameters()))
