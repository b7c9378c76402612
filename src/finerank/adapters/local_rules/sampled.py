"""Exact gradients from a sample of the rows, LU-LoRA's default: what broadcast errors cannot say, at part of its price.

    --lu-lora-rule sampled --lu-lora-sample 0.375

In each step a random share of the rows is backpropagated through all layers, the local ones too, in micro-batches
smaller than the others by that share. The other rows pass the local layers without a graph, and teach only the layers
above. So this rule is not local in the strict sense: it buys the true direction with fewer rows, where `feedback` buys
all rows with a direction that is wrong further down.

The gradient of a local factor is the sample's, times the step's rows over the sample's: an unbiased estimate of that of
the whole step. The rows are drawn one from each group of rows with about as many trained tokens, which makes it less
noisy (`data.loader.BatchPlan.sample`). AdamW of the run applies it, clipped with the others; both factors learn, in all
linears that the run adapts.
"""

from finerank.adapters.local_rules._rule import LocalRule


class RULE(LocalRule):
    """See the module's docstring. A row is in the sample or does not teach, so nothing is gathered."""

    learns_by_optimizer = True
    learns_from_sample = True
    default_ratio = 1.0
    default_lr_share = 3.0
    default_decay_style = "cosine"
