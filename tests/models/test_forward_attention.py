"""Packed batches compute what separate sequences compute, values and gradients, in every family."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from finerank.data.loader import packed_batch
from finerank.errors import ModelError
from finerank.models.attention import (
    attention_forward,
    can_share_prompts,
    causal_mask,
    explicit_attention,
    use_packed_attention,
)
from finerank.models.forward import loss_sum, verified_head
from finerank.models.spans import packed_mask
from tiny import FAMILIES, tiny_model

LENGTHS = (5, 40, 1, 2, 33, 17)  # 40, 33 and 17 are beyond the tiny models' window of 16


def gemma2():
    from transformers import Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, initializer_range=0.3, attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8, attn_implementation="eager",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def gpt_oss():
    from transformers import GptOssConfig

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, initializer_range=0.3, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    return model


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {**{name: (lambda name=name: tiny_model(name)) for name in FAMILIES}, "gemma2": gemma2, "gpt_oss": gpt_oss}


def rows():
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 384, (n,), generator=g) for n in LENGTHS]
    targets = [torch.randint(3, 384, (n,), generator=g) for n in LENGTHS]
    for t in targets:
        t[: len(t) // 3] = -100
    return list(zip(ids, targets, strict=True))


def packed(rows):
    ids, targets = (torch.cat(x)[None] for x in zip(*rows, strict=True))
    lengths = [len(i) for i, _ in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"input_ids": ids, "target_ids": targets, "position_ids": positions, "cu_seqlens": cu_seqlens}


def padded(rows):
    longest = max(len(i) for i, _ in rows)
    ids, targets, mask = (torch.full((len(rows), longest), fill) for fill in (2, -100, 0))
    for row, (i, t) in enumerate(rows):
        ids[row, : len(i)], targets[row, : len(t)], mask[row, : len(i)] = i, t, 1
    positions = torch.arange(longest).expand(len(rows), longest)
    return {"input_ids": ids, "target_ids": targets, "position_ids": positions, "attention_mask": mask}


def separate_loss(model, rows):
    """By transformers alone, one row at a time."""
    return sum(F.cross_entropy(model(i[None]).logits[0], t, reduction="sum", ignore_index=-100) for i, t in rows)


def gradients(model, loss):
    """Of a few weights of every kind, in fp32."""
    names = [n for n, p in model.named_parameters() if p.requires_grad and ("norm" in n or "proj" in n)]
    parameters = [p for n, p in model.named_parameters() if n in names]
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same_gradients(got, want):
    assert got.keys() == want.keys() and got
    for name in want:
        if want[name] is None:
            assert got[name] is None, name
            continue
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-5 * want[name].abs().max().item(), msg=name)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("lay_out", [packed, padded])
def test_equals_separate_rows(family, lay_out):
    reference, model = MODELS[family](), MODELS[family]()
    use_packed_attention(model)
    model.get_output_embeddings().requires_grad_(False)
    reference.get_output_embeddings().requires_grad_(False)
    want = separate_loss(reference, rows())
    got = loss_sum(model, **lay_out(rows()))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    if "moe" in family or family in ("mixtral", "gpt_oss"):
        return  # a routing that flips at a tie makes gradients incomparable
    assert_same_gradients(gradients(model, got), gradients(reference, want))


def rows_with_prompts():
    """Six rows that begin with the same 12 tokens, the last two of them with 14 more; their answers are trained."""
    g = torch.Generator().manual_seed(1)
    system, prompt, *rest = (torch.randint(3, 384, (n,), generator=g) for n in (12, 14, 5, 40, 2, 22, 9, 17))
    ids = [torch.cat([system, *([prompt] if i >= 4 else []), own]) for i, own in enumerate(rest)]
    targets = [torch.cat([i[1:], i[:1]]) for i in ids]
    for i, target in enumerate(targets):
        target[: 12 + (i >= 4) * 14] = -100
    return list(zip(ids, targets, strict=True))


def shared(rows):
    ids, targets = ([x.numpy() for x in column] for column in zip(*rows, strict=True))
    dataset = type("Rows", (), {})()
    dataset.sequences = lambda i: [(ids[i], np.insert(targets[i][:-1], 0, -100))]
    batch = packed_batch(dataset, range(len(rows)), share=True)
    names = ("input_ids", "target_ids", "position_ids", "cu_seqlens", "parents")
    return {name: getattr(batch, name) for name in names}


@pytest.mark.parametrize("family", MODELS)
def test_shared_prompts_change_nothing(family):
    reference, model = MODELS[family](), MODELS[family]()
    use_packed_attention(model)
    assert can_share_prompts(model)
    rows = [(ids, torch.cat([targets[:-1], torch.tensor([-100])])) for ids, targets in rows_with_prompts()]
    batch = shared(rows)
    assert batch["parents"].tolist() == [-1, 0, 0, 0, 0, 0, 1, 1]
    assert batch["input_ids"].numel() == sum(len(ids) for ids, _ in rows) - 5 * 12 - 14
    for m in (reference, model):
        m.get_output_embeddings().requires_grad_(False)
    got, want = loss_sum(model, **batch), separate_loss(reference, rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    if "moe" in family or family in ("mixtral", "gpt_oss"):
        return  # a routing that flips at a tie makes gradients incomparable
    assert_same_gradients(gradients(model, got), gradients(reference, want))


def split(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("lay_out", [packed, padded])
def test_every_split_of_a_batch_gives_the_same_gradient(size, lay_out):
    from finerank.adapters.inject import inject_adapters
    from finerank.adapters.settings import AdapterSettings

    batch = (rows() * 3)[:16]
    model = tiny_model("qwen3").requires_grad_(False)
    adapters = inject_adapters(model, AdapterSettings(lora_r=4), seed=1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    want = torch.autograd.grad(separate_loss(model, batch), adapters.parameters())
    use_packed_attention(model)
    for part in split(batch, size):
        loss_sum(model, **lay_out(part)).backward()
    for p, w in zip(adapters.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=0, atol=2e-5 * w.abs().max().item())


def test_packed_bf16_is_as_near_to_exact_as_separate_bf16():
    exact = separate_loss(tiny_model(), rows()).item()
    model = tiny_model().bfloat16()
    separate = separate_loss(model, rows()).item()
    use_packed_attention(model)
    got = loss_sum(model, **packed(rows())).item()
    assert abs(got / exact - 1) < 0.005 and abs(separate / exact - 1) < 0.005


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gemma2", "gpt_oss"])
def test_the_same_model_still_generates(family):
    reference, model = MODELS[family](), MODELS[family]()
    use_packed_attention(model)
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 2,
        "eos_token_id": None,
    }
    got = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    want = reference.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=0, atol=1e-4)
    assert torch.equal(got.sequences, want.sequences)


def test_a_recurrent_model_is_refused():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ModelError, match="--no-pack"):
        use_packed_attention(transformers.AutoModelForCausalLM.from_config(config))


def test_a_neighbour_has_no_influence():
    model = tiny_model()
    use_packed_attention(model)
    batch = packed(rows())

    def hidden(ids):
        mask = packed_mask(batch["cu_seqlens"])
        return model.model(ids, position_ids=batch["position_ids"], attention_mask=mask).last_hidden_state[0]

    changed = batch["input_ids"].clone()
    changed[0, :5] = 9
    before, after = hidden(batch["input_ids"]), hidden(changed)
    assert torch.equal(before[5:], after[5:]) and not torch.equal(before[:5], after[:5])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_explicit_attention_equals_a_loop(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    sinks = torch.randn(4)
    got = explicit_attention(q, k, v, causal_mask(9, window, q.device), scaling=0.3, softcap=1.5, sinks=sinks)
    for h in range(4):
        for t in range(9):
            seen = [u for u in range(t + 1) if window is None or u > t - window]
            scores = [1.5 * torch.tanh(0.3 * q[0, h, t] @ k[0, h // 2, u] / 1.5) for u in seen]
            p = torch.softmax(torch.stack([*scores, sinks[h]]), 0)[:-1]
            want = sum(p[i] * v[0, h // 2, u] for i, u in enumerate(seen))
            torch.testing.assert_close(got[0, h, t], want, rtol=1e-5, atol=1e-6)


def test_attention_dropout_acts():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = packed_mask(torch.tensor([0, 4, 9]))
    module = torch.nn.Module()
    plain = attention_forward(module, q, k, v, mask)[0]
    dropped = attention_forward(module, q, k, v, mask, dropout=0.5)[0]
    assert not torch.allclose(plain, dropped)


def test_the_head_is_chosen_without_dropout_and_the_mode_stays():
    model = tiny_model("llama", attention_dropout=0.9)
    model.train()
    assert verified_head(model) is not None, "dropout made the two passes differ"
    assert model.training


def test_weights_that_are_not_finite_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"base weights are not finite .model\.layers\.1\.mlp\.up_proj\.weight"):
        use_packed_attention(model)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.bfloat16, "try --dtype fp32"), (torch.float32, "get the model")])
def test_a_base_that_overflows_is_told_so(dtype: torch.dtype, advice: str):
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            model.get_submodule(f"model.layers.1.mlp.{name}").weight.mul_(1e20)
    with pytest.raises(ModelError, match=rf"outputs are not finite in {str(dtype)[6:]}.*{advice}"):
        use_packed_attention(model)
