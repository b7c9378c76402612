"""A forward and backward pass through one layer of fused experts with LoRA: finerank's beside PEFT's.

    python benchmarks/experts_step.py                            both twice, each a process of its own
    python benchmarks/experts_step.py --experts 32 --tokens 512

A Mixtral layer's experts in bf16, random weights and routing, rank 16 on both parameters. Printed: the median time of a
pass, how far the peak of the process's memory rose above what it held before the first pass, and the largest difference
of the outputs and gradients in fp32 (relative to the largest entry) on a small layer.
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import Tensor, nn


def main() -> None:
    """Run one contestant, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"experts": 16, "hidden": 1024, "wide": 1024, "tokens": 1024, "passes": 7, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("finerank", "peft"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        measure(args)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"outputs and gradients differ by at most {difference():.2g} of the largest entry (fp32)")
    for contestant in ("finerank", "peft", "finerank", "peft"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", contestant], check=True)


def layer(args: Any, dtype: torch.dtype, contestant: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The experts with their adapter, and its parameters by name in PEFT's file."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=args.hidden, intermediate_size=args.wide, num_local_experts=args.experts, num_experts_per_tok=2
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    experts = MixtralExperts(config).to(dtype).requires_grad_(False)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    model = nn.ModuleDict({"experts": experts})
    names = ["gate_up_proj", "down_proj"]
    if contestant == "peft":
        import peft

        peft.inject_adapter_in_model(
            peft.LoraConfig(r=16, lora_alpha=32, target_modules=[], target_parameters=[f"experts.{n}" for n in names]),
            model,
        )
        found = {n.removeprefix("experts.").replace(".default", ""): p for n, p in model.named_parameters()}
        parameters = {n: p for n, p in found.items() if p.requires_grad}
    else:
        from finerank.adapters.experts import fresh_experts

        part = fresh_experts(experts, "experts", names, {"r": 16, "lora_alpha": 32}, seed=0, trainable=True)
        model["experts"], parameters = part, dict(part.trained())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=g))
    return model["experts"], parameters  # type: ignore[return-value]


def inputs(args: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts of each token, and their weights."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(args.tokens, args.hidden, generator=g).to(dtype).requires_grad_()
    index = torch.rand(args.tokens, args.experts, generator=g).argsort(1)[:, :2]
    return x, index, torch.rand(args.tokens, 2, generator=g)


def measure(args: Any) -> None:
    """Time and memory of one contestant, in this process."""
    module, _ = layer(args, torch.bfloat16, args.only)
    x, index, weights = inputs(args, torch.bfloat16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(args.passes):
        start = time.perf_counter()
        module(x, index, weights).float().square().sum().backward()
        times.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{args.only:9} {statistics.median(times[1:]):7.3f} s a pass, peak {grown:6.0f} MiB above the layer's own")


def difference() -> float:
    """Largest difference between both, of outputs and all gradients."""
    small = argparse.Namespace(experts=4, hidden=64, wide=48, tokens=96)
    results = []
    for contestant in ("finerank", "peft"):
        module, parameters = layer(small, torch.float32, contestant)
        x, index, weights = inputs(small, torch.float32)
        y = module(x, index, weights)
        leaves = [x, *(parameters[n] for n in sorted(parameters))]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(*results, strict=True))


if __name__ == "__main__":
    main()
