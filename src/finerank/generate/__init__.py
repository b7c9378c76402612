"""Answers from a model: sampling, streaming, chat."""
