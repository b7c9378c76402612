"""Stanford Alpaca: `### Instruction:` and `### Response:` after a fixed preamble."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="alpaca",
    user=("### Instruction:\n{{content}}\n\n### Response:\n",),
    separator=("\n\n",),
    default_system=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    ),
)
