"""Kernels for bf16 models on a CPU, written in C++; optional: without them torch computes the same."""
