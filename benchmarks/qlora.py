"""What a quantised base costs: our LoRA step, with the base in 4 and in 8 bits, beside PEFT over bitsandbytes' linears.

    python benchmarks/qlora.py --data alpaca_en_demo.json
    python benchmarks/qlora.py --data rows.json --steps 3 --contestants finerank finerank-4bit peft-4bit
    python benchmarks/qlora.py --data rows.json --quick                        does everything run?

Contestants take their steps by turns over the same rows, as in `tune_step.py`, whose options these are; a ratio is the
contestant's step over the first contestant's, step by step. The held-out loss is each one's own, on its own base.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import tune_step
from tune_step import LARGE_PAGES, Setup

from finerank.models.runtime import ENVIRONMENT  # found by way of tune_step

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
        "peft-8bit": Setup(
            "PEFT + bitsandbytes int8, HF Trainer (bf16, micro-batch 1, large pages)",
            "hf_trainer.py",
            (*_TRAINER, "8"),
            LARGE_PAGES,
        ),
    }
)
CONTESTANTS = ["finerank", "finerank-4bit", "finerank-8bit", "peft-4bit"]


def main() -> None:
    args = tune_step.arguments(__doc__, CONTESTANTS)
    with tempfile.TemporaryDirectory() as log:
        summary = tune_step.summarise(tune_step.race(args, Path(log)), args)
    summary["machine"]["versions"]["bitsandbytes"] = version("bitsandbytes")
    tune_step.publish(summary, "A quantised base", args.output)


if __name__ == "__main__":
    main()
