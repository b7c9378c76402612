"""ChatML with a German system text."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="chatml_de",
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    separator=("\n",),
    default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
    stop_words=("<|im_end|>", "<|im_start|>"),
    replace_eos=True,
)
