"""Time and memory of `finerank merge` on a generated checkpoint, beside a plain copy of its files.

    python benchmarks/merge.py --size-gb 8 --folder /data/bench

Makes a random Llama of about `--size-gb` (bf16, shards of 2 GB) and a LoRA adapter of rank 16 on all its linears,
copies the folder, merges it in a child process, and prints seconds, peak resident memory of the merge and the bound
`2 x largest tensor + 500 MB`. The files are removed afterwards.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finerank.checkpoints.formats import hf, peft
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.regroup import lora_config
from finerank.checkpoints.weights import BaseModel, LazyWeights, TensorInfo

RANK = 16


def shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Llama with a vocabulary of 128,256 and an MLP of 3.5 x hidden."""
    kv, ffn = hidden // 4, 7 * hidden // 2
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128_256, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found[p + "input_layernorm.weight"] = found[p + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            found[f"{p}self_attn.{name}.weight"] = (rows, hidden)
        found[p + "mlp.gate_proj.weight"] = found[p + "mlp.up_proj.weight"] = (ffn, hidden)
        found[p + "mlp.down_proj.weight"] = (hidden, ffn)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (128_256, hidden)}


def make_base(folder: Path, size_gb: float) -> BaseModel:
    """Write the random base, tensor by tensor."""
    hidden = 4096 if size_gb >= 4 else 1024 if size_gb >= 0.7 else 512
    one_layer = sum(torch.Size(s).numel() for n, s in shapes(hidden, 1).items() if ".layers." in n)
    outside = 2 * 128_256 * hidden
    layers = max(1, round((size_gb * 1e9 / 2 - outside) / one_layer))
    noise = torch.randn(1 << 20).mul_(0.02).to(torch.bfloat16)

    def make(shape: tuple[int, ...]) -> Any:
        numel = torch.Size(shape).numel()
        return lambda: noise.repeat(-(-numel // noise.numel()))[:numel].reshape(shape)

    entries = {n: (TensorInfo(s, torch.bfloat16), make(s)) for n, s in shapes(hidden, layers).items()}
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "vocab_size": 128_256},
        **{"num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512},
        **{"head_dim": 128, "intermediate_size": 7 * hidden // 2, "tie_word_embeddings": False},
    }
    folder.mkdir(parents=True)
    hf.write(BaseModel(config, LazyWeights(entries)), folder, max_shard_bytes=2_000_000_000)
    return hf.read(folder)


def make_adapter(base: BaseModel, folder: Path) -> None:
    """Write a random adapter on all linears."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name in base.weights:
        if name.endswith("_proj.weight"):
            out, inner = base.weights.info(name).shape
            a, b = (0.01 * torch.randn(s, generator=generator) for s in ((RANK, inner), (out, RANK)))
            factors[name.removesuffix(".weight")] = Factors(a, b, 2.0)
    folder.mkdir(parents=True)
    peft.write_adapter(Adapter(lora_config(RANK, 2 * RANK, factors), factors), folder)


def run_child(argv: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of a finerank command in a process of its own."""
    code = (
        "import sys, time, resource; from finerank.cli import main; start = time.perf_counter();"
        "status = main(sys.argv[1:]);"
        "print(f'RESULT {time.perf_counter() - start} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} {status}')"
    )
    output = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True).stdout
    seconds, kilobytes, status = output.split("RESULT ")[1].split()
    assert status == "0", output
    return float(seconds), float(kilobytes) * 1024 / 1e6


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy the folder and flush it, which the merge does too."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def main() -> None:
    """Make, copy, merge, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; needs 3 x size")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    scratch = args.folder / f"finerank-merge-bench-{os.getpid()}"
    try:
        base = make_base(scratch / "base", args.size_gb)
        make_adapter(base, scratch / "adapter")
        copies, merges, peaks = [], [], []
        for _ in range(args.repeats):
            copies.append(plain_copy(scratch / "base", scratch / "copy"))
            shutil.rmtree(scratch / "copy")
            argv = ["merge", "--load", str(scratch / "base"), "--lora-load", str(scratch / "adapter")]
            seconds, peak = run_child([*argv, "--save-dir", str(scratch / "out"), "--proof", "weights"])
            merges.append(seconds)
            peaks.append(peak)
            shutil.rmtree(scratch / "out")
        largest = max(base.weights.info(n).nbytes for n in base.weights) / 1e6
        result = {
            "size_gb": base.weights.nbytes() / 1e9,
            "copy_seconds": copies,
            "merge_seconds": merges,
            "copy_over_merge": min(copies) / min(merges),
            "merge_peak_mb": max(peaks),
            "bound_mb": 2 * largest + 500,
            "largest_tensor_mb": largest,
            "import_mb_of_this_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
        }
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
