"""What a quantised base costs: our LoRA step, with the base in 4 and in 8 bits, beside PEFT over bitsandbytes' linears.

    python benchmarks/qlora.py --data alpaca_en_demo.json
    python benchmarks/qlora.py --data rows.json --steps 3 --contestants finerank finerank-4bit peft-4bit
    python benchmarks/qlora.py --data rows.json --contestants finerank-4bit peft-4bit --adapters results/adapters
    python benchmarks/qlora.py --data rows.json --quick                        does everything run?

Contestants take their steps by turns over the same rows, as in `tune_step.py`, whose options these are; a ratio is the
contestant's step over the first contestant's, step by step. The held-out loss is each one's own, on its own base. With
--adapters PEFT starts from finerank's adapter, both leave theirs in that folder, and the held-out loss of all three is
taken by PEFT over one base in bitsandbytes' linears, where nothing but the adapters differs.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import tune_step
from tune_step import ENVIRONMENT, LARGE_PAGES, Setup

_TRAINER = ("--dtype", "bf16", "--micro-batch", "1", "--bits")
tune_step.SETUPS.update(
    {
        "finerank": Setup("finerank, LoRA over bf16", "finerank_tune.py", environment=ENVIRONMENT),
        "finerank-4bit": Setup("finerank, --load-4bit", "finerank_tune.py", ("--bits", "4"), ENVIRONMENT),
        "finerank-8bit": Setup("finerank, --load-8bit", "finerank_tune.py", ("--bits", "8"), ENVIRONMENT),
        "peft-4bit": Setup(
            "PEFT + bitsandbytes NF4, HF Trainer (bf16, micro-batch 1, large pages)",
            "hf_trainer.py",
            (*_TRAINER, "4"),
            LARGE_PAGES,
        ),
        "peft-4bit-best": Setup(
            "PEFT + bitsandbytes NF4, HF Trainer (bf16, micro-batch 1, eager, finerank's allocator, no spinning)",
            "hf_trainer.py",
            (*_TRAINER, "4", "--attention", "eager"),
            ENVIRONMENT | {"OMP_WAIT_POLICY": "passive"},
        ),
        "peft-8bit": Setup(
            "PEFT + bitsandbytes int8, HF Trainer (bf16, micro-batch 1, large pages)",
            "hf_trainer.py",
            (*_TRAINER, "8"),
            LARGE_PAGES,
        ),
    }
)
CONTESTANTS = ["finerank", "finerank-4bit", "finerank-8bit", "peft-4bit-best"]


def losses_over_one_base(args: argparse.Namespace, folder: Path, names: list[str]) -> dict[str, float]:
    """Held-out loss of each adapter in the folder, over bitsandbytes' NF4 linears."""
    sys.path.insert(0, str(tune_step.HERE / "peers"))
    from hf_trainer import quantized
    from peft import PeftModel
    from protocol import Task, held_out_loss, load_rows

    from finerank.models.load import load_model
    from finerank.models.settings import ModelSettings

    loaded = load_model(ModelSettings(load=args.model, dtype="bf16"))
    told = {name: getattr(args, name, None) for name in Task.__annotations__}
    _, held_out, _ = load_rows(Task(**told | {"data": str(args.data), "num_steps": 1}), loaded.tokenizer)
    model = PeftModel.from_pretrained(quantized(loaded.source.path, 4), folder / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, name)
    found = {}
    for name in names:
        model.set_adapter(name)
        found[name] = held_out_loss(model, held_out)
        print(f"held-out loss over one base, {name}: {found[name]:.4f}", flush=True)
    return found


def main() -> None:
    parser = tune_step.options(__doc__, CONTESTANTS)
    parser.add_argument("--adapters", type=Path, help="start alike, keep the adapters here, compare them on one base")
    args = tune_step.arguments(parser)
    if args.adapters:
        for name in args.contestants:
            setup = tune_step.SETUPS[name]
            own = ("--adapters", str(args.adapters.resolve()))
            tune_step.SETUPS[name] = dataclasses.replace(setup, options=(*setup.options, *own))
    with tempfile.TemporaryDirectory() as log:
        summary = tune_step.summarise(tune_step.race(args, Path(log)), args)
    summary["machine"]["versions"]["bitsandbytes"] = version("bitsandbytes")
    tune_step.publish(summary, "A quantised base", args.output)
    if args.adapters:
        summary["held_out_loss_over_one_base"] = losses_over_one_base(
            args, args.adapters, ["start", "finerank", "peft"]
        )
        if args.output:
            args.output.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
