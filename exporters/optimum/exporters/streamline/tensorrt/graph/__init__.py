"""The ONNX graph that TensorRT reads: the form it needs, rules it must keep, its quantization, its inputs, and a
runner that checks it without a GPU.
"""

__all__ = ["engine_inputs", "graph_rules", "growing_cache", "quantize", "quantizers", "reference_runner"]
