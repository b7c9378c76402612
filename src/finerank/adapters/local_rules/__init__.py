"""Rules by which the adapters of LU-LoRA's lower layers learn without backpropagation; one file each.

    feedback    ours: the error of the upper part is broadcast to the lower layers
    mindspeed   MindSpeed-LLM's rule, number for number
    oja         Oja's textbook rule
    frozen      the control: the lower layers have no adapter at all

A module offers `RULE`, a `LocalRule` class. To add a rule, add a file, and its name to `lu_lora_rule`'s choices.
"""
