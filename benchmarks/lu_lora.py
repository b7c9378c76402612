"""The study of local learning: full LoRA, frozen lower layers, and each local rule, at equal steps and equal time.

    python benchmarks/lu_lora.py run --data rows.json --out results/lu_lora             # all cells; stop it at any time
    python benchmarks/lu_lora.py run --data rows.json --out results/lu_lora --methods lora frozen feedback --shares 0.4
    python benchmarks/lu_lora.py run --data rows.json --out results/lu_lora --equal-time    # LoRA with as much time
    python benchmarks/lu_lora.py table --out results/lu_lora

A cell is one (method, share of local layers, seed). Each is a `finerank tune` of its own, so its run folder shows
everything; its numbers are kept in CELL.json, and cells that have one are not run again. `--equal-time` adds, for each
finished local cell, a run of full LoRA with the number of steps that takes the same time.

Reported: held-out loss at the end, median step time of the last three quarters, peak memory of the process, and bytes
kept for the backward pass of one micro-batch ("activations", at the default ranks). Run it on an otherwise idle
machine: seconds are wall clock.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = ("lora", "frozen", "feedback", "mindspeed", "oja")
SHARES = (0.2, 0.375, 0.6, 0.8)


def main() -> None:
    """Run cells, or print the table of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "Flags after -- go to every tune run, e.g. -- --lr 5e-4"
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder of run folders and CELL.json files")
    parser.add_argument("--data", help="rows; a tenth is held out")
    parser.add_argument("--load", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the layers that are local")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument("--equal-time", action="store_true")
    own, tune = sys.argv[1:], []
    if "--" in own:
        own, tune = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    args.tune = tune
    if args.what == "table":
        print(table([json.loads(p.read_text()) for p in sorted(args.out.glob("*.json"))]))
        return
    if not args.data:
        parser.error("run needs --data")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.equal_time:
        for cell in equal_time_cells(args):
            run_cell(args, **cell)
        return
    for seed in args.seeds:
        for method in args.methods:
            for share in (0.0,) if method == "lora" else args.shares:
                run_cell(args, method=method, share=share, seed=seed, steps=args.steps)


def cell_name(method: str, share: float, seed: int, of: str | None = None) -> str:
    """The cell's file and run-folder name."""
    return f"{method}-{100 * share:g}-seed{seed}" + (f"-time-of-{of}" if of else "")


def equal_time_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of full LoRA that take as long as each finished local cell."""
    done = {p.stem: json.loads(p.read_text()) for p in args.out.glob("*.json")}
    cells = []
    for name, cell in sorted(done.items()):
        full = done.get(cell_name("lora", 0.0, cell["seed"]))
        if cell["method"] not in args.methods or cell["method"] == "lora" or full is None:
            continue
        steps = round(cell["num_steps"] * cell["step_seconds"] / full["step_seconds"])
        cells.append({"method": "lora", "share": 0.0, "seed": cell["seed"], "steps": steps, "of": name})
    return cells


def run_cell(
    args: argparse.Namespace, *, method: str, share: float, seed: int, steps: int | None, of: str | None = None
) -> None:
    """One tune run and its CELL.json; nothing when that is there."""
    name = cell_name(method, share, seed, of)
    target = args.out / f"{name}.json"
    if target.exists():
        return
    flags = ["--load", args.load, "--data-path", args.data, "--val-set-size", "0.1", "--seed", str(seed)]
    flags += ["--output-dir", str(args.out / name), "--overwrite-output-dir", "--no-keep-best", *args.tune]
    flags += ["--train-iters", str(steps)] if steps else []
    num_layers = count_layers(args.load)
    last = max(round(share * num_layers), 1) - 1 if method != "lora" else None
    if last is not None:
        flags += ["--lu-lora-final-layer-index", str(last), "--lu-lora-rule", method]
    started = time.time()
    subprocess.run([sys.executable, "-m", "finerank", "tune", *flags], check=True)
    rows = [json.loads(line) for line in (args.out / name / "metrics.jsonl").read_text().splitlines()]
    taken = [row for row in rows if row.get("step_seconds")]
    cell = {
        "method": method,
        "share": share,
        "seed": seed,
        "equal_time_of": of,
        "final_layer_index": last,
        "num_layers": num_layers,
        "num_steps": len(taken),
        "first_eval_loss": next(row["eval_loss"] for row in rows if row.get("eval_loss") is not None),
        "eval_loss": [row["eval_loss"] for row in rows if row.get("eval_loss") is not None][-1],
        "step_seconds": statistics.median(row["step_seconds"] for row in taken[len(taken) // 4 :]),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in taken),
        "activation_bytes": activation_bytes(args.load, last, method),
        "wall_seconds": time.time() - started,
        "flags": flags,
    }
    target.write_text(json.dumps(cell, indent=2) + "\n")
    print(f"{name}: held-out loss {cell['eval_loss']:.4f}, {cell['step_seconds']:.2f} s/step", flush=True)


def count_layers(load: str) -> int:
    """Decoder layers of a base model."""
    from transformers import AutoConfig

    from finerank.models.find import find_model
    from finerank.models.settings import ModelSettings

    return AutoConfig.from_pretrained(find_model(ModelSettings(load=load)).folder).get_text_config().num_hidden_layers


def activation_bytes(load: str, last: int | None, method: str, *, num_tokens: int = 1024) -> int:
    """Bytes that one packed micro-batch keeps for its backward pass: saved tensors and local signals, no weights."""
    import torch

    from finerank.adapters.inject import inject_adapters
    from finerank.adapters.lu_lora import start_local_learning
    from finerank.adapters.settings import AdapterSettings
    from finerank.models.attention import use_packed_attention
    from finerank.models.forward import loss_sum, verified_head
    from finerank.models.load import load_model
    from finerank.models.settings import ModelSettings

    model = load_model(ModelSettings(load=load)).model
    use_packed_attention(model)
    settings = AdapterSettings()
    if last is not None:
        settings = AdapterSettings(lu_lora_final_layer_index=last, lu_lora_rule=method)
    adapters = inject_adapters(model, settings, seed=0)
    local = start_local_learning(adapters, settings, lr=1e-4, seed=0)
    verified_head(model)
    model.train()
    if local is not None:
        local.begin_step(10**6)  # past what a rule does in its first steps only
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(num_tokens, device=model.device)[None] % 300 + 5
    borders = torch.tensor([0, num_tokens // 2, num_tokens], dtype=torch.int32, device=model.device)
    positions = torch.arange(num_tokens, device=model.device)[None] % (num_tokens // 2)
    signals: list[torch.Tensor] = []
    if local is not None:
        take = local.rule.take_signals
        local.rule.take_signals = lambda: (taken := take(), signals.extend(taken.values()))[0]  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = loss_sum(model, ids, ids.roll(-1, 1), positions, cu_seqlens=borders)
    total = sum(kept.values()) + sum(s.numel() * s.element_size() for s in signals)
    loss.backward()
    return total


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown, one line for each method and share; mean and spread over seeds, share of freezing's loss won back."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    shorter = {c["equal_time_of"]: c["eval_loss"] for c in cells if c["equal_time_of"]}
    for cell in cells:
        if not cell["equal_time_of"]:
            groups.setdefault((cell["method"], cell["share"]), []).append(cell)
    full = {c["seed"]: c for c in cells if c["method"] == "lora" and not c["equal_time_of"]}
    frozen = {(c["share"], c["seed"]): c["eval_loss"] for c in cells if c["method"] == "frozen"}
    lines = [
        "| local | method | held-out loss | spread | won back | LoRA, equal time | step | activations | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, share), group in sorted(groups.items(), key=lambda item: (item[0][1], METHODS.index(item[0][0]))):
        losses = [c["eval_loss"] for c in group]
        won, steps, kept, peak, equal = [], [], [], [], []
        for c in group:
            lora, control = full.get(c["seed"]), frozen.get((share, c["seed"]))
            if lora is None:
                continue
            if control is not None and control != lora["eval_loss"]:
                won.append((control - c["eval_loss"]) / (control - lora["eval_loss"]))
            steps.append(c["step_seconds"] / lora["step_seconds"])
            kept.append(c["activation_bytes"] / lora["activation_bytes"])
            peak.append(c["peak_memory_bytes"] / lora["peak_memory_bytes"])
            if (name := cell_name(method, share, c["seed"])) in shorter:
                equal.append(shorter[name])
        lines.append(
            f"| {share:.0%} | {method} | {statistics.mean(losses):.4f} | {max(losses) - min(losses):.4f} | "
            f"{_mean(won, '.0%')} | {_mean(equal, '.4f')} | {_mean(steps, '.2f')} | {_mean(kept, '.2f')} | "
            f"{_mean(peak, '.2f')} |"
        )
    return "\n".join(lines) + "\n\nStep, activations and peak memory are shares of full LoRA's with the same seed.\n"


def _mean(values: list[float], form: str) -> str:
    return format(statistics.mean(values), form) if values else "-"


if __name__ == "__main__":
    main()
