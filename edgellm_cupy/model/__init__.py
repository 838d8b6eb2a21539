"""Whole decoders on the GPU."""
