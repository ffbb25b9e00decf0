"""Checkpoints of older layouts as what transformers 5 has classes for."""
