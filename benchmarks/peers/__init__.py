"""Programs that the benchmarks run beside each other, each in its own process; see `benchmarks/tune_step.py`."""
