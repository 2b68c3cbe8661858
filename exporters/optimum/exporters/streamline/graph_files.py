"""The file names of an exported graph, and the name of the one input that not every graph has."""

from __future__ import annotations

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = f"{GRAPH_FILE}.data"
LOGITS_TO_KEEP = "num_logits_to_keep"
