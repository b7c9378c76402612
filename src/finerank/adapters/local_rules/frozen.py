"""The control of every comparison: the lower layers are frozen, without adapters, and nothing flows into them."""

from finerank.adapters.local_rules._rule import LocalRule


class RULE(LocalRule):
    """No linear is local, so there is nothing to gather."""
