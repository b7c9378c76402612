"""Does the merged model answer as base and adapter do? Measured on 32 fixed prompts, in fp32.

    proof = compare(base, adapter, merged_folder)
    proof["mean_kl"], proof["max_logit_difference"], proof["greedy_agreement"]

The reference computes the adapter's branch beside the base (`y = W x + scale * B (A x)`), which shares no code with the
merge: a wrong scale, a transposed factor or a tensor that was forgotten shows. Both run in fp32, so what is measured is
the rounding of the merged weights alone. Where a branch cannot be computed beside the base (single experts that the
library holds fused, a resized vocabulary) the reference has the exact fp32 sums as weights, and the proof says so.
"""

import json
import logging
import os
import tempfile
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finerank.adapters.adapter_set import put_module
from finerank.adapters.experts import Factors as ExpertFactors
from finerank.adapters.experts import LoRAExperts, experts_modules
from finerank.checkpoints.formats import hf
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.merge import merged_model, plan_merge
from finerank.checkpoints.weights import BaseModel, CastWeights
from finerank.errors import CheckpointError

logger = logging.getLogger(__name__)

NUM_PROMPTS = 32
NUM_NEW_TOKENS = 8
MAX_PROMPT_TOKENS = 24
"""Prompts keep their last tokens; few and equal lengths let all of them run as a batch or two."""


def fits_in_memory(base: BaseModel) -> bool:
    """Is there memory for the model in fp32, activations included?"""
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False
    num_weights = sum(base.weights.info(name).numel for name in base.weights)
    return num_weights * 4 * 1.5 + (1 << 30) < available


def compare(base: BaseModel, adapter: Adapter, merged: Path) -> dict[str, Any]:
    """Base with adapter against the merged folder, as JSON values.

    Returns:
        `mean_kl`, `max_kl` (nats, over positions), `max_logit_difference`, `greedy_agreement` (share of equal tokens in
        greedy continuations), what was compared, and how.
    """
    prompts, how = _prompts(base, merged)
    model = _load(merged)
    ours = _run(model, prompts)
    del model
    with tempfile.TemporaryDirectory(prefix="finerank-proof-") as scratch:
        reference, kind = _reference(base, adapter, Path(scratch))
        theirs = _run(reference, prompts)
    kls, largest, equal, total = [], 0.0, 0, 0
    for (a, tokens_a), (b, tokens_b) in zip(theirs, ours, strict=True):
        width = min(a.shape[-1], b.shape[-1])
        a, b = a[:, :width], b[:, :width]
        log_p, log_q = F.log_softmax(a.double(), -1), F.log_softmax(b.double(), -1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        largest = max(largest, float((a - b).abs().max()))
        equal += int((tokens_a == tokens_b).sum())
        total += tokens_a.numel()
    kl = torch.cat(kls).clamp(min=0)
    return {
        "reference": kind,
        "prompts": how,
        "num_prompts": len(prompts),
        "num_positions": kl.numel(),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "max_logit_difference": largest,
        "greedy_agreement": equal / total,
        "num_greedy_tokens": total,
    }


def _prompts(base: BaseModel, merged: Path) -> tuple[list[Tensor], str]:
    """32 prompts as token ids: the shipped texts, or random ids where there is no tokenizer."""
    if any((merged / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        from transformers import AutoTokenizer

        texts = json.loads(resources.files("finerank.checkpoints").joinpath("proof_prompts.json").read_text("utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(merged)
        prompts = []
        for text in texts:
            if tokenizer.chat_template:
                message = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            length = min(len(ids) // 8 * 8 or len(ids), MAX_PROMPT_TOKENS)
            prompts.append(torch.tensor(ids[-length:]))
        return prompts, "32 shipped prompts"
    vocab_size = int(base.config["vocab_size"])
    ids = torch.randint(0, vocab_size, (NUM_PROMPTS, 24), generator=torch.Generator().manual_seed(0))
    return list(ids), "32 rows of random tokens, because the model has no tokenizer"


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # the library raises anything; what we wrote cannot be used, which is the finding
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {str(error).splitlines()[0]}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _reference(base: BaseModel, adapter: Adapter, scratch: Path) -> tuple[Any, str]:
    if base.folder is not None and base.is_in_folder:
        model = _load(base.folder)
    else:
        hf.write(base, scratch)
        model = _load(scratch)
    if _attach(model, adapter):
        return model, "base with the adapter's branch beside it, fp32"
    del model
    exact = replace(base, weights=CastWeights(base.weights, torch.float32))
    folder = scratch / "exact"
    folder.mkdir()
    hf.write(merged_model(exact, plan_merge(exact, adapter)), folder)
    return _load(folder), "exact fp32 sums as weights"


def _attach(model: Any, adapter: Adapter) -> bool:
    """Hook the adapter's branches onto the base's modules; False when a module is not there as a module."""
    sizes = [1 + max(rows.ids) for rows in adapter.rows.values()]
    if sizes and max(sizes) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)
    modules = dict(model.named_modules())
    for name, rows in adapter.rows.items():
        with torch.no_grad():  # in place: a tied head uses them too
            modules[name].weight[list(rows.ids)] = rows.values_ND.float()
    for name, tensor in adapter.whole.items():
        owner, _, leaf = name.rpartition(".")
        old = getattr(modules.get(owner), leaf, None)
        if not isinstance(old, Tensor) or old.shape != tensor.shape:
            return False
        setattr(modules[owner], leaf, nn.Parameter(tensor.float(), requires_grad=False))  # a tied twin keeps its own
    if not _attach_experts(model, adapter):
        return False
    for name, factors in adapter.factors.items():
        if factors.num_experts:
            continue
        module = modules.get(name)
        if module is None or not hasattr(module, "weight"):
            return False
        module.register_forward_hook(_embedding_hook(factors) if factors.is_embedding else _linear_hook(factors))
    return True


def _attach_experts(model: Any, adapter: Adapter) -> bool:
    """Put changes beside fused experts; False where the model has none of that name."""
    fused: dict[str, dict[str, ExpertFactors]] = {}
    for name, f in adapter.factors.items():
        if f.num_experts:
            module, _, parameter = name.rpartition(".")
            a, b = (nn.Parameter(t.float(), requires_grad=False) for t in (f.a_RI, f.b_OR))
            fused.setdefault(module, {})[parameter] = ExpertFactors(a, b, f.scale)
    there = experts_modules(model)
    if not fused.keys() <= there.keys():
        return False
    for name, factors in fused.items():
        put_module(model, name, LoRAExperts(there[name], factors))
    return True


def _linear_hook(factors: Factors) -> Any:
    a, b = factors.a_RI.float(), factors.b_OR.float()

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        branch = factors.scale * F.linear(F.linear(args[0], a), b)
        if factors.magnitude_O is None:
            return y + branch
        weight = module.weight.T if factors.is_transposed else module.weight  # type: ignore[union-attr, operator]
        length = torch.linalg.norm(weight + factors.scale * b @ a, dim=1)  # type: ignore[operator]
        bias = getattr(module, "bias", None)
        plain = y if bias is None else y - bias
        scaled = (plain + branch) * (factors.magnitude_O.float() / length)
        return scaled if bias is None else scaled + bias

    return hook


def _embedding_hook(factors: Factors) -> Any:
    a, b = factors.a_RI.float(), factors.b_OR.float()

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        branch = factors.scale * F.linear(F.embedding(args[0], a.T), b)
        return y + branch * getattr(module, "embed_scale", 1.0)  # Gemma scales the rows that it looks up

    return hook


@torch.no_grad()
def _run(model: Any, prompts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(logits [T, V] of each prompt, greedy continuation [N]); prompts of one length run together, unpadded."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for rows in by_length.values():
        ids = torch.stack([prompts[i] for i in rows])
        output = model(input_ids=ids, use_cache=True)
        logits, cache = output.logits.float(), output.past_key_values
        new = [logits[:, -1].argmax(-1)]
        for _ in range(NUM_NEW_TOKENS - 1):
            step = model(input_ids=new[-1][:, None], past_key_values=cache, use_cache=True)
            new.append(step.logits[:, -1].argmax(-1))
        tokens = torch.stack(new, dim=1)
        results.update({i: (logits[k], tokens[k]) for k, i in enumerate(rows)})
    return [results[i] for i in range(len(prompts))]
