"""Checkpoints: file formats, conversion between them, and the state of a run."""
