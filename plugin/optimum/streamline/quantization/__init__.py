"""Quantized checkpoints: the table of quantizers (bitsandbytes, torchao), loading with one of them, and the way back
to float weights.
"""

__all__ = ["dequantize", "loading", "quantizers"]
