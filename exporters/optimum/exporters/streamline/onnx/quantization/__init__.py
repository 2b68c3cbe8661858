"""Quantized ONNX graphs: the table of quantizers, int4, int8, and their calibration inputs."""

__all__ = ["calibration_inputs", "int4", "int8", "quantizers", "settings"]
