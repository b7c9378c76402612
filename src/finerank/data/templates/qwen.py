"""Qwen: ChatML with a default system text."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="qwen",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    separator=("\n",),
    default_system="You are a helpful assistant.",
    stop_words=("<|im_end|>",),
    replace_eos=True,
)
