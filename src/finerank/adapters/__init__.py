"""Low-rank adapters: the modules, where they go, how they are saved, how they are merged."""
