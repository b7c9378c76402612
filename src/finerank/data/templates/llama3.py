"""Llama 3: headers between `<|start_header_id|>` and `<|end_header_id|>`, turns end with `<|eot_id|>`."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="llama3",
    user=(
        "<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
    observation=(
        "<|start_header_id|>tool<|end_header_id|>\n\n{{content}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    prefix=(BOS,),
    stop_words=("<|eot_id|>",),
    replace_eos=True,
)
