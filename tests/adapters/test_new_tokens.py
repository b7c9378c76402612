"""Trained rows of new tokens: against the real PEFT, and through growth, files and merging in memory."""

import json

import pytest
import torch
from peft_pair import IDS, by_peft, check_pair, check_reading, grown, our_gradients

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError
from finerank.models.load import load_model
from finerank.models.settings import ModelSettings
from finerank.models.tokenizer import add_tokens, load_tokenizer
from finerank.models.vocabulary import grow_vocabulary
from tiny import save_tiny, tiny_model, tiny_tokenizer

pytest.importorskip("peft")

SOME = (5, 20, 383)  # of IDS: two are read, one is a target, one is neither
BOTH = ["embed_tokens", "lm_head"]


def larger(family):
    """Two rows longer, which the library fills at random: PEFT's side of a grown vocabulary."""
    model = tiny_model(family)
    with torch.random.fork_rng():
        model.resize_token_embeddings(386, mean_resizing=False)
    return model


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "qwen2"])
def test_rows_equal_peft(tmp_path, family):
    tied = family in ("llama_tied", "gemma3")
    _, adapters, grads, _ = check_pair(tmp_path, family, token_ids=SOME)
    indices = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert indices == (list(SOME) if tied else {"embed_tokens": list(SOME), "lm_head": list(SOME)})
    rows = [grad for name, grad in grads.items() if "trainable_tokens_delta" in name]
    assert len(rows) == 2 - tied and all(grad.shape == (3, 32) and grad.abs().max() > 0 for grad in rows)
    assert adapters.num_parameters < 10_000


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_rows_of_a_grown_vocabulary_equal_peft(tmp_path, family):
    check_pair(tmp_path, family, make=larger, token_ids=(384, 385))
    grown_here = tiny_model(family)  # the file's rows decide, whatever the new rows were before
    load_adapter(grown_here, tmp_path)
    assert grown_here.config.vocab_size == 386
    theirs = larger(family)
    load_adapter(theirs, tmp_path)
    ids = torch.tensor([[3, 384, 7, 385]])
    assert torch.equal(grown_here(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama_tied", {"trainable_token_indices": [380, 5]}),
        ("llama", {"trainable_token_indices": [5, 7]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [9, 12]}}),
        ("gemma3", {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]}}),
    ],
    ids=str,
)
def test_we_read_peft(tmp_path, family, config):
    check_reading(tmp_path, family, **config)


def test_a_vocabulary_that_peft_saw_grow(tmp_path):
    """PEFT then saves both matrices whole, and they fit a base that did not grow."""
    import peft

    model = larger("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = tiny_model("llama")
    load_adapter(ours, tmp_path)
    ids = torch.tensor([[3, 384, 7, 385]])
    assert (ours(ids).logits - model.eval()(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_rows_change_nothing_and_merge_exactly(family, dtype):
    model = tiny_model(family).to(dtype)
    base = model(IDS).logits
    adapters = inject_adapters(model, AdapterSettings(lora_r=4), seed=1, token_ids=SOME)
    torch.testing.assert_close(model(IDS).logits, base, rtol=1e-5, atol=1e-5)  # a narrower product rounds otherwise
    with torch.no_grad():
        for name, p in adapters.named_parameters():
            if "tokens" in name:
                p.add_(0.5)
    want = model(IDS).logits
    assert not torch.equal(want, base)
    with adapters.disabled():
        assert torch.equal(model(IDS).logits, base)
    adapters.merge_()
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert model.config.tie_word_embeddings is (family != "llama")


def test_rows_have_the_gradient_of_whole_matrices():
    """The rows' gradient is that of a whole trained copy, at these ids."""
    whole_model, rows_model = tiny_model("llama"), tiny_model("llama")
    whole = inject_adapters(whole_model, AdapterSettings(lora_modules_to_save=BOTH), seed=1)
    rows = inject_adapters(rows_model, AdapterSettings(), seed=1, token_ids=SOME)
    wanted, got = our_gradients(whole_model, whole)[1], our_gradients(rows_model, rows)[1]
    for name in ("model.embed_tokens", "lm_head"):
        rows_grad = got[f"{name}.token_adapter.trainable_tokens_delta"]
        torch.testing.assert_close(rows_grad, wanted[f"{name}.weight"][list(SOME)], rtol=1e-5, atol=1e-6)


def test_growth_is_the_mean_and_the_same_each_time(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    settings = ModelSettings(load=str(folder), device="cpu", dtype="fp32")
    state = torch.random.get_rng_state()
    both = [load_model(settings, new_tokens=["<tool>", "</tool>"]) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert both[0].new_token_ids == (384, 385) and both[0].model.config.vocab_size == 386
    base = tiny_model("llama")
    for get in ("get_input_embeddings", "get_output_embeddings"):
        one, other = (getattr(loaded.model, get)().weight for loaded in both)
        old = getattr(base, get)().weight
        assert torch.equal(one, other) and torch.equal(one[:384], old) and one.shape == (386, 32)
        assert torch.equal(one[384:], old.mean(0).expand(2, -1)) and not one.requires_grad
    ids = both[0].tokenizer("Say <tool>red</tool>.").input_ids
    assert 384 in ids and 385 in ids
    assert "<tool>" in both[0].tokenizer.decode(ids, skip_special_tokens=True)
    assert (
        load_tokenizer(settings, new_tokens=["<tool>", "</tool>"])("a<tool>b").input_ids
        == both[1].tokenizer("a<tool>b").input_ids
    )


def test_padding_rows_of_the_base_are_used_first(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama", vocab_size=400)
    settings = ModelSettings(load=str(folder), device="cpu", dtype="fp32")
    loaded = load_model(settings, new_tokens=["<tool>"])
    weight = loaded.model.get_input_embeddings().weight
    assert loaded.new_token_ids == (384,) and weight.shape[0] == 400
    assert torch.equal(weight[384], weight[:384].mean(0))


def test_a_token_that_is_there_keeps_its_id(caplog):
    tokenizer = tiny_tokenizer()
    assert add_tokens(tokenizer, ["<|im_end|>", "<new>"]) == [2, 384] and "already" in caplog.text
    model = tiny_model("llama")
    grow_vocabulary(model, len(tokenizer), num_known=384)
    assert torch.equal(model.get_input_embeddings().weight[2], tiny_model("llama").get_input_embeddings().weight[2])


@pytest.mark.parametrize(
    "family, settings, words",
    [
        ("llama", {"lora_target_modules": ["embed_tokens"]}, "low-rank"),
        ("llama_tied", {"lora_target_modules": ["lm_head"]}, "low-rank"),
        ("llama_tied", {"lora_modules_to_save": ["lm_head"]}, "name both"),
        ("llama", {"lu_lora_final_layer_index": 0}, "embed_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence(family, settings, words):
    with pytest.raises(ConfigError, match=words):
        inject_adapters(tiny_model(family), AdapterSettings(**settings), seed=1, token_ids=SOME)


def test_a_side_trained_whole_needs_no_rows(tmp_path):
    for family, settings, parts in (
        ("llama", {"lora_modules_to_save": ["embed_tokens"]}, {"lm_head": "TrainedRows"}),
        ("llama", {"lora_modules_to_save": BOTH}, {}),
        ("llama_tied", {"lora_modules_to_save": BOTH, "ensure_weight_tying": True}, {}),
    ):
        adapters = grown(tiny_model(family), token_ids=SOME, **settings)
        kinds = {name: type(part).__name__ for name, part in adapters.parts.items()}
        assert {name: kind for name, kind in kinds.items() if kind != "SavedModule"} == parts


def test_blank_and_repeated_tokens_are_refused():
    for tokens in (["<a>", "<a>"], [" "], [""]):
        with pytest.raises(ConfigError, match="--add-tokens"):
            add_tokens(tiny_tokenizer(), tokens)


def test_ids_beyond_a_gap_are_refused(tmp_path):
    save_adapter(grown(larger("llama_tied"), token_ids=(385,)), tmp_path, base_model_name="tiny")
    with pytest.raises(AdapterError, match="gap"):
        load_adapter(tiny_model("llama_tied"), tmp_path)


def test_indices_that_disagree_with_the_tensors_are_refused(tmp_path):
    by_peft(tmp_path, "llama_tied", trainable_token_indices=[5, 7])
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for bad in ([5], [5, 5], ["a"], {"nowhere": [5]}, None, [-1, 3]):
        path.write_text(json.dumps({**config, "trainable_token_indices": bad}))
        with pytest.raises(AdapterError):
            load_adapter(tiny_model("llama_tied"), tmp_path)
