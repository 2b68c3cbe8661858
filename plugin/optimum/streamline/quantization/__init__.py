"""Quantized checkpoints: the quantizers (bitsandbytes, torchao), quantizing on load, and dequantizing."""

__all__ = ["dequantize", "loading", "quantizers"]
