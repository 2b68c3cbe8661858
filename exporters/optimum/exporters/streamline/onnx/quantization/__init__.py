"""Quantize an exported ONNX graph: the table of quantizers, 4-bit and 8-bit quantization, and calibration inputs."""

__all__ = ["calibration_inputs", "in_segments", "int4", "int8", "quantizers", "settings"]
