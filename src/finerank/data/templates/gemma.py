"""Gemma: `<start_of_turn>` and `<end_of_turn>`; the answer's end token opens the next turn."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="gemma",
    user=("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    assistant=("{{content}}",),
    observation=("<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    separator=("<end_of_turn>\n",),
    prefix=(BOS,),
    efficient_eos=True,
)
