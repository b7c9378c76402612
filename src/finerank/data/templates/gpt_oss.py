"""gpt-oss: messages between `<|start|>` and `<|end|>`, thoughts in a channel of their own."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="gpt_oss",
    user=("<|start|>user<|message|>{{content}}<|end|><|start|>assistant",),
    assistant=("{{content}}<|end|>",),
    system=("<|start|>system<|message|>{{content}}<|end|>",),
    default_system="You are ChatGPT, a large language model trained by OpenAI.",
    thought_words=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    efficient_eos=True,
    reasoning=True,
)
