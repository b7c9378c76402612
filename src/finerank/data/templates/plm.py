"""PLM: ChatML turns, each answer with `<|im_end|>` and a line break."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="plm",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    default_system="You are a helpful assistant.",
    stop_words=("<|endoftext|>",),
    replace_eos=True,
)
