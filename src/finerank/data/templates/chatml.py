"""ChatML: `<|im_start|>role` lines, turns end with `<|im_end|>`."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="chatml",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    separator=("\n",),
    stop_words=("<|im_end|>", "<|im_start|>"),
    replace_eos=True,
)
