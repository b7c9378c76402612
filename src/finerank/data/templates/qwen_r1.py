"""Qwen with the R1 preamble, which asks for a thought and an answer between tags, in each user turn."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="qwen_r1",
    user=(
        "<|im_start|>user\nA conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>Put your final "
        "answer within \\\\boxed{}. {{content}}<|im_end|>\n<|im_start|>assistant\n",
    ),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    separator=("\n",),
    default_system="You are a helpful assistant.",
    stop_words=("<|im_end|>",),
    replace_eos=True,
)
