"""Quantized checkpoints seen as numbers: one module per format, and `detect`, which chooses between them."""

from exporter.quantization.detect import base_weights, method

__all__ = ["base_weights", "method"]
