"""Qwen 3: ChatML turns with thoughts between `<think>` and `</think>`; see `_slots` for the rules."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="qwen3",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    observation=(
        "<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    function=("{{content}}<|im_end|>\n",),
    tool_format="qwen",
    call_format="qwen",
    stop_words=("<|im_end|>",),
    replace_eos=True,
    reasoning=True,
)
