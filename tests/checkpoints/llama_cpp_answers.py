"""llama.cpp's greedy tokens for a GGUF model, with or without a LoRA adapter; for the slow tests."""

from pathlib import Path
from typing import Any

PROMPT = [5, 17, 120, 44, 260, 9, 301, 77]


def greedy(xllamacpp: Any, model: Path, *, lora: Path | None = None, num_tokens: int = 12) -> tuple[str, list[int]]:
    """(text, token ids) of the greedy continuation of `PROMPT`; ids of broken UTF-8 sequences are left out."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    request = {"prompt": PROMPT, "n_predict": num_tokens, "temperature": 0.0, "cache_prompt": False, "n_probs": 1}
    answer = server.handle_completions(request)
    choice = answer["choices"][0]
    return choice["text"], [token["id"] for token in choice["logprobs"]["content"]]
