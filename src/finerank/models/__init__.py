"""Base models: loading, facts about families, packed attention and the loss head."""
