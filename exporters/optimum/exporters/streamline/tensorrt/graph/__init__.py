"""The ONNX graph that TensorRT builds an engine from.

`graph_rules.py` checks that TensorRT takes a graph. `insert_qdq.py` quantizes it. `engine_inputs.py` makes its inputs,
and `reference_runner.py` runs it on a CPU. `growing_cache.py` converts a finished ONNX export for ONNX Runtime's
TensorRT provider.
"""

__all__ = ["engine_inputs", "graph_rules", "growing_cache", "insert_qdq", "quantizers", "reference_runner"]
