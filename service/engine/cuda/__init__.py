"""Kernels of our own for NVIDIA GPUs: what lies between two matrix products, in one launch each."""
