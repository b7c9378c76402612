"""Checkpoint formats, one file each; the folder is the registry.

Each module says `HOLDS` (what it can hold: base, adapter), `matches(folder)` (is this folder of this format), and reads
and writes: `read`/`write` for base models, `read_adapter`/`write_adapter` for adapters, whichever it holds.
"""
