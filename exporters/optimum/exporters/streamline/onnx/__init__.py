"""Export to ONNX, and run an export on ONNX Runtime.

`export.py` is the export from start to end, `runner.py` the runner. `quantization/` quantizes the graph.
`genai_config.py` writes the file that onnxruntime-genai reads.
"""

__all__ = [
    "export",
    "genai_config",
    "hidden_states",
    "last_logits",
    "quantization",
    "runner",
    "segmented_runner",
    "segments",
]
