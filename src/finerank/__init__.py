"""finerank: low-rank fine-tuning of language models, exact from the first row to the exported adapter."""

__version__ = "0.1.0"
