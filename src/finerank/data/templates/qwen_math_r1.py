"""Qwen with a system text that asks for steps and a boxed answer."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="qwen_math_r1",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    separator=("\n",),
    default_system="Please reason step by step, and put your final answer within \\boxed{}.",
    stop_words=("<|im_end|>",),
    replace_eos=True,
)
