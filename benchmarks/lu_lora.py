"""The study of local learning: full LoRA, frozen lower layers, and each local rule, at equal steps and equal time.

    python benchmarks/lu_lora.py run --data rows.json --out study                    # all cells; stop it at any time
    python benchmarks/lu_lora.py run --data rows.json --out study --methods lora frozen feedback --shares 0.4
    python benchmarks/lu_lora.py run --data rows.json --held-out others.json --out own -- --num-epochs 4
    python benchmarks/lu_lora.py steps --data rows.json --out study --threads 2      # seconds and memory of a step
    python benchmarks/lu_lora.py table --out study

A cell is one (method, share of local layers, seed): a `finerank tune` of its own over one epoch, with the last 80 rows
held out (or the rows of another file), in a run folder of its own. A cell that was stopped goes on where it was, and
one that is finished is not run again; the most telling cells come first. `steps` times one optimizer step of every
method in turn, in one process, so that a busy machine hurts all alike, and counts the bytes that a micro-batch keeps
for its backward pass (saved tensors and local signals, no weights); it needs an otherwise idle machine. With two
threads or more, micro-batches are computed side by side, under the allocator that `finerank tune` takes.

The learning rate is constant, so LoRA's loss "at equal time" is read off its curve, at the step that it reaches in the
time of the other's whole run (linear between evaluations). What is won back is the share of what freezing loses at the
end, by the held-out loss, and by the training loss from step 17 on: its rows come for the first time in an
epoch, and there are more of them, so it is less noisy. The table says what the cells were run with, as far as that is
not what `run` gives them now.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS = ("lora", "frozen", "feedback", "sampled", "mindspeed", "oja")
SHARES = (0.4, 0.6, 0.2, 0.8)
HELD_OUT = 80
FIRST_COMPARED = 17
"""The step from which on training losses are compared."""
STUDY = "--seq-length 128 --global-batch-size 16 --micro-batch-tokens 2048 --lr 5e-4 --lr-decay-style constant"
STUDY += " --lora-r 16 --lora-alpha 16 --eval-interval 16 --save-interval 4 --no-keep-best --no-share-prompts"


def main() -> None:
    """Run cells, time steps, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = f"Flags after -- go to every tune run, beside or in place of {STUDY}"
    parser.add_argument("what", choices=("run", "steps", "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--data", help="rows")
    parser.add_argument("--held-out", help=f"rows of a file of their own; default: the last {HELD_OUT} of the data")
    parser.add_argument("--load", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the layers that are local")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps: timed steps of each method, after one for warming"
    )
    parser.add_argument("--cpu-seconds", action="store_true", help="steps: of all threads, for a busy machine")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=128, help="steps: tokens of the longest row; cells have 128")
    own, args_of_tune = sys.argv[1:], []
    if "--" in own:
        own, args_of_tune = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    args.tune = args_of_tune
    if args.what != "table" and not args.data:
        parser.error(f"{args.what} needs --data")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "run":
        for seed in args.seeds:
            for share in (0.0, *args.shares):
                for method in args.methods:
                    if (method == "lora") == (share == 0.0):
                        run_cell(args, method=method, share=share, seed=seed)
    elif args.what == "steps":
        start_as_tune_does(args.threads)
        time_steps(args)
    else:
        print(table(args.out))


def cell_name(method: str, share: float, seed: int) -> str:
    """The run folder's name."""
    return f"{method}-{100 * share:g}-seed{seed}"


def run_cell(args: argparse.Namespace, *, method: str, share: float, seed: int) -> None:
    """One tune run, from where it is to its end."""
    folder = args.out / cell_name(method, share, seed)
    if (folder / "results.json").exists():
        return
    flags = ["--load", args.load, "--data-path", args.data, *study_flags(args.tune)]
    if args.held_out:
        flags += ["--valid-data-path", args.held_out]
    else:
        num_rows = len(json.loads(Path(args.data).read_text(encoding="utf-8")))
        flags += ["--split", f"{num_rows - HELD_OUT},{HELD_OUT},0"]
    flags += ["--seed", str(seed), "--threads", str(args.threads), "--output-dir", str(folder), "--resume", "auto"]
    if method != "lora":
        last = last_local(count_layers(args.load), share)
        flags += ["--lu-lora-final-layer-index", str(last), "--lu-lora-rule", method]
    subprocess.run([sys.executable, "-m", "finerank", "tune", *flags, *args.tune], check=True)


def study_flags(given: list[str]) -> list[str]:
    """The study's flags but for those that are given another value."""
    return [word for flag in split_study() if flag[0] not in given for word in flag]


def split_study() -> list[list[str]]:
    """The study's flags, each alone or with its value."""
    return [f"--{words}".split() for words in STUDY.removeprefix("--").split(" --")]


def last_local(num_layers: int, share: float) -> int:
    """K for a share of local layers."""
    return max(round(share * num_layers), 1) - 1


def count_layers(load: str) -> int:
    """Decoder layers of a base model."""
    from transformers import AutoConfig

    from finerank.models.find import find_model
    from finerank.models.settings import ModelSettings

    return AutoConfig.from_pretrained(find_model(ModelSettings(load=load)).folder).get_text_config().num_hidden_layers


def start_as_tune_does(num_threads: int) -> None:
    """Start this program anew under the allocator and the settings of torch that `finerank tune` runs with."""
    from finerank.models.runtime import start_anew, wanted_environment

    if changes := wanted_environment(os.environ, num_threads=num_threads):
        start_anew(changes)


def time_steps(args: argparse.Namespace) -> None:
    """Seconds of an optimizer step of each method in turn, and bytes kept; into steps.json."""
    import torch

    torch.set_num_threads(args.threads)
    num_layers = count_layers(args.load)
    cells = [("lora", 0.0)] if "lora" in args.methods else []
    cells += [(method, share) for share in args.shares for method in args.methods if method != "lora"]
    steppers = {
        f"{method} {share:g}": make_stepper(args, method, last_local(num_layers, share) if share else None)
        for method, share in cells
    }
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    kept: dict[str, int] = {}
    for step in range(args.rounds + 1):
        for name, stepper in steppers.items():
            start = clock()
            kept[name] = max(kept.get(name, 0), stepper(step, step == 0))
            if step:
                seconds[name].append(clock() - start)
        if step:  # each round is a result, should this one be the last
            found: dict[str, dict[str, Any]] = {
                n: {"step_seconds": statistics.median(own), "activation_bytes": kept[n], "seconds": own}
                for n, own in seconds.items()
            }
            (args.out / "steps.json").write_text(json.dumps(found, indent=2) + "\n")
    lora = found.get("lora 0")
    for name, cell in found.items():
        ratio = ""
        if lora is not None:
            times = sorted(one / whole for one, whole in zip(cell["seconds"], lora["seconds"], strict=True))
            bytes_ = cell["activation_bytes"] / lora["activation_bytes"]
            ratio = f"  {statistics.median(times):.2f}x LoRA's step ({times[0]:.2f}-{times[-1]:.2f}, round by round), "
            ratio += f"{bytes_:.2f}x its activations"
        print(f"{name:>15}: {cell['step_seconds']:.2f} s, {cell['activation_bytes'] / 2**20:.1f} MiB{ratio}")


def make_stepper(args: argparse.Namespace, method: str, last: int | None) -> Callable[[int, bool], int]:
    """A run's own parts, and what takes an optimizer step with them; it returns the bytes kept, if counted."""
    import torch

    from finerank.recipes._prepare import prepare
    from finerank.recipes.tune import Settings
    from finerank.train.micro_batches import backward_of
    from finerank.train.optim import build_optimizer, clip_gradients

    local_settings = {} if last is None else {"lu_lora_final_layer_index": last, "lu_lora_rule": method}
    settings = Settings(
        **{"load": args.load, "data_path": [args.data], "seq_length": args.seq_length, "seed": 1}
        | {
            "global_batch_size": 16,
            "micro_batch_tokens": 2048,
            "share_prompts": False,
            "lora_r": 16,
            "lora_alpha": 16.0,
            "lr": 5e-4,
        }
        | local_settings
    )
    parts = prepare(settings, args.out, say=lambda _: None)
    model, local, plan = parts.loaded.model, parts.local, parts.plan
    named = [(n, p) for n, p in parts.trained.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(named, parts.settings, lr_ratios=parts.trained.lr_ratios)
    backward = backward_of([p for _, p in named], at_once=parts.settings.micro_batches_at_once or 1)
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def step(number: int, counts: bool) -> int:
        most = [0]

        def forward(i: int, batch: Any) -> Any:
            if local is not None:
                local.begin_micro_batch(i)
            kept = Kept(fixed) if counts else None
            with torch.autograd.graph.saved_tensors_hooks(kept.keep if kept else _same, _same):
                loss = parts.loss_function(model, batch)
            most[0] = max(most[0], kept.total() if kept else 0)
            return loss

        model.train()
        batches = plan.micro_batches(number)
        if local is not None:
            num_rows = [len(batch.rows) for batch in batches]
            local.begin_step(number, sampled=[batch.is_sample for batch in batches], num_rows=num_rows)
        for _ in backward(batches, forward, 1000.0):
            pass
        clip_gradients([p for _, p in named], 1.0)
        optimizer.step()
        if local is not None:
            local.apply_local_update(lr_factor=1.0)
        optimizer.zero_grad(set_to_none=True)
        return most[0]

    return step


def _same(tensor: Any) -> Any:
    return tensor


class Kept:
    """Counts what one micro-batch keeps between its forward and its backward pass."""

    def __init__(self, fixed: set[int]):
        """`fixed`: storages that are there anyway."""
        self.fixed, self.sizes = fixed, dict[int, int]()
        self.tensors: list[Any] = []

    def keep(self, tensor: Any) -> Any:
        """A tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.fixed:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.tensors.append(tensor)  # so that no other tensor gets its place
        return tensor

    def total(self) -> int:
        """Bytes; lets go of the tensors."""
        self.tensors.clear()
        return sum(self.sizes.values())


def read_cells(out: Path) -> list[dict[str, Any]]:
    """What the run folders say: method, share, seed, steps finished, and the curve of the held-out loss."""
    cells = []
    for folder in sorted(out.glob("*-seed*")):
        if not (folder / "metrics.jsonl").exists():
            continue
        method, share, seed = folder.name.split("-")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curve = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
        late = [row["loss"] for row in rows if row["step"] >= FIRST_COMPARED and row.get("loss") is not None]
        given = other_flags((folder / "config.yaml").read_text(encoding="utf-8"))
        is_done = (folder / "results.json").exists()
        cell = {"method": method, "share": share, "seed": seed, "curve": curve, "done": is_done, "given": given}
        peak = max((row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")), default=None)
        cells.append(cell | {"late": statistics.mean(late) if late else None, "peak": peak})
    return cells


def other_flags(config: str) -> list[str]:
    """The flags of the study that a run was given another value for, with that value."""
    import yaml

    stored, found = yaml.safe_load(config), []
    for flag, *given in split_study():
        wanted = yaml.safe_load(given[0]) if given else not flag.startswith("--no-")
        name = flag.removeprefix("--" if given or wanted else "--no-").replace("-", "_")
        value = stored.get(name)
        if name in stored and value != (float(wanted) if isinstance(value, float) else wanted):
            found.append(f"{flag} {value}")
    return found


def table(out: Path) -> str:
    """Markdown: a line for each method and share; mean and spread over seeds, share of freezing's loss won back."""
    timed = json.loads((out / "steps.json").read_text()) if (out / "steps.json").exists() else {}
    cells = [cell for cell in read_cells(out) if cell["done"]]
    full = {c["seed"]: c for c in cells if c["method"] == "lora"}
    frozen = {(c["share"], c["seed"]): c for c in cells if c["method"] == "frozen"}
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((float(cell["share"]), cell["method"]), []).append(cell)
    lora = timed.get("lora 0")
    lines = [
        "| local | method | seeds | held-out loss | spread | won back | of training loss | LoRA at equal time | step | "
        "activations | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (share, method), group in sorted(groups.items(), key=lambda item: (item[0][0], METHODS.index(item[0][1]))):
        step = timed.get(f"{method} {share / 100:g}")
        times = step["step_seconds"] / lora["step_seconds"] if step and lora else None
        kept = step["activation_bytes"] / lora["activation_bytes"] if step and lora else None
        losses = [c["curve"][-1][1] for c in group]
        won, late, equal = [], [], []
        for c in group:
            control, whole = frozen.get((c["share"], c["seed"])), full.get(c["seed"])
            if whole is not None and control is not None:
                won.append(won_back(control["curve"][-1][1], c["curve"][-1][1], whole["curve"][-1][1]))
                if control["late"] is not None:
                    late.append(won_back(control["late"], c["late"], whole["late"]))
            if whole is not None and times is not None:
                equal.append(loss_at(whole["curve"], times * c["curve"][-1][0]))
        lines.append(
            f"| {share:g}% | {method} | {len(group)} | {statistics.mean(losses):.4f} | "
            f"{max(losses) - min(losses):.4f} | {_mean(won, '.0%')} | {_mean(late, '.0%')} | {_mean(equal, '.4f')} | "
            f"{'-' if times is None else format(times, '.2f')} | {'-' if kept is None else format(kept, '.2f')} | "
            f"{_mean([c['peak'] / 2**20 for c in group if c['peak']], '.0f')} |"
        )
    lines += ["", "Step and activations are shares of full LoRA's; the peak is the process's, in MiB."]
    for cell in cells:
        if cell["given"]:
            name = cell_name(cell["method"], float(cell["share"]) / 100, int(cell["seed"].removeprefix("seed")))
            lines.append(f"{name} was run with {', '.join(cell['given'])}.")
    return "\n".join(lines) + "\n"


def won_back(control: float, loss: float, full: float) -> float:
    """The share of what the control loses against full LoRA that a loss wins back."""
    return (control - loss) / (control - full)


def loss_at(curve: list[tuple[int, float]], step: float) -> float:
    """The held-out loss at a step, linear between evaluations."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if before <= step <= after:
            return high + (low - high) * (step - before) / (after - before)
    return curve[-1][1]


def _mean(values: list[float], form: str) -> str:
    return format(statistics.mean(values), form) if values else "-"


if __name__ == "__main__":
    main()
