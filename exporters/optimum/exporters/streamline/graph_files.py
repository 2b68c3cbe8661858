"""The files of an exported graph: their names, the name of its one optional input, and the size of its weights."""

from __future__ import annotations

from pathlib import Path

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = f"{GRAPH_FILE}.data"
LOGITS_TO_KEEP = "num_logits_to_keep"


def weight_bytes(folder: Path, active_share: float = 1.0) -> int:
    """The bytes of weights that one decode step reads: all weights except tables that are only looked up.

    Args:
        folder: The folder of the graph.
        active_share: For a mixture of experts: the share of the experts that a token is routed to, from 0 to 1.
    """
    import onnx_ir as ir

    weights = ir.load(folder / GRAPH_FILE).graph.initializers.values()
    read = [value for value in weights if {use.node.op_type for use in value.uses()} != {"Gather"}]
    shares = ((value, active_share if ".experts." in str(value.name) else 1.0) for value in read)
    return round(sum(value.const_value.nbytes * share for value, share in shares if value.const_value is not None))
