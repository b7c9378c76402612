"""Elementwise chains of a decoder layer as single autograd steps that keep less; see `fuse`."""
