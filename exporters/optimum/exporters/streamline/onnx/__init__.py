"""Exports to ONNX: the export from start to end, the runner on ONNX Runtime, and what other runtimes read beside the
graph.
"""

__all__ = [
    "export",
    "genai_config",
    "hidden_states",
    "last_logits",
    "memory",
    "quantization",
    "runner",
    "segmented_runner",
]
