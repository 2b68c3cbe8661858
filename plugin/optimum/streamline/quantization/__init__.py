"""Quantized checkpoints, and compact copies: the quantizers (bitsandbytes, torchao), quantizing and dequantizing."""

__all__ = ["compact_copy", "dequantize", "loading", "quantizers"]
