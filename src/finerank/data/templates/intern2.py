"""InternLM 2: the begin-of-text token, then ChatML turns."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="intern2",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    prefix=(BOS,),
    stop_words=("<|im_end|>",),
)
