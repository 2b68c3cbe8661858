"""Names of an exported graph that files without ONNX also need: its two files, and its one optional input."""

from __future__ import annotations

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = f"{GRAPH_FILE}.data"
LOGITS_TO_KEEP = "num_logits_to_keep"
